"""Waiting for collectives without taking the processor from other ranks."""

from __future__ import annotations

import sys
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
