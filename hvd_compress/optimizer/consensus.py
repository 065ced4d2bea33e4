"""Points of the model that all ranks share, to evaluate or save there; and the flush of all residuals."""

from __future__ import annotations

import contextlib
from typing import Iterator, Optional, cast

import torch
from torch import Tensor

from hvd_compress.algorithms.base import State
from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.engine.learning_rate import group_of, learning_rate, scale_free
from hvd_compress.engine.reducer import Reducer

POINTS = ("shared", "virtual")


@contextlib.contextmanager
def _writable_tensors() -> Iterator[None]:
    """Make tensors that Horovod and training can write to, also where an evaluation has turned on inference mode."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        yield


class Consensus:
    """The implementation of an optimizer's ``consensus()`` and ``flush()``."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._inside: Optional[str] = None

    def forbid(self, action: str) -> None:
        """Raise RuntimeError if the parameters are at a consensus point now."""
        if self._inside is not None:
            raise RuntimeError(
                f"{action} inside optimizer.consensus(point={self._inside!r}) (rank {self._reducer.comm.rank}): the "
                "parameters are not the ones being trained; leave the context first"
            )

    def require_training(self, action: str) -> None:
        """Raise RuntimeError if nothing can be trained now, before a bucket that another rank has sent waits for it."""
        self.forbid(action)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{action} in torch.inference_mode() (rank {self._reducer.comm.rank}), where no tensor that is trained "
                "can be written: leave it first, or use torch.no_grad() instead"
            )

    def _require_idle(self, action: str) -> None:
        self.forbid(action)
        if self._reducer.tracker.busy:
            raise RuntimeError(
                f"{action} between loss.backward() and optimizer.step() (rank {self._reducer.comm.rank}): an exchange "
                "has begun; call it after step()"
            )

    @torch.no_grad()
    def _sync_buckets(self, action: str) -> None:
        self._reducer.sync_buckets(action)
        self._reducer.forget_agreement()

    @contextlib.contextmanager
    def at(self, point: str) -> Iterator[None]:
        """Put the parameters at ``point`` inside, and bitwise back where they were afterwards."""
        if point not in POINTS:
            raise ValueError(f"consensus: point={point!r} is not allowed; it must be 'shared' or 'virtual'")
        reducer = self._reducer
        if not reducer.comm.member:
            yield
            return
        self._require_idle("consensus()")
        moved = self._prepare(point)
        try:
            for state, target in moved:
                state.bucket.write_params(target)
            self._inside = point
            reducer.remember_parameters()
            yield
        finally:
            self._inside = None
            for state, _ in moved:
                values, state.training_parameters = state.training_parameters, None
                torch._foreach_copy_([p.data for p in state.bucket.parameters], cast("list[Tensor]", values))

    @_writable_tensors()
    def _prepare(self, point: str) -> list[tuple[State, Tensor]]:
        """Return the buckets whose parameters are not at ``point``, with the vector to put there; keep what they are.

        Raises:
            RuntimeError: if the virtual iterate isn't known before the wrapped optimizer steps with the residual.
        """
        reducer = self._reducer
        self._sync_buckets(f"consensus({point!r})")
        if point == "virtual" and (pending := self._with_pending_gradients()):
            name, kind = pending[0].bucket.layout.names[0], type(reducer.optimizer).__name__
            raise RuntimeError(
                f"consensus(point='virtual') (rank {reducer.comm.rank}, parameter {name!r}): the residual holds "
                f"gradients, and the update that {kind} makes of them is known only when it steps with them; use "
                "point='shared', or an algorithm whose residual holds updates (DEF)"
            )
        moved = [(state, target) for state in reducer.states if (target := self._target(state, point)) is not None]
        for state, _ in moved:
            state.training_parameters = [p.detach().clone() for p in state.bucket.parameters]
        return moved

    def _target(self, state: State, point: str) -> Optional[Tensor]:
        """Return the flat vector to put into a bucket's parameters at ``point``; None if they are there already."""
        comm, optimizer = self._reducer.comm, self._reducer.optimizer
        target = state.shared_point(comm)
        if point == "virtual":
            pending = state.pending_update(learning_rate(optimizer, state.bucket))
            if pending is not None:
                if isinstance(state, GradientState) and group_of(optimizer, state.bucket).get("maximize"):
                    pending.neg_()
                comm.allreduce(pending, f"{state.bucket.name}.pending")
                target = (state.bucket.copy_of_params() if target is None else target) - pending
        self._reducer.recorder.exclude_bytes()
        return target

    def _with_pending_gradients(self) -> list[GradientState]:
        """Return states whose residual holds gradients that only the wrapped optimizer can make an update of."""
        optimizer = self._reducer.optimizer
        if not scale_free(optimizer) or isinstance(optimizer, torch.optim.LBFGS):  # which steps with a closure only
            return []
        return [state for state in self._reducer.states if isinstance(state, GradientState) and state.has_residual]

    @_writable_tensors()
    def flush(self) -> None:
        """Apply the mean of all residuals to the model and empty them."""
        reducer = self._reducer
        if not reducer.comm.member:
            return
        self._require_idle("flush()")
        self._sync_buckets("flush()")
        stepping = self._with_pending_gradients()
        for state in reducer.states:
            if state not in stepping and (target := self._target(state, "virtual")) is not None:
                state.reset_to(target)
        if stepping:
            self._step_with_pending(stepping)
        reducer.local_steps_done = 0
        reducer.trainer.apart = False
        reducer.record_parameters()

    @_writable_tensors()
    @torch.no_grad()
    def adopt(self) -> None:
        """Make the parameters as they are the model, their mean where ranks differ, with nothing pending."""
        reducer = self._reducer
        if not reducer.comm.member:
            return
        self._require_idle("adopt_parameters()")
        self._sync_buckets("adopt_parameters()")
        for state in reducer.states:
            parameters = state.bucket.copy_of_params()
            state.reset_to(reducer.comm.mean(parameters, f"{state.bucket.name}.adopted", reducer.comm.size))
        reducer.local_steps_done = 0
        reducer.trainer.apart = False
        reducer.record_parameters()
        reducer.recorder.exclude_bytes()

    @torch.no_grad()
    def _step_with_pending(self, states: list[GradientState]) -> None:
        """Do one step of the wrapped optimizer with the mean of the residuals as its gradients."""
        comm, optimizer = self._reducer.comm, self._reducer.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            pending = [cast(Tensor, state.pending_gradient()) for state in states]
            for state, values in zip(states, pending):
                comm.allreduce(values, f"{state.bucket.name}.pending")
            points = [state.shared_point(comm) for state in states]
            # Nothing has changed yet, should a peer have failed.
            for state, values, point in zip(states, pending, points):
                _write(state, point)
                if bool(values.any()):
                    gradients = state.bucket.flat_buffer(state.bucket.dtype, values.to(state.bucket.dtype)).views
                    for i, (p, gradient) in enumerate(zip(state.bucket.parameters, gradients)):
                        if i not in state.inactive:
                            sparse = isinstance(optimizer, torch.optim.SparseAdam)
                            p.grad = gradient.to_sparse(1) if sparse else gradient
            optimizer._bare_step(optimizer)
            for state in states:
                state.clear_residual()
            for state in states:  # local models have momenta of their own
                _write(state, state.shared_point(comm))
        finally:
            for p, gradient in zip(parameters, before):
                p.grad = gradient
        self._reducer.recorder.exclude_bytes()


def _write(state: State, point: Optional[Tensor]) -> None:
    if point is not None:
        state.bucket.write_params(point, state.inactive)
