"""One rank's file: safetensors, written at once or not at all, and read only if it is what was written."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple

import torch
from torch import Tensor

from hvd_compress.checkpoint.structure import FlatState, unflatten

# Of directories and files together; later versions read earlier formats, and are refused by earlier versions.
FORMAT = 1
KEY = "hvd_compress"
_CHUNK = 1 << 24
_HEADER_LIMIT = 100_000_000  # the library's own


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or is not whole, or does not fit: the message says which and why."""


class Place(NamedTuple):
    """The place of a file in a checkpoint, which is also written into the file.

    Attributes:
        step: the checkpoint's step.
        rank: rank that wrote the file.
        ranks: number of ranks that wrote the checkpoint.
        token: hexadecimal digits that no other attempt to save has.
    """

    step: int
    rank: int
    ranks: int
    token: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"rank-{self.rank:05d}-of-{self.ranks:05d}.{self.token}.safetensors"


class FileRecord(NamedTuple):
    """Name, size in bytes and SHA-256 (hexadecimal) of a file."""

    name: str
    nbytes: int
    sha256: str


def safetensors_library() -> Any:
    """Return the module ``safetensors.torch``.

    Raises:
        ImportError: with the remedy, if safetensors is not installed.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("hvd_compress.checkpoint needs safetensors: pip install hvd_compress[checkpoint]") from error


def dtype_names() -> dict[torch.dtype, str]:
    """Return the dtypes that the installed safetensors can read, with their names in the format."""
    return {dtype: name for name, dtype in safetensors_library()._TYPES.items() if dtype is not None}


def copy_to_host(state: FlatState) -> FlatState:
    """Return ``state`` with copies of its tensors in host memory."""
    return state._replace(tensors={name: _host(tensor, copy=True) for name, tensor in state.tensors.items()})


def write_state(directory: Path, place: Place, state: FlatState) -> FileRecord:
    """Write a rank's file, completely or not at all, so that it survives a loss of power.

    The format is simple and written here, not by the library: chunk by chunk, hashed in the same pass. Training goes
    on between the chunks, and no second copy of the state is needed.

    Raises:
        OSError: if it could not be written.
        ValueError: if there are so many tensors that no library would read the file.
    """
    names = dtype_names()
    tensors = dict(sorted(state.tensors.items(), key=lambda item: -item[1].element_size()))  # so all are aligned
    about = {"format": FORMAT, **place._asdict(), "state": state.text}
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(about)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise ValueError(
            f"{place.name}: the state has {len(tensors)} tensors and a header of {len(text)} bytes; "
            f"safetensors reads {_HEADER_LIMIT}"
        )
    digest = hashlib.sha256()
    with written_at_once(directory / place.name) as file:
        for chunk in _chunks(len(text).to_bytes(8, "little") + text, tensors):
            file.write(chunk)
            digest.update(chunk)
        nbytes = file.tell()
    return FileRecord(place.name, nbytes, digest.hexdigest())


def read_state(directory: Path, place: Place, record: FileRecord) -> Any:
    """Return the state in a rank's file, with tensors in host memory, after checking every bit of the file.

    Raises:
        CheckpointError: if it is missing, truncated, altered, of a newer format, or not the file of this place.
    """
    path = directory / record.name
    try:
        _require_unchanged(path, record)
        with safetensors_library().safe_open(str(path), framework="pt", device="cpu") as file:
            text = _described_state(path, (file.metadata() or {}).get(KEY), place)
            return unflatten(text, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except Exception as error:  # the library's own class of errors is no ValueError
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _require_unchanged(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless a file has the size and the checksum that were recorded."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes != record.nbytes:
            what = "truncated" if nbytes < record.nbytes else "altered"
            raise CheckpointError(f"{path} is {what}: it has {nbytes} bytes, and {record.nbytes} were written")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != record.sha256:
        raise CheckpointError(f"{path} is altered: its SHA-256 is not that of what was written")


def _described_state(path: Path, described: Any, place: Place) -> str:
    """Return the JSON text of the state from what a file says of itself."""
    about = json.loads(described) if described is not None else None
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise CheckpointError(f"{path} was not written by hvd_compress.checkpoint")
    require_known_format(path, about["format"])
    if {key: about.get(key) for key in place._fields} != place._asdict():
        raise CheckpointError(f"{path} is the file of another place: {place} was expected")
    return str(about["state"])


def require_known_format(path: Path, number: int) -> None:
    """Raise CheckpointError if a file has a format that this version does not know."""
    if not 1 <= number <= FORMAT:
        raise CheckpointError(
            f"{path} has format {number} of checkpoints, and this version of hvd_compress reads formats up to "
            f"{FORMAT}; load it with the version that wrote it"
        )


@contextlib.contextmanager
def written_at_once(path: Path) -> Iterator[Any]:
    """Give a binary file to write to, which becomes ``path`` when all of it is on the disk; else ``path`` stays."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a loss of power, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return ``tensor`` in host memory, contiguous; the same one if possible, unless a copy is asked for."""
    if (
        not copy
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    ):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _chunks(head: bytes, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield the bytes of a file in pieces."""
    yield head
    for tensor in tensors.values():
        content = _host(tensor).reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), _CHUNK):
            yield content[begin : begin + _CHUNK]
