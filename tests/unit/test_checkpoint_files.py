"""Files of checkpoints: any damage is refused with the file's name, and a failed write leaves nothing."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvd_compress.checkpoint import CheckpointError, files
from hvd_compress.checkpoint.files import FileRecord, Place
from hvd_compress.checkpoint.structure import unflatten
from tests.unit.saving import PLACE, STATE, flat


def refused(tmp_path: Path, record: FileRecord, *fragments: str, place: Place = PLACE) -> None:
    """Fail unless the file is refused by a message with its name and all fragments."""
    with pytest.raises(CheckpointError) as caught:
        files.read_state(tmp_path, place, record)
    for fragment in (record.name, *fragments):
        assert fragment in str(caught.value)


def record_of(path: Path) -> FileRecord:
    """Return the record of a file as it is, so that nothing but its content can be wrong."""
    data = path.read_bytes()
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    record = files.write_state(tmp_path, PLACE, flat(STATE))
    path, data = tmp_path / record.name, (tmp_path / record.name).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) - 1):
        path.write_bytes(data[:length])
        refused(tmp_path, record, "truncated", f"{length} bytes")
        with pytest.raises(CheckpointError, match=record.name):  # also if the record were of this file
            files.read_state(tmp_path, PLACE, record_of(path))
    path.write_bytes(data + b"\0")
    refused(tmp_path, record, "altered")
    path.unlink()
    refused(tmp_path, record, "is missing")


@given(st.data())
def test_a_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        record = files.write_state(Path(name), PLACE, flat(STATE))
        path = Path(name) / record.name
        content = bytearray(path.read_bytes())
        for bit in data.draw(st.sets(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=20)):
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            refused(Path(name), record, "altered")
            content[bit // 8] ^= 1 << bit % 8


def described(change: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """Return what a file says of itself, changed."""
    about = {"format": files.FORMAT, **PLACE._asdict(), "state": flat(STATE).text}
    change(about)
    return {files.KEY: json.dumps(about)}


FOREIGN: list[tuple[dict[str, str], str]] = [
    ({}, "was not written by hvd_compress.checkpoint"),
    ({files.KEY: "[]"}, "was not written by hvd_compress.checkpoint"),
    ({files.KEY: "{"}, "cannot be read"),
    (described(lambda about: about.update(format=files.FORMAT + 1)), f"format {files.FORMAT + 1}"),
    (described(lambda about: about.update(format=0)), "format 0"),
    (described(lambda about: about.update(step=8)), "another place"),
    (described(lambda about: about.update(rank=1)), "another place"),
    (described(lambda about: about.update(token="ffffffff")), "another place"),
    (described(lambda about: about.pop("state")), "cannot be read"),
    (described(lambda about: about.update(state="{}")), "cannot be read"),
    (described(lambda about: about.update(state='{"tensor":["other",null]}')), "cannot be read"),
    (described(lambda about: about.update(state='{"dict":[1]}')), "cannot be read"),
]


@pytest.mark.parametrize(("metadata", "fragment"), FOREIGN)
def test_foreign_files_are_refused(tmp_path: Path, metadata: dict[str, str], fragment: str) -> None:
    """Files of the library's, whose checksums are right."""
    path = tmp_path / PLACE.name
    save_file(flat(STATE).tensors, path, metadata or None)
    refused(tmp_path, record_of(path), fragment)


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / PLACE.name
    torch.save({"model": torch.zeros(2)}, path)
    refused(tmp_path, record_of(path), "cannot be read")


def test_a_description_without_its_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        unflatten('{"tensor":["x",null]}', {})


def test_without_safetensors_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install hvd_compress\[checkpoint\]"):
        files.dtype_names()


# -- writing -----------------------------------------------------------------------------------------------


def failing_chunks(*_: Any) -> Iterator[bytes]:
    yield b"half of it"
    raise OSError("No space left on device")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_chunks", failing_chunks)
    with pytest.raises(OSError, match="No space left"):
        files.write_state(tmp_path, PLACE, flat(STATE))
    assert list(tmp_path.iterdir()) == []


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    record = files.write_state(tmp_path, PLACE, flat(STATE))
    assert torch.equal(load_file(tmp_path / record.name)["model/0.weight"], STATE["model"]["0.weight"])  # type: ignore
    assert (tmp_path / record.name).stat().st_size == record.nbytes


def test_the_header_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_HEADER_LIMIT", 200)
    with pytest.raises(ValueError, match="1 tensors and a header of"):
        files.write_state(tmp_path, PLACE, flat(STATE))
    assert list(tmp_path.iterdir()) == []


def test_what_is_described_is_in_the_file(tmp_path: Path) -> None:
    record = files.write_state(tmp_path, PLACE, flat(STATE))
    with safe_open(str(tmp_path / record.name), framework="pt") as file:
        about = json.loads(file.metadata()[files.KEY])
    assert about == {"format": files.FORMAT, **PLACE._asdict(), "state": flat(STATE).text}
