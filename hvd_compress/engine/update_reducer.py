"""The engine of algorithms that exchange updates: the wrapped optimizer steps first, in ``step()``."""

from __future__ import annotations

from typing import Any, Callable, Sequence, cast

import torch
from torch.nn import Parameter

from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Average, Communicator, Reduction
from hvd_compress.engine import local_gradients
from hvd_compress.engine.agreement import Options
from hvd_compress.engine.learning_rate import learning_rate
from hvd_compress.engine.reducer import Reducer


class UpdateReducer(Reducer):
    """Exchanges what the wrapped optimizer has subtracted from the parameters; gradients stay local."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Parameter, str], comm: Communicator, options: Options
    ) -> None:
        super().__init__(optimizer, names, comm, options)
        self._stepping = False  # a closure's backward passes run inside the step

    @property
    def states(self) -> Sequence[UpdateState]:
        """The algorithm's states, one per bucket."""
        return cast("Sequence[UpdateState]", self._partition.states)

    @property
    def exchanged_reduction(self) -> Reduction:
        """The mean, whatever the op: with Sum the gradients have been multiplied before the step."""
        return Reduction(Average, self.reduction.predivide)

    def _on_first(self) -> None:
        if self._built and self.states and self.local_steps_done == 0 and not self._stepping:
            self._ensure_params()
            self._check.launch_check(self._points)

    @property
    def _points(self) -> list[FlatBuffer]:
        """This rank's own points, bucket by bucket: what the parameters hold."""
        return [state.points.local for state in self.states]

    def _ensure_params(self) -> None:
        """Move parameters back into the flat vectors if a script has given one other memory (``p.data = ...``)."""
        for state in self.states:
            state.bucket.ensure_params_in(state.points.local)

    def synchronize(self) -> bool:
        """Complete the local gradients; nothing is exchanged."""
        self.reset_pass_counts()
        local_gradients.prepare(self.optimizer, self.tracker.tracked, self.comm, self.reduction)
        return False

    def wrap_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure whose local gradients are complete and clipped each time it runs; its loss stays local."""

        def completed_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            if self.comm.member:
                local_gradients.prepare(self.optimizer, self.tracker.tracked, self.comm, self.reduction)
                self._clip()
                self._end_closure_pass()
            return loss

        return completed_closure

    def _end_closure_pass(self) -> None:
        """Expect that the closure, which has run inside the step, may run again."""
        self.reset_pass_counts()
        self._stepping = True

    def reset_pass_counts(self) -> None:
        super().reset_pass_counts()
        self._stepping = False

    def _clip(self) -> None:
        local_gradients.clip(self.tracker.tracked, self.algorithm.clip_norm, self.comm, self.reduction)

    def before_step(self) -> None:
        """Bring bucket states up to date with the parameters."""
        if not self.comm.member:
            return
        self.sync_buckets()
        self._stepping = True
        self._clip()

    def sync_buckets(self) -> None:
        super().sync_buckets()
        self._ensure_params()
        if self.local_steps_done == 0 and self.states:
            self._adopt_overwritten()

    def _adopt_overwritten(self) -> None:
        """Adopt as shared model the parameters that every rank has overwritten with equal values."""
        self._check.launch_check(self._points)
        before = self.comm.bytes_sent
        overwritten = self._check.overwritten(self._points, first=self.step == 0)
        self.recorder.exclude_bytes(before)
        if not self.algorithm.allreduce_only:
            self._check.raise_if_joined()
        if overwritten is not None:
            for state, flags in zip(self.states, overwritten):
                state.points.adopt_overwritten(flags, alone=self.comm.size == 1)
            self.record_parameters()

    def record_parameters(self) -> None:
        self._check.record_parameters(self._points)

    def after_step(self) -> None:
        """Exchange what the wrapped optimizer has subtracted, if it is time to."""
        if not self.comm.member:
            return
        self.reset_pass_counts()
        self.local_steps_done += 1
        self._ensure_params()  # the step may have given a parameter other memory
        if self.local_steps_done < self.algorithm.local_steps:
            for state in self.states:
                state.has_unsent_local_steps = True
            return
        self.local_steps_done = 0
        with self.recorder.timing("encode_seconds"):
            for state in self.states:
                state.start(self.step, learning_rate(self.optimizer, state.bucket))
            for state in self.states:
                state.next_round()
        with self.recorder.timing("decode_seconds"):
            for state in self.states:
                state.finish()
        self.step += 1
        self.recorder.close_step()
        self.record_parameters()
