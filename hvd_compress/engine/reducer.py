"""The engine behind DistributedOptimizer: buckets, their states and the order of collectives, for one optimizer."""

from __future__ import annotations

import abc
import warnings
from typing import Any, Callable, Optional, Sequence, Union, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.base import State
from hvd_compress.comm.communicator import Communicator, Reduction, is_elastic
from hvd_compress.engine.agreement import Options, agree, parameter_item
from hvd_compress.engine.bucketing import Partition
from hvd_compress.engine.nonfinite import NonfiniteCheck
from hvd_compress.engine.step_check import (
    StepCheck,
    Verdict,
    different_methods_error,
    different_parameters_error,
    largest,
    number_of,
    ranks_joined_error,
)
from hvd_compress.engine.tracker import ParameterTracker
from hvd_compress.exchange import Context
from hvd_compress.telemetry import Recorder

STEP = "step()"  # as the methods that must be called on all ranks alike are named in messages


class Reducer(abc.ABC):
    """The part that exchanges of gradients and of updates share.

    A step of the optimizer calls ``synchronize`` (unless the script skips it), ``before_step``, the wrapped optimizer's
    own step, ``after_step``. Buckets are cut and buffers allocated at the first exchange, when it is known which
    gradients are sparse and where the model will stay.

    Args:
        optimizer: the distributed optimizer.
        names: names of its parameters.
        comm: collectives of its process set.
        options: its other arguments.

    Attributes:
        step: exchanges done so far, the same on every rank once a step's check has arrived.
        local_steps_done: steps of the wrapped optimizer since the last exchange; as ``step``.
        skips_step: whether the wrapped optimizer is not to step, on any rank, as a gradient is none.
        has_closure: whether the step has been given a closure, which runs inside of it.
        trainer: tells other optimizers over the same parameters whether these hold points of this one.
        on_build: called with the states of new buckets.
        on_sync: called before a step is checked, to take over what a broadcast has left.
        on_moved: called on every rank if one has another number than before, or has just come (elastic jobs), with this
            rank's former number of ranks, or None (collective).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Parameter, str], comm: Communicator, options: Options
    ) -> None:
        self.algorithm, self.comm, self.reduction = options.algorithm, comm, options.reduction
        self.recorder = Recorder(comm)
        self.tracker = ParameterTracker(optimizer, names, comm, options.passes)
        self.tracker.on_first, self.tracker.on_ready = self._on_first, self._on_ready
        context = Context(comm, self.exchanged_reduction, self._optimizer_state)
        self._partition = Partition(options.algorithm, context, options.groups, options.sparse_as_dense)
        self._check = StepCheck(comm)
        self._nonfinite = NonfiniteCheck(comm, self.recorder)
        self.skips_step = False
        self.has_closure = False
        self._verdict: Optional[Verdict] = None  # of this step's check, once it has arrived
        self._agreed = False
        self._built = False
        self.step = 0
        self.local_steps_done = 0
        self.trainer = self.tracker.trainer
        self.on_build: Callable[[Sequence[State]], None] = lambda states: None
        self.on_sync: Callable[[], None] = lambda: None
        self.on_moved: Callable[[Optional[int]], None] = lambda former: None
        self._place: Optional[tuple[int, int]] = None  # rank and number of ranks at the last step

    @property
    def optimizer(self) -> Any:
        """The distributed optimizer."""
        return self.tracker.optimizer

    @property
    def states(self) -> Sequence[State]:
        """The algorithm's states, one per bucket."""
        return self._partition.states

    @property
    def exchanged_reduction(self) -> Reduction:
        """Op and predivide factor of what is exchanged."""
        return self.reduction

    def _optimizer_state(self, parameter: Parameter) -> dict[str, Any]:
        return cast("dict[str, Any]", self.optimizer.state.get(parameter, {}))

    # -- what the optimizer calls ------------------------------------------------------------------------

    @abc.abstractmethod
    def synchronize(self) -> bool:
        """Make the gradients ready for the wrapped optimizer; return whether any rank's overflowed (GradScaler)."""

    @abc.abstractmethod
    def wrap_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``closure`` with what makes its gradients ready for the wrapped optimizer."""

    def before_step(self) -> None:  # noqa: B027
        """Prepare for a step of the wrapped optimizer, which is certain now."""

    def after_step(self) -> None:  # noqa: B027
        """Complete a step of the wrapped optimizer."""

    def discard_step(self) -> None:
        """Give up the step that has been synchronized: nothing that is remembered changes."""
        self.skips_step = False
        self.reset_pass_counts()

    def _refuse_nonfinite(self, what: str) -> None:
        """Give up a step for which a rank has an infinity or nan: leave it out, or raise, on all ranks (collective).

        Raises:
            FloatingPointError: if the algorithm asks for that, or if a closure runs inside the step already.
        """
        error = self._nonfinite.error(self.step, what)
        self.discard_step()
        if self.algorithm.nonfinite == "raise" or self.has_closure:
            raise error
        self.skips_step = True
        self.recorder.skipped += 1
        if self.recorder.skipped == 1:
            warnings.warn(f"hvd_compress: a step is left out on all ranks: {error}", stacklevel=2)

    def has_new_gradients(self) -> bool:
        """Return whether this rank has gradients that ``synchronize`` has not seen."""
        return self.tracker.fired

    def set_passes(self, passes: int) -> None:
        """Change the number of backward passes per step and count anew; a step that has begun is given up."""
        self._check.forget(wait=not is_elastic())
        self.tracker.passes = passes
        self.discard_step()

    def reset_pass_counts(self) -> None:
        """Count backward passes anew."""
        self.forget_agreement()
        self.tracker.reset()

    def reset_to_model(self) -> None:
        """Forget everything but the model: a state is to be loaded, which says everything else."""
        self.step = self.local_steps_done = 0
        for state in self.states:
            state.reset()

    def remember_parameters(self) -> None:  # noqa: B027
        """Note that a script may copy the parameters as they are, to put them back later."""

    def record_parameters(self) -> None:  # noqa: B027
        """Note the parameters as they are: the algorithm has placed them."""

    # -- gradients arrive --------------------------------------------------------------------------------

    def _on_first(self, parameter: Parameter) -> None:
        """Act on the first gradient of a step."""
        if self.tracker.counts_passes:
            self._launch_check()

    def _on_ready(self, parameter: Parameter) -> None:  # noqa: B027
        """Act on a gradient that is final."""

    # -- all ranks are at the same step ------------------------------------------------------------------

    def _launch_check(self, action: str = STEP) -> None:
        """Start to compare the step with other ranks' (collective), unless that has been done for this step.

        Args:
            action: the method that all ranks must be in.
        """
        if not (self._agreed or self._check.launched or self._verdict is not None):
            self._require_no_other()
            self.on_sync()
            self.tracker.notice_scaler()
            self.comm.phase = f"{action} after {self.step} exchanges"
            digest, written = self._step_digest(action), self._has_written()
            for state in self.states:
                state.set_inactive(self.tracker.inactive(state.bucket.parameters))
            before = self.comm.bytes_sent
            self._check.launch([digest], self.tracker.scaler is not None, self._has_moved(), written)
            self.recorder.exclude_bytes(before)

    def _has_moved(self) -> bool:
        """Return whether this rank has another number than at the last step, or takes over from others."""
        return is_elastic() and (self.step > 0 if self._place is None else self._place != self._place_now)

    @property
    def _place_now(self) -> tuple[int, int]:
        return self.comm.rank, self.comm.size

    def _require_no_other(self) -> None:
        """Raise ValueError, alike on every rank, if another optimizer has left points of its own in the parameters."""
        if (parameter := self.trainer.taken()) is not None:
            raise ValueError(
                f"DistributedOptimizer: another one trains parameter {self.tracker.names[parameter]!r} too, and has "
                f"left points in it that differ between ranks (this is rank {self.comm.rank}); call flush() of that "
                "optimizer before this one steps"
            )

    def _has_written(self) -> Union[bool, Tensor]:
        """Return whether a script has written into parameters since they were placed, if that matters."""
        return False

    @property
    def _scaled(self) -> bool:
        """True if a rank's gradients come from a GradScaler; all ranks agree on it."""
        return self._verdict is not None and self._verdict.scaled

    def _step_digest(self, action: str) -> int:
        """Return 63 bits that differ if the action, step, parameters, groups or what is frozen differ."""
        return number_of(repr((action, self.step, self.local_steps_done)).encode() + self.tracker.description())

    def _hear_check(self) -> bool:
        """Return whether ranks agree on this step, and none has to wait for overflows; never waits: a hook may ask."""
        if self._check.arrived:
            self._verdict = self._check.finish()
            self._agreed = all(self._verdict.equal) and self._allows(self._verdict)
        return self._agreed and not self._scaled and self._verdict is not None and not self._verdict.moved

    def _allows(self, verdict: Verdict) -> bool:
        return verdict.present == self.comm.size or self.algorithm.allreduce_only

    def agree_on_step(self, action: str = STEP) -> Verdict:
        """Wait for the step's check, and make the step common to all ranks (collective).

        Args:
            action: the method that all ranks must be in.

        Raises:
            ValueError: on every rank, if they have different parameters, or have frozen others.
            RuntimeError: on every rank, if they are in different methods, or if one has joined and the algorithm needs
                more than allreduces.
        """
        self._launch_check(action)
        verdict = self._check.finish() if self._verdict is None else self._verdict
        self._verdict = verdict
        if not self._allows(verdict):
            raise ranks_joined_error(self.comm.rank)
        if not all(verdict.equal):
            self._require_same_calls(verdict, action)
            self.step, self.local_steps_done = largest(self.comm, (self.step, self.local_steps_done))
            self._verdict = verdict._replace(equal=(True,))
        self._agreed = True
        return verdict

    def _require_same_calls(self, verdict: Verdict, action: str) -> None:
        """Raise the same error on every rank unless all are in one method, with the same parameters (collective)."""
        self._check.launch([number_of(self.tracker.description()), number_of(action.encode())])
        parameters, actions = self._check.finish().equal
        if not actions:
            self.forget_agreement()
            raise different_methods_error(self.comm.rank, action)
        if parameters:
            return
        if verdict.present == self.comm.size:
            agree(self.comm, [parameter_item(entry) for entry in self.tracker.entries()])
        raise different_parameters_error(self.comm.rank)

    def forget_agreement(self) -> None:
        """Let the next step be checked anew: ranks have agreed for something that was no step."""
        self._agreed, self._verdict = False, None

    # -- buckets -----------------------------------------------------------------------------------------

    def track(self) -> None:
        """Register hooks on new and unfrozen parameters; they get buckets at the next exchange."""
        if self.tracker.track():
            self._built = False

    def build(self) -> None:
        """Cut buckets for tracked parameters that have none and allocate the algorithm's buffers."""
        if self._built or not self.comm.member:
            return
        new = self._partition.extend(self.tracker.tracked_entries())
        self._built = True
        self.recorder.exclude_bytes()  # what ranks had to agree on first was for no exchange
        if new:
            self.on_build(new)

    def sync_buckets(self, action: str = STEP) -> None:
        """Bring buckets up to date with parameters that were added, loaded or broadcast since the last step.

        Args:
            action: the method that all ranks must be in.
        """
        self.track()
        verdict = self.agree_on_step(action)
        self.build()
        if verdict.moved:
            self._verdict = verdict._replace(moved=False)
            before, former = self.comm.bytes_sent, self._place
            self.on_moved(None if former is None else former[1])
            self.recorder.exclude_bytes(before)
        self._place = self._place_now
