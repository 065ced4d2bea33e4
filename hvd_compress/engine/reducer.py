"""The engine behind DistributedOptimizer: buckets, their states and the order of collectives, for one optimizer."""

from __future__ import annotations

import abc
from typing import Any, Callable, Sequence, cast

import torch
from torch.nn import Parameter

from hvd_compress.algorithms.base import State
from hvd_compress.comm.communicator import Communicator, Reduction, is_elastic
from hvd_compress.engine.agreement import Options, agree, parameter_item
from hvd_compress.engine.bucketing import Partition
from hvd_compress.engine.step_check import StepCheck
from hvd_compress.engine.tracker import ParameterTracker
from hvd_compress.exchange import Context
from hvd_compress.telemetry import Recorder


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
        step: exchanges done so far, the same on every rank.
        local_steps_done: steps of the wrapped optimizer since the last exchange.
        on_build: called with the states of new buckets.
        on_sync: called before each exchange, to take over what a broadcast has left.
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
        self._built = False
        self.step = 0
        self.local_steps_done = 0
        self.on_build: Callable[[Sequence[State]], None] = lambda states: None
        self.on_sync: Callable[[], None] = lambda: None

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
        """Prepare for a step of the wrapped optimizer."""

    def after_step(self) -> None:  # noqa: B027
        """Complete a step of the wrapped optimizer."""

    def set_passes(self, passes: int) -> None:
        """Change the number of backward passes per step and count anew; a step that has begun is given up."""
        self.tracker.passes = passes
        self.reset_pass_counts()
        self._check.forget()

    def reset_pass_counts(self) -> None:
        """Count backward passes anew."""
        self._check.close_step()
        self.tracker.reset()

    def record_parameters(self) -> None:  # noqa: B027
        """Note the parameters as they are: the algorithm has placed them."""

    # -- gradients arrive --------------------------------------------------------------------------------

    @abc.abstractmethod
    def _on_first(self) -> None:
        """Act on the first gradient of a step."""

    def _on_ready(self, parameter: Parameter) -> None:  # noqa: B027
        """Act on a gradient that is final."""

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

    def sync_buckets(self) -> None:
        """Bring buckets up to date with parameters that were added, loaded or broadcast since the last step."""
        self.track()
        newcomers = self.tracker.newcomers
        if newcomers and not is_elastic():
            new = [entry for entry in self.tracker.entries() if entry.parameter in newcomers]
            agree(self.comm, [parameter_item(entry) for entry in new])
            newcomers.clear()
        self.build()
        self.on_sync()
