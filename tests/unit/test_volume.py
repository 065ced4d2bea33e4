"""The formulas of the volume table: special values, orders of growth, and the page made of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import volume_page
from benchmarks.formulas import METHODS, Model, Volume, doubling, gather, model_of, ring, scatter, up_and_down
from benchmarks.models import resnet50
from benchmarks.page import BEGIN, END

MODEL = model_of(resnet50())


def sent(name: str, ranks: int, model: Model = MODEL) -> float:
    return METHODS[name].volume(model, ranks).sent


def test_the_model_is_resnet_50() -> None:
    assert MODEL.elements == 25_557_032
    assert MODEL.vectors == 54_120  # batch norms' weights and biases, and the classifier's bias
    assert MODEL.blocks == pytest.approx(MODEL.elements / 64, rel=1e-3)
    assert model_of([(3,), (8, 4)]) == Model(35, 3, 1 + 1, 3 + 32)
    assert model_of([(100, 5, 5, 4)]).factors == 4 * (100 + 100)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 1024])
def test_what_the_papers_say(ranks: int) -> None:
    dense = sent("Dense", ranks)
    assert dense == pytest.approx(2 * (ranks - 1) / ranks * 4 * MODEL.elements)
    assert sent("DEF, block 1/64", ranks) == pytest.approx(dense / 64, rel=1e-3)
    assert sent("DistEF, 1 bit", ranks) == pytest.approx(dense / 32)
    # measuring in bits per parameter, up and down, of a server's client: 5.9 for LIEC at T0 = 32 where dense has 64
    assert sent("LIEC, 1 bit, period 32", ranks) / dense == pytest.approx(5.9 / 64, rel=0.02)
    k = MODEL.elements / 1000
    assert sent("EF, top 1/1000", ranks) == pytest.approx(2 * (ranks - 1) * 4 * k)
    assert sent("gTop-k, 1/1000", ranks) <= 2 * 8 * k


def test_what_grows_with_the_ranks() -> None:
    far, near = 1024, 4
    for name in METHODS:
        growth = sent(name, far) / sent(name, near)
        if name in ("EF, 1 bit (MEM-SGD)", "EF, top 1/1000"):
            assert growth == pytest.approx((far - 1) / (near - 1))
        elif name == "gs-SGD, gathered (Sketched-SGD)":
            assert growth > 100
        elif name == "gs-SGD, tree":
            assert 2 < growth < math.log2(far) / math.log2(near)
        else:
            assert 1 < growth < 4 / 3 + 1e-9


def test_collectives() -> None:
    assert ring(8.0, 4) == Volume(12.0, 12.0, 6)
    assert gather(8.0, 4) == Volume(24.0, 24.0, 3)
    assert scatter(8.0, 4) == Volume(6.0, 6.0, 3)
    assert doubling(8.0, 8) == Volume(24.0, 24.0, 3)
    # Three ranks: two of them exchange, the third lends and borrows.
    assert doubling(9.0, 3) == Volume(3 * 4 / 3 * 3, 27.0, 3)
    assert up_and_down(8.0, 8) == Volume(14.0, 48.0, 6)
    assert up_and_down(8.0, 5).rounds == 6
    assert Volume(1.0, 1e6, 4).seconds(1e-3, 8e6) == pytest.approx(1.004)


def test_the_page_has_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "volume.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(volume_page, "PAGE", page)
    monkeypatch.setattr(volume_page, "FIGURE", tmp_path / "figures" / "volume.png")
    records = [
        {"method": name, "hosts": hosts, "formula": sent(name, hosts), "counted": 1.05 * sent(name, hosts)}
        for name in METHODS
        for hosts in (2, 8)
    ]
    volume_page.write(records)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("(+5%)") == 2 * len(METHODS)
    for name in METHODS:
        assert text.count(f"| {name}") == 2
    assert (tmp_path / "figures" / "volume.png").stat().st_size > 1000
