"""Fixture for tests of signs, which runs them with and without the compiled loops."""

from __future__ import annotations

import pytest

from hvd_compress.native import signs

LOADED = signs._signs  # before any test patches it


@pytest.fixture(autouse=True, params=["torch", "native"] if LOADED else ["torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with torch's operations, and with the compiled loops if they are built."""
    monkeypatch.setattr(signs, "_signs", LOADED if request.param == "native" else None)
    return str(request.param)
