"""Points of the model that all ranks share: to evaluate, to save, to compare, and to settle debts at."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

from hvd_compress.algorithms.states import State, UpdateState
from hvd_compress.compressors.base import pieces
from hvd_compress.reducer import Reducer

POINTS = ("shared", "virtual")


class Consensus:
    """What an optimizer's ``consensus()``, ``flush()`` and replica check do."""

    def __init__(self, optimizer: torch.optim.Optimizer, reducer: Reducer) -> None:
        self._reducer = reducer
        self._optimizer = optimizer
        self._inside: Optional[str] = None

    def forbid(self, action: str) -> None:
        """Raise RuntimeError if the parameters are at a consensus point now."""
        if self._inside is not None:
            raise RuntimeError(
                f"{action} inside optimizer.consensus(point={self._inside!r}) (rank {self._reducer.link.rank}): the "
                "parameters are not the ones being trained; leave the context first"
            )

    def _enter_idle(self, action: str) -> None:
        self.forbid(action)
        if self._reducer.busy:
            raise RuntimeError(
                f"{action} between loss.backward() and optimizer.step() (rank {self._reducer.link.rank}): what ranks "
                "hold back is under way; call it after step()"
            )

    def _settle(self) -> None:
        # What is made here outlives an evaluation in inference mode, and training must be able to write to it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            with torch.no_grad():
                self._reducer.settle()

    @contextlib.contextmanager
    def at(self, point: str) -> Iterator[None]:
        """The parameters are at ``point`` inside, and bitwise where they were afterwards."""
        if point not in POINTS:
            raise ValueError(f"consensus: point={point!r} is not allowed; it must be 'shared' or 'virtual'")
        reducer = self._reducer
        if not reducer.link.member:
            yield
            return
        self._enter_idle("consensus()")
        self._settle()
        moved = [(state, target) for state in reducer.states if (target := self._target(state, point)) is not None]
        saved = [[p.detach().clone() for p in state.bucket.parameters] for state, _ in moved]
        try:
            for state, target in moved:
                state.put_parameters(target)
            self._inside = point
            yield
        finally:
            self._inside = None
            for (state, _), values in zip(moved, saved):
                torch._foreach_copy_([p.data for p in state.bucket.parameters], values)

    def _target(self, state: State, point: str) -> Optional[Tensor]:
        """The flat vector to put into a bucket's parameters at ``point``; None if they are there already."""
        link, recorder = self._reducer.link, self._reducer.recorder
        target = state.shared_point(link)
        lr = float(self._optimizer.param_groups[max(state.bucket.group, 0)].get("lr", 1.0))
        if point == "virtual" and (owed := state.owed(lr)) is not None:
            link.allreduce(owed, f"{state.bucket.name}.owed")
            target = (state.parameters_now() if target is None else target) - owed
        recorder.between_steps(link.sent)
        return target

    def flush(self) -> None:
        """Apply the mean of all residuals to the model and empty them."""
        reducer = self._reducer
        if not reducer.link.member:
            return
        self._enter_idle("flush()")
        self._settle()
        for state in reducer.states:
            if (target := self._target(state, "virtual")) is not None:
                state.restart(target)
        reducer.local_steps_done = 0
        reducer.stand()

    def mean_loss(self, loss: Any) -> Any:
        """What a closure returned, averaged over ranks."""
        link = self._reducer.link
        if not link.member or link.size == 1 or loss is None:
            return loss
        value = torch.as_tensor(loss).detach().to(torch.float64).reshape(()).clone()
        mean = link.allreduce(value, "loss")
        return mean.to(loss.dtype) if isinstance(loss, Tensor) else float(mean)

    def check_replicas(self) -> None:
        """Raise RuntimeError on every rank unless the shared model has the same bits everywhere (collective)."""
        link = self._reducer.link
        states = [state for state in self._reducer.states if state.replicated]
        rows = [_checksum(v) for state in states for v in _shared_values(state)]
        names = [name for state in states for name in state.bucket.layout.names]
        if not rows:
            return
        mine = torch.stack(rows).cpu()
        every = link.allgather(mine, "replicas").view(link.size, -1)
        different = (every != every[0]).any(dim=0).nonzero()
        if different.numel():
            name = names[int(different[0])]
            ranks = (every[:, int(different[0])] != every[0, int(different[0])]).nonzero().flatten().tolist()
            raise RuntimeError(
                f"replicas differ: after step {self._reducer.step} parameter {name!r} of the shared model is not the "
                f"same on rank 0 and on rank(s) {ranks} (seen by rank {link.rank}). Was a parameter written on some "
                "ranks only? Broadcast the parameters again, or restart from a checkpoint"
            )


def _shared_values(state: State) -> list[Tensor]:
    if isinstance(state, UpdateState):
        return list(pieces(state.shared.flat, state.bucket.layout.numels))
    return [p.data for p in state.bucket.parameters]


def _checksum(values: Tensor) -> Tensor:
    """64-bit sum of the bits of ``values``, weighted by position, so that order matters."""
    flat = values.contiguous().view(-1)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(width).to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2654435761 | 1
    return (bits * weights).sum()
