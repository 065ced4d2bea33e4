"""The example scripts: one line apart, readable data, honest reports."""

from __future__ import annotations

import argparse
import difflib
import gzip
import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import common  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import launch  # noqa: E402
import options  # noqa: E402
import report  # noqa: E402
from model import SmallResNet  # noqa: E402

from benchmarks import convergence  # noqa: E402
from benchmarks.page import BEGIN, END, update_page  # noqa: E402


def test_the_scripts_differ_in_one_import_and_the_optimizer_line() -> None:
    plain = (EXAMPLES / "train_horovod.py").read_text().splitlines()
    ours = (EXAMPLES / "train.py").read_text().splitlines()
    changes = [line for line in difflib.ndiff(plain, ours) if line[:2] in ("- ", "+ ")]
    assert changes == [
        "+ import hvd_compress",
        "-     optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())",
        "+     optimizer = hvd_compress.DistributedOptimizer(optimizer, model.named_parameters(), "
        "options.compression(args))",
    ]
    scripts = ("examples/train_horovod.py", "examples/train.py")
    diff = subprocess.run(["diff", *scripts], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"$ diff {' '.join(scripts)}\n{diff}```" in (ROOT / "README.md").read_text(encoding="utf-8")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def one_rank(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        rank=lambda: 0,
        local_rank=lambda: 0,
        size=lambda: 1,
        barrier=lambda: None,
        allgather_object=lambda value, name: [value],
        broadcast_object=lambda value, name: value,
        **more,
    )


@pytest.mark.parametrize(("gpus", "ranks", "chosen"), [(1, 2, 0), (2, 2, 1), (4, 2, 1)])
def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int, chosen: int) -> None:
    taken: list[int] = []
    monkeypatch.setattr(common, "hvd", SimpleNamespace(rank=lambda: 5, local_rank=lambda: 1, local_size=lambda: ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    precision = torch.get_float32_matmul_precision()
    try:
        assert common.choose_device() == torch.device("cuda") and taken == [chosen]
    finally:
        torch.set_float32_matmul_precision(precision)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "hvd", SimpleNamespace(rank=lambda: 5, local_rank=lambda: 1, local_size=lambda: 3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="rank 5: this node has 2 GPUs for 3 ranks"):
        common.choose_device()


def test_fashion_mnist_is_read_from_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for name in data.FASHION_MD5:
        shape = (20, 28, 28) if "images" in name else (20,)
        write_idx(tmp_path / name, rng.integers(0, 10, shape, dtype=np.uint8))
    monkeypatch.setattr(data, "hvd", one_rank())
    images = data.load("fashion-mnist", tmp_path, train_samples=15)
    pixels, labels = images.train.tensors
    assert pixels.shape == (15, 1, 28, 28) and images.image_size == 28 and len(images.test) == 20
    assert abs(float(pixels.mean())) < 1e-5 and labels.dtype == torch.int64


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, timeout: float) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(data, "hvd", one_rank())
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(SystemExit, match=r"no route to host.*--data-dir.*dataset-fashion-mnist"):
        data.load("fashion-mnist", tmp_path)


def test_a_file_that_is_not_idx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(ValueError, match="not an IDX file"):
        data.read_idx(tmp_path / "x.gz")


def test_digits_are_always_the_same_split() -> None:
    images = data.load("digits")
    assert (len(images.train), len(images.test), images.image_size) == (1437, 360, 8)
    assert torch.equal(images.test.tensors[1], data.load("digits").test.tensors[1])


@pytest.mark.parametrize("size", [8, 28])
def test_the_model_takes_both_image_sizes(size: int) -> None:
    assert SmallResNet(size)(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_the_learning_rate_warms_up_and_decays() -> None:
    args = argparse.Namespace(warmup_epochs=2, epochs=8, decay_at=[0.5, 0.75])
    factor = options.warm_up_and_decay(args, steps_per_epoch=10)
    assert factor(0) == pytest.approx(1 / 20) and factor(19) == 1 and factor(39) == 1
    assert factor(40) == pytest.approx(0.1) and factor(60) == pytest.approx(0.01)


def test_fractions_are_understood() -> None:
    assert options.fraction("1/64") == 1 / 64 and options.coefficient("auto") == "auto"
    with pytest.raises(argparse.ArgumentTypeError, match="1/64"):
        options.fraction("a few")


def test_a_rank_without_one_batch_is_told_so() -> None:
    args = argparse.Namespace(batch_size=64)
    options.require_batches(args, 1, 64)
    with pytest.raises(SystemExit, match="--batch-size 64: each rank has 63 training images"):
        options.require_batches(args, 0, 63)


def test_plain_optimizers_are_evaluated_where_they_are() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nothing = TensorDataset(torch.zeros(0, 2))
    with common.evaluation_point(optimizer, point="virtual"):
        assert common.virtual_accuracy(optimizer, model, nothing, torch.device("cpu"), argparse.Namespace()) is None


def test_the_log_is_json_also_when_training_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "hvd", one_rank())
    log = report.Log(argparse.Namespace(output=tmp_path, lr=0.1), torch.nn.Linear(2, 2), [])
    log.add(
        epoch=1,
        train_loss=math.nan,
        test_loss=math.inf,
        test_accuracy=10.0,
        virtual_accuracy=None,
        seconds=1.0,
        mb_sent=2.0,
    )
    content = report.read_log(tmp_path / "log.json")
    assert content["epochs"][0]["train_loss"] is None and content["megabytes_sent"] == 2.0


def fake_log(accuracy: float) -> dict[str, Any]:
    epochs = [
        {
            "epoch": e,
            "train_loss": 1.0,
            "test_loss": 1.0,
            "test_accuracy": accuracy - 2 / e,
            "virtual_accuracy": accuracy,
            "seconds": 1.0,
            "mb_sent": 3.0 * e,
        }
        for e in (1, 2, 3)
    ]
    return {"parameters": 7, "megabytes_sent": 9.0, "seconds": 3.0, "epochs": epochs}


def test_compare_ends_with_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(script: Path, arguments: list[str], ranks: int, log: Path) -> None:
        assert ranks == 2 and arguments[-2:] == ["--epochs", "3"]
        report.write_json(fake_log(98.0), log.with_name("log.json"))

    monkeypatch.setattr(compare, "launch", pretend)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(tmp_path), "--epochs", "3"])
    assert compare.main() == 0
    out = capsys.readouterr().out
    assert "| dense" in out and "| DEF 1/64" in out and "97.33" in out and str(tmp_path / "curves.png") in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_shows_what_the_ranks_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "print('[1]<stderr>:ValueError: lr'); print('launcher: rank 1 ended'); raise SystemExit(3)"
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(tmp_path)])
    assert compare.main() == 1
    said = capsys.readouterr().err
    assert "dense FAILED: exit code 3" in said and "[1]<stderr>:ValueError: lr" in said.splitlines()
    assert "launcher: rank 1 ended" not in said.splitlines()


def test_rank_zero_is_told_from_the_others() -> None:
    assert launch.rank_zero("[0]<stderr>:[0]<stdout>:epoch 1") == (True, "epoch 1")
    assert launch.rank_zero("[1,0]<stdout>:epoch 1") == (True, "epoch 1")
    assert launch.rank_zero("[1]<stdout>:epoch 1") == (False, "epoch 1")
    assert launch.is_bar(" 27%|##       | 36/132 [00:01<00:02, 35.91step/s]")


def test_the_benchmark_says_when_def_falls_behind(tmp_path: Path) -> None:
    accuracy = {"dense": 98.0, "DEF": 96.5, "EF": 40.0, "EF, lr / 5": 95.0}
    records = [
        {
            "task": "digits",
            "method": name,
            "lr": 0.05,
            "ranks": 4,
            "density": "1/64",
            "accuracy": [value, value],
            "virtual_accuracy": [None, None],
            "train_loss": [0.1, 0.1],
            "megabytes_sent": 1.0,
            "curves": [[50.0, value], [55.0, value]],
        }
        for name, value in accuracy.items()
    ]
    assert "NOT within 1 point of dense (-1.50)" in convergence.verdicts(records)[0]
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    update_page(page, convergence.markdown(records))
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text and "-58.00" in text
    convergence.plot(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
