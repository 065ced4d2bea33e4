"""Points of the model that all ranks share: to evaluate, to save, to compare, and to settle debts at."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional, cast

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import GradientState, State, UpdateState
from hvd_compress.compressors.base import pieces
from hvd_compress.engine.learning_rate import group_of, learning_rate, scale_free
from hvd_compress.engine.reducer import Reducer

POINTS = ("shared", "virtual")


class Consensus:
    """What an optimizer's ``consensus()``, ``flush()`` and replica check do."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._inside: Optional[str] = None
        self.outside: dict[int, list[Tensor]] = {}  # parameters as they are trained, while a context is open, by bucket

    def forbid(self, action: str) -> None:
        """Raise RuntimeError if the parameters are at a consensus point now."""
        if self._inside is not None:
            raise RuntimeError(
                f"{action} inside optimizer.consensus(point={self._inside!r}) (rank {self._reducer.comm.rank}): the "
                "parameters are not the ones being trained; leave the context first"
            )

    def _enter_idle(self, action: str) -> None:
        self.forbid(action)
        if self._reducer.busy:
            raise RuntimeError(
                f"{action} between loss.backward() and optimizer.step() (rank {self._reducer.comm.rank}): what ranks "
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
        if not reducer.comm.member:
            yield
            return
        self._enter_idle("consensus()")
        self._settle()
        if point == "virtual" and (owing := self._owing_gradients()):
            name, kind = owing[0].bucket.layout.names[0], type(reducer.optimizer).__name__
            raise RuntimeError(
                f"consensus(point='virtual') (rank {reducer.comm.rank}, parameter {name!r}): gradients are held back, "
                f"and what {kind} makes of them is known only when it steps with them; use point='shared', or an "
                "algorithm that holds back updates (DEF)"
            )
        moved = [(state, target) for state in reducer.states if (target := self._target(state, point)) is not None]
        saved = [[p.detach().clone() for p in state.bucket.parameters] for state, _ in moved]
        self.outside.update((id(state), values) for (state, _), values in zip(moved, saved))
        try:
            for state, target in moved:
                state.put_parameters(target)
            self._inside = point
            yield
        finally:
            self._inside = None
            self.outside.clear()
            for (state, _), values in zip(moved, saved):
                torch._foreach_copy_([p.data for p in state.bucket.parameters], values)

    def _target(self, state: State, point: str) -> Optional[Tensor]:
        """The flat vector to put into a bucket's parameters at ``point``; None if they are there already."""
        comm, recorder = self._reducer.comm, self._reducer.recorder
        target = state.shared_point(comm)
        optimizer = self._reducer.optimizer
        if point == "virtual" and (owed := state.owed(learning_rate(optimizer, state.bucket))) is not None:
            if isinstance(state, GradientState) and group_of(optimizer, state.bucket).get("maximize"):
                owed.neg_()
            comm.allreduce(owed, f"{state.bucket.name}.owed")
            target = (state.parameters_now() if target is None else target) - owed
        recorder.between_steps(comm.sent)
        return target

    def _owing_gradients(self) -> list[GradientState]:
        """States that hold back what only the wrapped optimizer can make an update of."""
        optimizer = self._reducer.optimizer
        if not scale_free(optimizer) or isinstance(optimizer, torch.optim.LBFGS):  # which steps with a closure only
            return []
        return [state for state in self._reducer.states if isinstance(state, GradientState) and state.has_residual]

    def flush(self) -> None:
        """Apply the mean of all residuals to the model and empty them."""
        reducer = self._reducer
        if not reducer.comm.member:
            return
        self._enter_idle("flush()")
        self._settle()
        stepping = self._owing_gradients()
        for state in reducer.states:
            if state not in stepping and (target := self._target(state, "virtual")) is not None:
                state.restart(target)
        if stepping:
            self._step_with_debts(stepping)
        reducer.local_steps_done = 0
        reducer.stand()

    @torch.no_grad()
    def _step_with_debts(self, states: list[GradientState]) -> None:
        """One step of the wrapped optimizer with the mean of what is held back as its gradients."""
        comm, optimizer = self._reducer.comm, self._reducer.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            debts = [cast(Tensor, state.debt()) for state in states]
            for state, debt in zip(states, debts):
                comm.allreduce(debt, f"{state.bucket.name}.owed")
            points = [state.shared_point(comm) for state in states]
            # Nothing has changed yet, should a peer have failed.
            for state, debt, point in zip(states, debts, points):
                self._put(state, point)
                if bool(debt.any()):
                    gradients = state.bucket.flat_buffer(state.bucket.dtype, debt.to(state.bucket.dtype)).views
                    for p, gradient in zip(state.bucket.parameters, gradients):
                        p.grad = gradient.to_sparse(1) if isinstance(optimizer, torch.optim.SparseAdam) else gradient
            optimizer._bare_step(optimizer)
            for state in states:
                state.forgive()
            for state in states:  # local models have momenta of their own
                self._put(state, state.shared_point(comm))
        finally:
            for p, gradient in zip(parameters, before):
                p.grad = gradient
        self._reducer.recorder.between_steps(comm.sent)

    @staticmethod
    def _put(state: State, point: Optional[Tensor]) -> None:
        if point is not None:
            state.put_parameters(point)

    def mean_loss(self, loss: Any) -> Any:
        """What a closure returned, averaged over ranks if it is a number."""
        comm = self._reducer.comm
        number = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, (int, float))
        if not comm.member or comm.size == 1 or not number:
            return loss
        value = torch.as_tensor(loss).detach().to(torch.float64).reshape(()).clone()
        mean = comm.allreduce(value, "loss")
        return mean.to(loss.dtype) if isinstance(loss, Tensor) else float(mean)

    def check_replicas(self) -> None:
        """Raise RuntimeError on every rank unless the shared model has the same bits everywhere (collective)."""
        comm = self._reducer.comm
        states = [state for state in self._reducer.states if state.replicated]
        rows = [_checksum(v) for state in states for v in _shared_values(state)]
        names = [name for state in states for name in state.bucket.layout.names]
        if not rows:
            return
        mine = torch.stack(rows).cpu()
        every = comm.allgather(mine, "replicas").view(comm.size, -1)
        different = (every != every[0]).any(dim=0).nonzero()
        if different.numel():
            name = names[int(different[0])]
            ranks = (every[:, int(different[0])] != every[0, int(different[0])]).nonzero().flatten().tolist()
            raise RuntimeError(
                f"replicas differ: after step {self._reducer.step} parameter {name!r} of the shared model is not the "
                f"same on rank 0 and on rank(s) {ranks} (seen by rank {comm.rank}). Was a parameter written on some "
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
