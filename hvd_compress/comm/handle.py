"""A collective that has been launched: waited for, within a time limit, with errors that say what it was."""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import Any, Callable, Optional, Protocol

import horovod.torch as hvd

HorovodInternalError = hvd.HorovodInternalError

TOO_LATE = (
    "no answer from another rank within {seconds:g} seconds (HVD_COMPRESS_TIMEOUT_SECONDS): it has stopped, is far "
    "slower, or is not in this method"
)


class Waiter(Protocol):
    """The part of a communicator that a handle needs."""

    time_limit: float

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time spent inside as waiting."""

    def explaining(self, what: str) -> AbstractContextManager[None]:
        """Add what is known to the message of an error."""


def uses_mpi() -> bool:
    """Return True if this job's Horovod communicates by MPI, so that mpi4py can be used beside it."""
    return bool(hvd.mpi_enabled())


def time_limit() -> float:
    """Return the seconds that a rank waits for a collective: HVD_COMPRESS_TIMEOUT_SECONDS, or infinity.

    Raises:
        ValueError: if the variable is no number > 0.
    """
    text = os.environ.get("HVD_COMPRESS_TIMEOUT_SECONDS", "")
    try:
        seconds = float(text or "inf")
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"HVD_COMPRESS_TIMEOUT_SECONDS={text!r} is not allowed; it must be a number of seconds > 0")
    return seconds


def sleep_until(done: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Wait until ``done()``, leaving the processor to others; return False if it is not in ``seconds``.

    Horovod's and MPI's own calls spin, which slows down ranks that share a core and Horovod's own thread.
    """
    pause, latest = 2e-5, time.monotonic() + seconds
    while not done():
        if time.monotonic() > latest:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 2e-4)
    return True


def _leave() -> None:
    """End this process: Horovod's own end would wait in MPI, without a limit, for the rank that has stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def wait_in_time(done: Callable[[], bool], comm: Waiter, what: str) -> None:
    """Wait until ``done()``, counting the time.

    Args:
        done: returns whether a collective or message is complete.
        comm: has the time limit.
        what: the collective or message, for the error.

    Raises:
        HorovodInternalError: if that takes longer than the time limit.
    """
    with comm.waiting(), comm.explaining(what):
        if not sleep_until(done, comm.time_limit):
            if uses_mpi():
                atexit.register(_leave)
            raise HorovodInternalError(TOO_LATE.format(seconds=comm.time_limit))


class Handle:
    """A collective that has been launched; in-place collectives also put the result into their tensor.

    Args:
        handle: Horovod's handle; None if the result is there already.
        result: what ``wait`` returns in that case.
        comm: the communicator that counts the seconds waited.
        what: the collective, for messages.
    """

    def __init__(
        self, handle: Optional[int] = None, result: Any = None, comm: Optional[Waiter] = None, what: str = ""
    ) -> None:
        self._handle, self._result, self._comm, self._what = handle, result, comm, what

    def done(self) -> bool:
        """Return True if ``wait`` would return at once."""
        return self._handle is None or bool(hvd.poll(self._handle))

    def wait(self) -> Any:
        """Block until the collective is done, leaving the processor to others, and return its result.

        Raises:
            HorovodInternalError: if a peer has failed, has called ``hvd.join()`` and this is no allreduce, or has not
                come within the time limit.
        """
        if self._handle is None or self._comm is None:
            return self._result
        handle, self._handle = self._handle, None
        wait_in_time(lambda: bool(hvd.poll(handle)), self._comm, self._what)
        with self._comm.explaining(self._what):
            self._result = hvd.synchronize(handle)
        return self._result
