"""The engine behind DistributedOptimizer: watches gradients arrive, cuts buckets, drives the algorithm."""

from __future__ import annotations

import weakref
from typing import Any, Callable, Iterator, Optional, Sequence, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.algorithms.bucket_state import GradientState, State, UpdateState
from hvd_compress.bucket import ParamEntry
from hvd_compress.comm.communicator import Average, Communicator, is_elastic
from hvd_compress.engine import agreement, refusals, sparse
from hvd_compress.engine import grad_scaler as amp
from hvd_compress.engine import join_check as presence
from hvd_compress.engine.autograd_hooks import no_compile, weak_hook
from hvd_compress.engine.bucketing import Groups, Partition
from hvd_compress.engine.learning_rate import Rates, learning_rate, rate_of
from hvd_compress.engine.step_check import Rewrites
from hvd_compress.exchange import Context, Reduction
from hvd_compress.telemetry import Recorder


class Reducer:
    """Readiness of gradients, buckets and their states, for one optimizer.

    Buckets are cut and buffers allocated at the first exchange, when it is known which gradients are
    sparse and the model is where it will stay.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[Parameter, str],
        algorithm: Algorithm,
        comm: Communicator,
        reduction: Reduction,
        passes: int,
        groups: Groups,
        sparse_as_dense: bool,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)  # which has this: it must not take a collector to let it go
        self.names, self.algorithm, self.comm, self.reduction = names, algorithm, comm, reduction
        self.recorder = Recorder()
        # Updates are averaged whatever the op: with Sum the gradients have been multiplied before.
        exchanged = Reduction(Average, reduction.predivide) if algorithm.exchanges_updates else reduction
        context = Context(comm, exchanged, self.recorder, self._state_of)
        self._partition = Partition(algorithm, context, groups, sparse_as_dense)
        self.step = 0
        self.local_steps_done = 0
        self.passes = passes
        self.tracked: list[Parameter] = []
        self.on_build: Callable[[Sequence[State]], None] = lambda states: None
        self.on_settle: Callable[[], None] = lambda: None
        self.scaler: Optional[Any] = None  # the last GradScaler seen
        self.scaled = False  # whether this step's gradients came from it
        self.newcomers: set[Parameter] = set()  # added since ranks agreed on their parameters
        self.fired = False
        self._stepping = False  # a closure's backward passes run inside the step
        self._built = False
        self._delay: dict[Parameter, int] = {}
        self._rates = Rates()
        self._rewrites = Rewrites(comm, self.recorder)
        self._roll = presence.JoinCheck(comm)
        self._calls_roll = algorithm.gathers and not algorithm.exchanges_updates
        self._ready: list[int] = []
        self._started: list[int] = []
        # One rank needs no hooks to exchange, only to see loss scaling; passes are not counted then.
        self._counts_passes = comm.member and (comm.size > 1 or is_elastic())
        self.track()
        self.newcomers.clear()

    @property
    def optimizer(self) -> Any:
        """The optimizer whose gradients these are; what belongs to it holds this, not the optimizer itself."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def states(self) -> list[State]:
        """One per bucket."""
        return self._partition.states

    # -- parameters ------------------------------------------------------------------------------------

    def _optimizer_parameters(self) -> Iterator[tuple[int, Parameter]]:
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                yield index, parameter

    def track(self) -> None:
        """Register hooks for parameters that require a gradient and have none yet (new or unfrozen)."""
        if not self.comm.member:
            return
        for _, parameter in self._optimizer_parameters():
            if parameter.requires_grad and parameter not in self._delay:
                self._delay[parameter] = self.passes
                self.tracked.append(parameter)
                self.newcomers.add(parameter)
                parameter.register_post_accumulate_grad_hook(weak_hook(self._on_gradient))
                self._built = False

    def set_passes(self, passes: int) -> None:
        """Change the number of backward passes per step and start counting anew; a step begun is given up."""
        if self.fired:
            states = [state for state in self.states if isinstance(state, GradientState)]
            # Buckets under way need their names and buffers again, and peers may have launched others (after a
            # failure in an elastic job nothing answers any more).
            if self._started and not is_elastic():
                for index in range(len(states)):
                    if index not in self._started:
                        self._start(index)
                for state in states:
                    state.drain()
            for state in states:
                state.discard_step()
        self.passes = passes
        self._reset()
        self._rewrites.forget()

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._optimizer() is None:
            return  # dropped, and not yet collected: the model has been given to another one
        p = cast(Parameter, parameter)
        if not self.fired:
            self.fired = True
            self.scaled = amp.running_scaler() is not None
            if self._built and self.local_steps_done == 0 and not self._stepping:
                self._rewrites.look(self._updates())
            if self._calls_roll:
                self._roll.launch()
        if self.scaled:
            self.scaler = amp.running_scaler()
        if not self._counts_passes:
            return
        if self._delay[p] <= 0:
            raise refusals.too_many_passes(self.names[p], self.comm.rank, self.passes)
        self._delay[p] -= 1
        if cast(Tensor, p.grad).requires_grad:
            raise refusals.graph_wanted(self.names[p], self.comm.rank)
        home = self._partition.home.get(p)
        # Under loss scaling nothing may leave before all ranks know that none of them has overflowed.
        if self._delay[p] or home is None or not self._built or self.scaled:
            return
        state = self.states[home]
        if not isinstance(state, GradientState):
            return
        if (rate := self._rates.early(home, self.optimizer, state, self._scaler_now())) is None:
            return
        self._ready[home] += 1
        gradient = cast(Tensor, p.grad)
        # With several passes a refused extra one must still find the sum in p.grad.
        if self.passes == 1 and not gradient.is_sparse:
            target = state.accumulate_grad(self._partition.place[p], gradient, rate)
            if target is not None and target is not gradient:
                p.grad = target
        if self._ready[home] == len(state.bucket.parameters):
            self._start(home)

    @property
    def busy(self) -> bool:
        """True from the first gradient of a step to its ``synchronize()`` or ``step()``."""
        return self.fired and self._counts_passes

    def _reset(self) -> None:
        self._roll.close_step()
        self.fired = self._stepping = False
        self._started = []
        self._ready = [0] * len(self.states)
        for p in self._delay:
            self._delay[p] = self.passes

    # -- buckets ---------------------------------------------------------------------------------------

    def build(self) -> None:
        """Cut buckets for tracked parameters that have none and allocate the algorithm's buffers."""
        if self._built or not self.comm.member:
            return
        new = self._partition.extend(
            ParamEntry(p, self.names[p], index) for index, p in self._optimizer_parameters() if p in self._delay
        )
        self._ready = [0] * len(self.states)
        self._built = True
        self.recorder.between_steps(self.comm.sent)  # what ranks had to agree on first was for no exchange
        if new:
            self.on_build(new)

    def _state_of(self, parameter: Parameter) -> dict[str, Any]:
        return cast("dict[str, Any]", self.optimizer.state.get(parameter, {}))

    def settle(self) -> None:
        """Make buckets, and what they hold, agree with what was loaded or broadcast since the last step."""
        self.track()
        if self.newcomers and not is_elastic():
            new = [(self.names[p], p, index) for index, p in self._optimizer_parameters() if p in self.newcomers]
            agreement.agree(self.comm, [agreement.parameter_item(*item) for item in new])
            self.newcomers.clear()
        self.build()
        self.on_settle()
        if self.local_steps_done == 0:
            self._rewrites.heed(self._updates(), first=self.step == 0, needs_all=self.algorithm.gathers)

    def _updates(self) -> list[UpdateState]:
        return [state for state in self.states if isinstance(state, UpdateState)]

    # -- gradients -------------------------------------------------------------------------------------

    def _scaler_now(self) -> Optional[Any]:
        """The GradScaler of this step's gradients; a rank without any goes by the last step that had some."""
        return None if self.fired and not self.scaled else self.scaler

    @no_compile
    def _start(self, index: int) -> None:
        if self._calls_roll:
            self._roll.check()
        state = cast(GradientState, self.states[index])
        gradients = [
            p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad for p in state.bucket.parameters
        ]
        state.start(self.step, gradients, rate_of(self.optimizer, state, self._scaler_now()))
        self._started.append(index)

    @no_compile
    @torch.no_grad()
    def synchronize(self) -> bool:
        """Exchange gradients and leave the aggregate in ``p.grad``.

        Returns:
            True if a rank's scaled gradients overflowed: then nothing was exchanged, no residual was
            touched, and every rank has an infinity in its gradients, for its GradScaler to find.
        """
        self.settle()
        if self.scaler is not None and self.comm.any_rank(amp.overflowed(self.tracked)):
            amp.poison(self.tracked)
            self._reset()
            return True
        self._rates.check(self.optimizer, self.states)
        try:
            for index in range(len(self.states)):
                if index not in self._started:
                    self._start(index)
            names = [self.names[p] for p in self._partition.sparse]
            waits = sparse.launch(self.comm, self._partition.sparse, names, self.reduction.op)
            # In one order on every rank, whatever the order of hooks: later rounds are launched here.
            order = sorted(self._started)
            for index in order:
                self.states[index].next_round()
            for index in order:
                self._deliver(cast(GradientState, self.states[index]))
            for parameter, wait in zip(self._partition.sparse, waits):
                result = wait()
                if parameter.grad is not None or self._counts_passes:
                    parameter.grad = result
        except BaseException:
            for state in self.states:  # no step came of what they have taken in
                cast(GradientState, state).discard_step()
            raise
        finally:
            # Also after a failed collective: an elastic job goes on from here.
            self._reset()
        self.step += 1
        self.recorder.close_step(self.comm.sent)
        return False

    def _deliver(self, state: GradientState) -> None:
        for parameter, result in zip(state.bucket.parameters, state.finish()):
            if parameter.grad is None and not self._counts_passes and not state.has_residual:
                continue  # one rank: as the wrapped optimizer alone would see it
            if parameter.grad is not None and parameter.grad.is_sparse:
                result = result.to_sparse(1)
            if parameter.grad is not result:
                parameter.grad = result

    # -- updates ---------------------------------------------------------------------------------------

    def before_update(self) -> None:
        """The wrapped optimizer is about to step: make sure the states stand where the parameters are."""
        self.settle()
        self._stepping = True
        for state in self.states:
            state.bucket.ensure_params_in(cast(UpdateState, state).local)

    def exchange_updates(self) -> None:
        """The wrapped optimizer has stepped: exchange what it subtracted, if it is time to."""
        self._reset()
        self.local_steps_done += 1
        states = self._updates()
        for state in states:  # the step may have given a parameter new storage: p.data = ...
            state.bucket.ensure_params_in(state.local)
        if self.local_steps_done < self.algorithm.local_steps:
            for state in states:
                state.underway = True
            return
        self.local_steps_done = 0
        for state in states:
            state.start(self.step, learning_rate(self.optimizer, state.bucket))
        for state in states:
            state.next_round()
        for state in states:
            state.finish()
        self.step += 1
        self.recorder.close_step(self.comm.sent)
        self.stand()

    def stand(self) -> None:
        """The parameters stand where the algorithm wants them now."""
        self._rewrites.remember(self._updates())

    def close_pass(self) -> None:
        """A closure has run inside the step, and may run again."""
        self._reset()
        self._stepping = True

    def drop_pass_counts(self) -> None:
        """Nothing was exchanged: count backward passes anew."""
        self._reset()
