"""Training in which something happens to the last rank, at a phase of the fifth step.

``python -m tests.faults.scenarios EXCHANGE PHASE FAULT DIRECTORY`` is one rank of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Optional

import horovod.torch as hvd
import torch
import torch._dynamo  # which torch imports in the first step: a long time, if ranks share a core

from hvd_compress import DEF, EF, LIEC, CountSketch, DistEF, GlobalSketch, GlobalTopK, RandomBlock, TopK
from tests.multirank.support.internals import before_next_round
from tests.multirank.support.networks import loss_of, network
from tests.multirank.support.training import wrap

EXCHANGES = {
    "allreduce": EF(RandomBlock(density=0.25)),
    "allgather": EF(TopK(0.25)),
    "servers": DistEF(),
    "local-models": LIEC(averaging_period=3),
    "sketch": GlobalSketch(CountSketch(columns=8, rows=3)),
    "updates": DEF(RandomBlock(density=0.25)),
}
TREES = {"tree of sketches": GlobalSketch(CountSketch(columns=8, rows=3), "tree"), "tree of top-k": GlobalTopK(0.25)}
# Where it happens, with the method that the other ranks are in.
PHASES = {
    "forward": "step()",
    "backward": "step()",
    "synchronize": "step()",
    "exchange": "step()",
    "optimizer": "step()",
    "consensus": "consensus('virtual')",
    "flush": "flush()",
}
FAULTS = ("raise", "kill", "stop")
STEP = 4  # the first is number 0


class Fault:
    """Something that happens to the last rank, at one phase.

    Args:
        phase: a key of ``PHASES``.
        kind: one of ``FAULTS``, or "unlink": its network interface goes down.
        directory: gets a file "fault" at that moment.
    """

    def __init__(self, phase: str, kind: str, directory: str) -> None:
        self._phase, self._kind, self._file = phase, kind, Path(directory, "fault")
        self.step = -1

    def at(self, phase: str) -> None:
        """Let it happen, if this is the phase."""
        if (phase, self.step) != (self._phase, STEP) or hvd.rank() != hvd.size() - 1:
            return
        self._file.touch()
        if self._kind == "raise":
            raise RuntimeError("this rank gives up")
        if self._kind == "unlink":
            subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
        else:
            os.kill(os.getpid(), signal.SIGSTOP if self._kind == "stop" else signal.SIGKILL)


def train(exchange: str, phase: str, kind: str, directory: str) -> None:
    """Train for eight steps, if nothing happens; before the fault every rank saves a checkpoint."""
    torch.set_num_threads(1)
    fault = Fault(phase, kind, directory)

    class SGD(torch.optim.SGD):
        """SGD whose step may fail."""

        def step(self, closure: Optional[Callable[[], float]] = None) -> Any:
            fault.at("optimizer")
            return super().step(closure)

    model = network()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.1), {**EXCHANGES, **TREES}[exchange])
    model[0].weight.register_hook(lambda gradient: fault.at("backward"))
    for step in range(8):
        fault.step = step
        optimizer.zero_grad()
        fault.at("forward")
        loss = loss_of(model, hvd.rank(), step)
        loss.backward()
        fault.at("synchronize")
        optimizer.step()
        if step == 0:
            before_next_round(optimizer, lambda: fault.at("exchange"))
        if step == STEP - 1:
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(checkpoint, Path(directory, f"checkpoint.{hvd.rank()}"))
        if step == STEP:
            fault.at("consensus")
            if phase == "consensus":
                with optimizer.consensus("virtual"):
                    pass
            fault.at("flush")
            if phase == "flush":
                optimizer.flush()
    print("trained to the end", flush=True)


if __name__ == "__main__":
    hvd.init()
    train(*sys.argv[1:])
