"""A checkpoint written by a thread while training goes on; ranks hear of one another through files, not collectives.

Horovod orders collectives by when each rank asks for them, so a thread's must not come between those of training.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch

from hvd_compress.checkpoint import directory
from hvd_compress.checkpoint.directory import MANIFEST, Manifest
from hvd_compress.checkpoint.files import CheckpointError, FileRecord, Place, written_at_once
from hvd_compress.checkpoint.together import described


class PendingSave:
    """The handle of a checkpoint that is being written in the background.

    The process does not end before the writing has: its thread is no daemon.

    Attributes:
        path: directory of the checkpoint.
    """

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        self.path = path
        self._error: Optional[Exception] = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="hvd_compress.checkpoint", daemon=False)
        self._thread.start()

    def done(self) -> bool:
        """Return True if ``wait`` would return or raise at once."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Block until the checkpoint is whole and return its path; not collective.

        Raises:
            CheckpointError: on every rank if it could not be written on any; the message names the rank.
        """
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(str(self._error)) from self._error
        return self.path

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
            # A script may never call wait(), and the next save, which raises this too, may never come.
            warnings.warn(f"hvd_compress: the checkpoint {self.path} was not written: {error}", stacklevel=2)


_last: weakref.WeakKeyDictionary[torch.optim.Optimizer, PendingSave] = weakref.WeakKeyDictionary()


def remember(optimizer: torch.optim.Optimizer, pending: PendingSave) -> None:
    """Note the last save of an optimizer."""
    _last[optimizer] = pending


def finish_last(optimizer: torch.optim.Optimizer) -> None:
    """Wait for the last save of an optimizer; raise its error once."""
    pending = _last.pop(optimizer, None)
    if pending is not None:
        pending.wait()


class FileAgreement:
    """The agreement of all ranks through files that their file was written, in the checkpoint's directory.

    Args:
        root: directory of checkpoints.
        place: place of this rank's file.
        keep: number of whole checkpoints to keep.
        timeout: seconds to wait for other ranks.
    """

    def __init__(self, root: Path, place: Place, keep: int, timeout: float) -> None:
        self._root, self._place, self._keep, self._timeout = root, place, keep, timeout
        self._path = directory.step_directory(root, place.step)

    def conclude(self, write: Callable[[], FileRecord]) -> None:
        """Write this rank's file, and make the checkpoint whole once all ranks have written theirs.

        Raises:
            CheckpointError: on every rank if one has failed, or has not been heard of for ``timeout`` seconds.
        """
        note: dict[str, Any] = {}
        try:
            note["record"] = list(write())
        except Exception as error:
            note["error"] = [type(error).__name__, str(error)]
        self._note(self._note_of(self._place.rank), note)
        if self._place.rank == 0:
            self._publish()
        else:
            self._await_first_rank()

    def _publish(self) -> None:
        """Write ``checkpoint.json`` on rank 0, or else a note that says what has failed."""
        try:
            deadline = time.monotonic() + self._timeout
            notes = [self._await(rank, deadline) for rank in range(self._place.ranks)]
            failures = [(rank, *note["error"]) for rank, note in enumerate(notes) if "error" in note]
            if failures:
                raise CheckpointError(f"{self._path} was not written: {described(failures)}")
            files = [FileRecord(*note["record"]) for note in notes]
            directory.publish(self._root, Manifest(self._place.step, self._place.token, 0, files), self._keep)
        except Exception as error:
            self._note(self._failed, {"error": str(error)})
            raise

    def _await_first_rank(self) -> None:
        """Wait until rank 0 has made the checkpoint whole."""
        deadline = time.monotonic() + self._timeout + 60.0  # rank 0 may itself wait for as long
        for _ in _until(deadline):
            if (self._path / MANIFEST).exists():
                manifest = directory.read_manifest(self._path / MANIFEST)
                if manifest.token == self._place.token:
                    return
            if self._failed.exists():
                raise CheckpointError(json.loads(self._failed.read_text())["error"])
        raise CheckpointError(f"{self._path}: nothing was heard of rank 0 (rank {self._place.rank})")

    def _await(self, rank: int, deadline: float) -> Any:
        """Return the content of a rank's note."""
        path = self._note_of(rank)
        for _ in _until(deadline):
            if path.exists():
                return json.loads(path.read_text())
        raise CheckpointError(
            f"{self._path} was not written: nothing was heard of rank {rank} for {self._timeout:g} seconds. If it is "
            "slow, give save() a larger timeout=; has it died, or is the directory not on a file "
            "system that all ranks share?"
        )

    def _note(self, path: Path, content: Any) -> None:
        with written_at_once(path) as file:
            file.write(json.dumps(content).encode())

    def _note_of(self, rank: int) -> Path:
        name = self._place._replace(rank=rank).name
        return self._path / name.replace(".safetensors", ".json")

    @property
    def _failed(self) -> Path:
        return self._path / f"failed.{self._place.token}.json"


def _until(deadline: float) -> Iterator[None]:
    """Yield once at least, and then again and again, ever more seldom, until ``deadline``."""
    pause = 0.005
    yield
    while time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
        yield
