"""Waiting for collectives without taking the processor from other ranks."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any

from horovod.torch import mpi_ops

from hvd_compress.comm.handle import sleep_until


def wait_without_spinning() -> None:
    """Let Horovod's own blocking calls sleep until their collective is done.

    They spin, and where there are more ranks than cores each of them then keeps the others, and Horovod's threads, from
    what it waits for. Tests use such calls for comparisons; the package does not.
    """
    spinning = mpi_ops.synchronize

    def synchronize(handle: Any) -> Any:
        sleep_until(lambda: bool(mpi_ops.poll(handle)))
        return spinning(handle)

    for name, module in list(sys.modules.items()):
        if name.startswith("horovod.torch") and getattr(module, "synchronize", None) is spinning:
            module.synchronize = synchronize  # type: ignore[attr-defined]


def yield_to_other_ranks() -> None:
    """Let the other threads of this process, which are Horovod's and Gloo's, use what time the processors have left.

    Gloo's spins from when a message arrives until this rank begins the collective that it is for, and, where there are
    more ranks than cores, takes their time from the ranks that are still computing.
    """
    if sys.platform == "linux":
        for thread in map(int, os.listdir("/proc/self/task")):
            if thread != threading.get_native_id():
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended; a container forbids it
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
