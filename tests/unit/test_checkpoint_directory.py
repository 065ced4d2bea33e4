"""Directories of checkpoints: what counts as whole, what is the newest, what is removed, what damage is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_compress.checkpoint import CheckpointError, directory, files
from hvd_compress.checkpoint.directory import MANIFEST, Manifest
from hvd_compress.checkpoint.files import Place
from hvd_compress.checkpoint.structure import flatten


def write_checkpoint(root: Path, step: int, keep: int = 9, token: str = "0123abcd") -> Path:
    """Write a checkpoint of one rank."""
    path = directory.step_directory(root, step)
    path.mkdir(parents=True, exist_ok=True)
    place = Place(step, 0, 1, token)
    record = files.write_state(
        path, place, flatten({"step": step, "token": token, "weights": torch.ones(9)}, files.dtype_names())
    )
    directory.publish(root, Manifest(step, token, 0, [record]), keep)
    return path


def read_checkpoint(root: Path, step: int | None = None) -> Any:
    manifest = directory.choose(root, step)
    state = files.read_state(directory.step_directory(root, manifest.step), manifest.place(0), manifest.files[0])
    assert torch.equal(state.pop("weights"), torch.ones(9))
    return state


def test_every_flipped_bit_of_the_json_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5) / MANIFEST
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(CheckpointError, match=r"step-00000005/checkpoint\.json"):
            directory.choose(tmp_path, None)
    path.write_bytes(data)
    assert read_checkpoint(tmp_path)["step"] == 5


def test_truncated_and_foreign_json_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5) / MANIFEST
    data = path.read_bytes()
    texts = [data[:length] for length in range(len(data))] + [b"[]", b"{}", b'{"format": true}', data + b"\n"]
    for text in texts:
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=MANIFEST):
            directory.choose(tmp_path, 5)
    later = json.loads(data)
    path.write_text(json.dumps({"format": files.FORMAT + 1, "what": later}))
    with pytest.raises(CheckpointError, match=f"format {files.FORMAT + 1} .* the version that wrote it"):
        directory.choose(tmp_path, None)


def test_a_checkpoint_moved_to_another_step_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5).rename(tmp_path / "step-00000006")
    with pytest.raises(CheckpointError, match="step-00000006"):
        directory.choose(tmp_path, None)


def test_the_last_written_is_the_newest(tmp_path: Path) -> None:
    """A run that went back to an earlier step goes on from where it has got to."""
    for step in (10, 20, 30, 15):
        write_checkpoint(tmp_path, step)
    assert read_checkpoint(tmp_path) == {"step": 15, "token": "0123abcd"}
    assert read_checkpoint(tmp_path, 20)["step"] == 20
    write_checkpoint(tmp_path, 16, keep=2)
    assert [path.name for path in directory.checkpoints(tmp_path)[0]] == ["step-00000015", "step-00000016"]


def test_keep_removes_older_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step.txt").write_text("mine")
    for step in range(2, 7):
        write_checkpoint(tmp_path, step, keep=2)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    kept = [f"step-0000000{step}/{name}" for step in (5, 6) for name in (MANIFEST, Place(5, 0, 1, "0123abcd").name)]
    assert found == ["step-00000001/notes.txt", *kept, "step-by-step.txt"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [f"step-0000000{s}" for s in (1, 5, 6)]


def test_a_step_is_replaced_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, token="aaaaaaaa")
    path = write_checkpoint(tmp_path, 5, token="bbbbbbbb")
    assert read_checkpoint(tmp_path)["token"] == "bbbbbbbb"
    assert len(list(path.iterdir())) == 2


def test_an_unfinished_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    (write_checkpoint(tmp_path, 6) / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="unfinished checkpoints, which are ignored: 6"):
        assert read_checkpoint(tmp_path)["step"] == 5
    with pytest.raises(CheckpointError, match=r"step-00000006 is not finished.*whole checkpoints in .*: 5"):
        directory.choose(tmp_path, 6)
    with pytest.raises(CheckpointError, match="step-00000007 is missing"):
        directory.choose(tmp_path, 7)
    write_checkpoint(tmp_path, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_checkpoint(tmp_path)["step"] == 7
    assert not (tmp_path / "step-00000006").exists()


def test_a_damaged_json_is_no_reason_to_load_an_older_checkpoint_in_silence(tmp_path: Path) -> None:
    for step in (5, 6):
        write_checkpoint(tmp_path, step)
    path = tmp_path / "step-00000006" / MANIFEST
    path.write_text("{")
    with pytest.raises(
        CheckpointError, match=r"step-00000006/checkpoint.json.*load another checkpoint with step=, of 5"
    ):
        directory.choose(tmp_path, None)
    assert read_checkpoint(tmp_path, 5)["step"] == 5
    write_checkpoint(tmp_path, 7, keep=1)
    assert path.exists(), "whatever can still be saved of it is not removed"
    assert (path.parent / Place(6, 0, 1, "0123abcd").name).exists()


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="has no whole checkpoint"):
            directory.choose(root, None)


# -- killed at any moment --------------------------------------------------------------------------------


def kill_at(root: Path, moment: int) -> None:
    """Let this process die just before its ``moment``-th operation on a file below ``root``, or piece of one."""
    left = [moment]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(
            str(root)
        ):
            count()

    chunks = files._chunks

    def counted(*args: Any) -> Any:
        for chunk in chunks(*args):
            yield chunk[: len(chunk) // 2]
            count()
            yield chunk[len(chunk) // 2 :]

    vars(files)["_chunks"] = counted
    sys.addaudithook(hook)


def save_and_die(root: Path, step: int, token: str, moment: int) -> bool:
    """Save in a child that dies at ``moment``; return False if it was done before."""
    if (child := os.fork()) == 0:
        try:
            kill_at(root, moment)
            directory.remove_leftovers(root)
            write_checkpoint(root, step, keep=2, token=token)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:hvd_compress. .* has unfinished checkpoints")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("again", [False, True], ids=["another step", "the same step"])
def test_killed_at_any_moment_the_last_whole_checkpoint_loads(tmp_path: Path, again: bool) -> None:
    step, moment, outcomes = (20 if again else 30), 1, []
    while True:
        root = tmp_path / str(moment)
        for before in (10, 20):
            write_checkpoint(root, before, token="aaaaaaaa")
        killed = save_and_die(root, step, "bbbbbbbb", moment)
        found = read_checkpoint(root)
        assert found in ({"step": 20, "token": "aaaaaaaa"}, {"step": step, "token": "bbbbbbbb"})
        outcomes.append(found["token"])
        write_checkpoint(root, 40, keep=1, token="cccccccc")
        assert sorted(path.name for path in root.rglob("*")) == [
            MANIFEST,
            Place(40, 0, 1, "cccccccc").name,
            "step-00000040",
        ]
        if not killed:
            break
        moment += 1
    assert moment > 10
    assert outcomes == sorted(outcomes), "once whole, it stays"
    assert {outcomes[0], outcomes[-1]} == {"aaaaaaaa", "bbbbbbbb"}
