"""The part of a page in docs/ that a benchmark writes, between two marks."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def update_page(page: Path, text: str) -> None:
    """Put `text` between the two marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
