"""The engine of algorithms that exchange updates: the wrapped optimizer steps first, in ``step()``."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Callable, Sequence, Union, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Average, Communicator, Reduction
from hvd_compress.engine import local_gradients
from hvd_compress.engine.agreement import Options
from hvd_compress.engine.learning_rate import learning_rate
from hvd_compress.engine.nonfinite import Flags, any_set, flags_of, look_at
from hvd_compress.engine.overwritten import Overwritten
from hvd_compress.engine.reducer import STEP, Reducer

_DIFFERENT_AT_FIRST = (
    "hvd_compress: at the first step parameters differ between ranks (this is rank {rank}); call "
    "hvd.broadcast_parameters(model.state_dict(), root_rank=0) before training"
)
_OWN_VALUES = (
    "hvd_compress: between two steps each rank has written values of its own into {count} parameter(s), the first "
    "{name!r} (this is rank {rank}); they count as a part of its next update. If they are to be the model, call "
    "optimizer.adopt_parameters() after writing them"
)


class UpdateReducer(Reducer):
    """Exchanges what the wrapped optimizer has subtracted from the parameters; gradients stay local."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Parameter, str], comm: Communicator, options: Options
    ) -> None:
        super().__init__(optimizer, names, comm, options)
        self._overwritten = Overwritten(comm)
        self._warned = False
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

    def _has_written(self) -> Union[bool, Tensor]:
        return self._overwritten.any_written(self._points)

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
        self.tracker.notice_scaler()
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
        if self._refuses_gradients():
            return
        self._stepping = True
        self._clip()

    def _refuses_gradients(self) -> bool:
        """Return whether this step is left out as a rank's gradient is none; the ranks' momenta must not see it.

        Gradients of a closure come later, and not equally often on all ranks: what they make of the update counts.
        """
        if self.algorithm.nonfinite == "propagate" or self.has_closure:
            return False
        buckets = [state.bucket for state in self.states]
        self._nonfinite.launch(
            [
                Flags(bucket.layout.names, look_at([p.grad for p in bucket.parameters], bucket.device))
                for bucket in buckets
            ]
        )
        if any_set(self._nonfinite.finish()):
            self._refuse_nonfinite("gradient")
        return self.skips_step

    def sync_buckets(self, action: str = STEP) -> None:
        self._ensure_params()
        super().sync_buckets(action)
        assert self._verdict is not None
        if self.states and self._verdict.written:
            verdict, self._verdict = self._verdict, self._verdict._replace(written=False)
            before = self.comm.bytes_sent
            self._adopt_overwritten(verdict.present)
            self.recorder.exclude_bytes(before)
            self.record_parameters()

    def _adopt_overwritten(self, present: int) -> None:
        """Let what a script has written into parameters count, by the rule of ``overwritten``."""
        known, first = self._overwritten.recorded, self.step == 0
        placed = [
            None if index >= known or state.has_unsent_local_steps else state.points.expected_local()
            for index, state in enumerate(self.states)
        ]
        written = self._overwritten.find(self._points, placed, present, self.step)
        if written.rolled_back:
            for state in self.states:
                state.reset_to(self.mean_parameters(state, present))
            return
        for state, alike in zip(self.states, written.alike):
            state.points.adopt_overwritten(alike, alone=self.comm.size == 1)
        names = [name for state in self.states for name in state.bucket.layout.names]
        own = [name for name, flag in zip(names, itertools.chain(*written.differing)) if flag]
        if own and (first or not self._warned):
            self._warned = self._warned or not first
            message = _DIFFERENT_AT_FIRST if first else _OWN_VALUES
            warnings.warn(message.format(name=own[0], count=len(own), rank=self.comm.rank), stacklevel=6)

    def mean_parameters(self, state: UpdateState, present: int) -> Tensor:
        """Return the mean over ranks of a bucket's parameters as they are, flat (collective)."""
        return self.comm.mean(state.bucket.copy_of_params(), f"{state.bucket.name}.parameters", present)

    def reset_to_model(self) -> None:
        """Forget everything but the model, which is what a script has written into parameters, else the shared one."""
        self.step = self.local_steps_done = 0
        self._ensure_params()
        for state, changed in zip(self.states, self._overwritten.flags(self._points)):
            state.reset_to_model(bool(changed))
        self._overwritten.forget()
        self.record_parameters()

    def remember_parameters(self) -> None:
        """Note that a script may copy the parameters as they are, to put them back later."""
        self._overwritten.remember(self._points, self.step)

    def record_parameters(self) -> None:
        self._overwritten.record(self._points, self.step)

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
            self.trainer.apart = True
            self.record_parameters()
            return
        self.local_steps_done = 0
        with self.recorder.timing("encode_seconds"):
            for state in self.states:
                state.start(self.step, learning_rate(self.optimizer, state.bucket))
            self._nonfinite.launch([flags_of(state) for state in self.states])
            for state in self.states:
                state.next_round()
        with self.recorder.timing("decode_seconds"):
            for state in self.states:
                state.finish()
        self._act_on_nonfinite()
        self.step += 1
        self.trainer.apart = any(state.is_apart for state in self.states)
        self.recorder.close_step()
        self.record_parameters()

    def _act_on_nonfinite(self) -> None:
        """Let every rank see in the model that an update was none, on whichever rank.

        Raises:
            FloatingPointError: on every rank, if the algorithm does not propagate it.
        """
        counts = self._nonfinite.finish()
        for state, flags in zip(self.states, counts):
            state.poison(flags)
        if self.algorithm.nonfinite != "propagate" and any_set(counts):
            raise self._nonfinite.error(self.step, "update")
