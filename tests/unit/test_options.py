"""The examples' command line: every algorithm and compressor can be asked for, and what is wrong is said at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hvd_compress
from hvd_compress import (
    DEF,
    EF,
    LIEC,
    Algorithm,
    BlockSign,
    Compressor,
    CountSketch,
    Dense,
    DistEF,
    GlobalSketch,
    GlobalTopK,
    Policy,
    RandomBlock,
    Warmup,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import options


def asked(monkeypatch: pytest.MonkeyPatch, line: str) -> hvd_compress.Algorithm:
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    return options.compression(options.parse("x"))


@pytest.mark.parametrize(
    ("line", "algorithm"),
    [
        ("", DEF(RandomBlock(1 / 64), 0.3)),
        ("--compression dense", Dense()),
        ("--compression ef --density 1/8 --seed 3", EF(RandomBlock(1 / 8, seed=3))),
        ("--compression def --coefficient auto", DEF(RandomBlock(1 / 64), "auto")),
        ("--compression dist-ef", DistEF(BlockSign())),
        ("--compression liec --averaging-period 100", LIEC(BlockSign(), averaging_period=100)),
        ("--compression liec --compressor random-block", LIEC(RandomBlock(1 / 64))),
        ("--compression gs-sgd --density 1/10", GlobalSketch(CountSketch(density=1 / 10))),
        ("--compression gs-sgd --sketch-exchange tree", GlobalSketch(CountSketch(density=1 / 64), exchange="tree")),
        ("--compression gtop-k --density 0.001", GlobalTopK(density=0.001)),
        ("--compression ef --compressor low-rank --low-rank 2", EF(hvd_compress.LowRank(rank=2))),
    ],
)
def test_what_is_asked_for_is_built(
    monkeypatch: pytest.MonkeyPatch, line: str, algorithm: hvd_compress.Algorithm
) -> None:
    assert asked(monkeypatch, line) == algorithm


def test_the_command_line_leaves_no_compressor_or_algorithm_out(monkeypatch: pytest.MonkeyPatch) -> None:
    public = {getattr(hvd_compress, name) for name in hvd_compress.__all__}
    classes = {value for value in public if isinstance(value, type)}
    built = [asked(monkeypatch, f"--compression ef --compressor {name}") for name in options.COMPRESSORS]
    sent = {type(algorithm.compressor) for algorithm in built if isinstance(algorithm, EF)}
    # A sketch is gs-sgd's; a warm-up wraps another.
    assert sent == {c for c in classes if issubclass(c, Compressor)} - {Compressor, CountSketch, Warmup}
    algorithms = {type(asked(monkeypatch, f"--compression {name}")) for name in options.ALGORITHMS}
    assert algorithms == {c for c in classes if issubclass(c, Algorithm)} - {Algorithm, Policy}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--compression dense --compressor top-k", "--compressor top-k: dense takes none"),
        ("--compression gs-sgd --compressor sign", "--compressor sign: gs-sgd takes none"),
        ("--compression dist-ef --compressor low-rank", "DistEF: compressor=LowRank"),
        ("--compression def --compressor sign --coefficient auto", "coefficient='auto' is not allowed"),
        ("--density 2", "density"),
        ("--coefficient 1.5", "coefficient=1.5"),
        ("--compression liec --averaging-period 0", "averaging_period=0"),
    ],
)
def test_what_cannot_be_is_a_mistake_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        asked(monkeypatch, line)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
