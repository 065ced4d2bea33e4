"""The engine of algorithms that exchange updates: the wrapped optimizer steps first, in ``step()``."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Average, Communicator, Reduction
from hvd_compress.engine import local_gradients
from hvd_compress.engine.agreement import Options
from hvd_compress.engine.learning_rate import learning_rate
from hvd_compress.engine.overwritten import Overwritten
from hvd_compress.engine.reducer import Reducer


class UpdateReducer(Reducer):
    """Exchanges what the wrapped optimizer has subtracted from the parameters; gradients stay local."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Parameter, str], comm: Communicator, options: Options
    ) -> None:
        super().__init__(optimizer, names, comm, options)
        self._overwritten = Overwritten(comm)
        self._stepping = False  # a closure's backward passes run inside the step

    @property
    def states(self) -> Sequence[UpdateState]:
        """The algorithm's states, one per bucket."""
        return cast("Sequence[UpdateState]", self._partition.states)

    @property
    def exchanged_reduction(self) -> Reduction:
        """The mean, whatever the op: with Sum the gradients have been multiplied before the step."""
        return Reduction(Average, self.reduction.predivide)

    def _on_first(self, parameter: Parameter) -> None:
        if not self._stepping:
            self._ensure_params()
            super()._on_first(parameter)

    def _overwrite_flags(self) -> Optional[Tensor]:
        return self._overwritten.flags(self._points)

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
        known = len(self.states)
        self._ensure_params()
        super().sync_buckets()
        if self.states:
            self._adopt_overwritten(known)

    def _adopt_overwritten(self, known: int) -> None:
        """Adopt as shared model the parameters that every rank has overwritten with equal values.

        Args:
            known: number of buckets that the step's check has looked at; later ones are new.
        """
        assert self._verdict is not None
        verdict, before = self._verdict, self.comm.bytes_sent
        self._verdict = verdict._replace(changes=[])
        new = self._points[known:]
        if new and self.step == 0:
            self._overwritten.warn_if_ranks_differ(new, verdict.present)
        alike = self._overwritten.alike(self._points[:known], verdict.changes, verdict.present)
        self.recorder.exclude_bytes(before)
        if alike is not None:
            for state, flags in zip(self.states, alike):
                state.points.adopt_overwritten(flags, alone=self.comm.size == 1)
        if new or alike is not None:
            self.record_parameters()

    def reset_to_model(self) -> None:
        """Leave nothing pending; the model is what a script has written into parameters, else the shared one."""
        self._ensure_params()
        changed = iter(self._overwritten.flags(self._points).tolist())
        for state in self.states:
            state.reset_to_model([bool(view.numel()) and next(changed) > 0 for view in state.points.local.views])
        self.record_parameters()

    def record_parameters(self) -> None:
        self._overwritten.record(self._points)

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
            self.record_parameters()
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
