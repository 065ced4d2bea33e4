"""A directory of checkpoints: what is whole, which is the newest, what may be removed.

::

    directory/
        step-00000050/
            checkpoint.json                                  written last: without it, nothing here counts
            rank-00000-of-00002.3f2a9c1b.safetensors
            rank-00001-of-00002.3f2a9c1b.safetensors

The names of files have the token of the attempt to save that wrote them. So an attempt never touches a file of another
one, and a step that is saved again changes hands when the new ``checkpoint.json`` replaces the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Optional

from hvd_compress.checkpoint.files import (
    FORMAT,
    CheckpointError,
    FileRecord,
    Place,
    require_known_format,
    sync_directory,
    written_at_once,
)

MANIFEST = "checkpoint.json"
_STEP = re.compile(r"step-\d{8,}")
_OURS = re.compile(
    r"\.?(rank-\d{5,}-of-\d{5,}|began|failed)\.[0-9a-f]{8}\.(safetensors|json)(\.tmp)?|\.checkpoint\.json\.tmp"
)


class Manifest(NamedTuple):
    """The content of a ``checkpoint.json``.

    Attributes:
        step: number in the name of the checkpoint's directory.
        token: of the attempt that wrote it.
        serial: one more than that of the checkpoint that was the newest before.
        files: the ranks' files, in rank order.
    """

    step: int
    token: str
    serial: int
    files: list[FileRecord]

    @property
    def ranks(self) -> int:
        """Number of ranks that wrote the checkpoint."""
        return len(self.files)

    def place(self, rank: int) -> Place:
        """Return the place of a rank's file."""
        return Place(self.step, rank, self.ranks, self.token)

    def to_text(self) -> str:
        """Return the JSON text, with a checksum of itself; equal manifests have equal texts."""
        body = {"format": FORMAT, **self._asdict(), "files": [record._asdict() for record in self.files]}
        checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return json.dumps({**body, "checksum": checksum}, indent=1) + "\n"


def step_directory(root: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return root / f"step-{step:08d}"


def read_manifest(path: Path) -> Manifest:
    """Read a ``checkpoint.json``.

    Raises:
        CheckpointError: if it is missing, altered, of a newer format, or not ours.
    """
    try:
        text = path.read_bytes().decode("ascii")
        return _parsed(path, text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parsed(path: Path, text: str) -> Manifest:
    content = json.loads(text)
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise CheckpointError(f"{path} was not written by hvd_compress.checkpoint")
    require_known_format(path, content["format"])
    try:
        files = [FileRecord(**record) for record in content["files"]]
        manifest = Manifest(content["step"], content["token"], content["serial"], files)
        if manifest.to_text() == text and path.parent.name == step_directory(Path(), manifest.step).name:
            return manifest
    except (KeyError, TypeError):
        pass  # something is missing or is of another kind: altered, too
    raise CheckpointError(f"{path} is altered: its content does not have the checksum that was written, or its place")


def checkpoints(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the directories of whole checkpoints and those of unfinished ones, both by step."""
    found = sorted((path for path in root.glob("step-*") if _STEP.fullmatch(path.name)), key=lambda p: int(p.name[5:]))
    whole = [path for path in found if (path / MANIFEST).exists()]
    return whole, [path for path in found if path not in whole]


def choose(root: Path, step: Optional[int]) -> Manifest:
    """Return the manifest of the checkpoint of ``step``, or of the one that was written last.

    Raises:
        CheckpointError: if there is none, or if a ``checkpoint.json`` that may be the newest cannot be read.
    """
    whole, unfinished = checkpoints(root)
    if step is not None:
        wanted = step_directory(root, step)
        if wanted not in whole:
            what = f"{wanted} is not finished: it has no {MANIFEST}" if wanted in unfinished else f"{wanted} is missing"
            raise CheckpointError(f"{what}; whole checkpoints in {root}: {_steps(whole)}")
        return _read_or_advise(root, wanted)
    if unfinished:
        warnings.warn(
            f"hvd_compress: {root} has unfinished checkpoints, which are ignored: {_steps(unfinished)}", stacklevel=2
        )
    if not whole:
        raise CheckpointError(f"{root} has no whole checkpoint")
    return max((_read_or_advise(root, path) for path in whole), key=lambda manifest: manifest.serial)


def remedy(root: Path, failed: Path) -> str:
    """Return the advice which checkpoints there are besides the one that has failed."""
    whole = [path for path in checkpoints(root)[0] if path != failed]
    return f"load another checkpoint with step=, of {_steps(whole)}" if whole else "there is no other checkpoint"


def _read_or_advise(root: Path, path: Path) -> Manifest:
    """Return the manifest of a checkpoint, which might be the newest, so that none is passed over in silence."""
    try:
        return read_manifest(path / MANIFEST)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy(root, path)}") from error


def publish(root: Path, manifest: Manifest, keep: int) -> None:
    """Make a checkpoint whole, whose files are all on the disk; then remove old ones, and what attempts have left.

    Args:
        keep: number of whole checkpoints to keep, the ones that were written last.
    """
    path = step_directory(root, manifest.step)
    whole = [(found, known) for found in checkpoints(root)[0] if (known := _readable(found)) is not None]
    manifest = manifest._replace(serial=1 + max((known.serial for _, known in whole), default=0))
    with written_at_once(path / MANIFEST) as file:
        file.write(manifest.to_text().encode("ascii"))
    older = sorted(((known.serial, found) for found, known in whole if found != path), reverse=True)
    for _, found in older[keep - 1 :]:
        (found / MANIFEST).unlink()  # first of all, so that a kill leaves no checkpoint with missing files
        sync_directory(found)
    remove_leftovers(root)


def remove_leftovers(root: Path) -> None:
    """Remove files that attempts to save have left, but nothing that has another kind of name."""
    whole, unfinished = checkpoints(root)
    for path in (*whole, *unfinished):
        manifest = _readable(path) if path in whole else None
        if path in whole and manifest is None:
            continue  # its files may still be of use to someone
        named = {record.name for record in manifest.files} if manifest is not None else set()
        for file in path.iterdir():
            if file.name not in named and _OURS.fullmatch(file.name):
                file.unlink()
        if path in unfinished:
            with contextlib.suppress(OSError):  # of a directory that is not empty
                path.rmdir()


def _readable(path: Path) -> Optional[Manifest]:
    """Return the manifest of a checkpoint, or None if it is altered."""
    try:
        return read_manifest(path / MANIFEST)
    except CheckpointError:
        return None


def _steps(paths: list[Path]) -> str:
    return ", ".join(str(int(path.name[5:])) for path in paths) or "none"


def to_json(manifest: Manifest) -> list[Any]:
    """Return a manifest as nested lists of numbers and strings."""
    return [*manifest[:3], [list(record) for record in manifest.files]]


def from_json(values: list[Any]) -> Manifest:
    """Return the manifest that ``to_json`` has made lists of."""
    step, token, serial, files = values
    return Manifest(step, token, serial, [FileRecord(*record) for record in files])
