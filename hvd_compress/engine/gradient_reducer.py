"""The engine of algorithms that exchange gradients: in backward as buckets fill, or in ``synchronize()``."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.comm.communicator import Communicator, is_elastic
from hvd_compress.engine import grad_scaler, sparse
from hvd_compress.engine.agreement import Options
from hvd_compress.engine.autograd_hooks import no_compile
from hvd_compress.engine.learning_rate import RatesInBackward, rate_of
from hvd_compress.engine.nonfinite import Flags, any_set, flags_of, look_at
from hvd_compress.engine.reducer import Reducer
from hvd_compress.finite import poison


class GradientReducer(Reducer):
    """Exchanges gradients and leaves the aggregate in ``p.grad`` before the wrapped optimizer steps."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Parameter, str], comm: Communicator, options: Options
    ) -> None:
        super().__init__(optimizer, names, comm, options)
        self._rates = RatesInBackward()
        self._ready: list[int] = []  # of each bucket, the number of its gradients that are final
        self._complete: list[int] = []  # buckets that only wait for the step's check
        self._started: set[int] = set()
        # What p.grad was given by an exchange that no step has used yet, and the versions of its content.
        self._left: dict[Parameter, Tensor] = {}
        self._versions: dict[Parameter, int] = {}
        self._exchanged = False

    @property
    def states(self) -> Sequence[GradientState]:
        """The algorithm's states, one per bucket."""
        return cast("Sequence[GradientState]", self._partition.states)

    # -- during backward ---------------------------------------------------------------------------------

    def _on_first(self, parameter: Parameter) -> None:
        self._end_unused_step(parameter)
        super()._on_first(parameter)

    def _on_ready(self, parameter: Parameter) -> None:
        index = self._partition.home.get(parameter)
        if index is None or not self._built:
            return
        state = self.states[index]
        rate = self._rates.rate_in_backward(index, self.optimizer, state, self.tracker.scaler_now)
        if rate is None:
            return
        self._ready[index] += 1
        gradient = cast(Tensor, parameter.grad)
        # With several passes a refused extra one must still find the sum in p.grad.
        if self.tracker.passes == 1 and not gradient.is_sparse:
            target = state.accumulate_grad(self._partition.place[parameter], gradient, rate)
            if target is not None and target is not gradient:
                parameter.grad = target
        if self._ready[index] == len(state.bucket.parameters):
            self._complete.append(index)
        if self._complete and self._hear_check():
            for complete in self._complete:
                self._start(complete)
            self._complete = []

    @no_compile
    def _start(self, index: int) -> None:
        state = self.states[index]
        gradients = [
            p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad for p in state.bucket.parameters
        ]
        with self.recorder.timing("encode_seconds"):
            state.start(self.step, gradients, rate_of(self.optimizer, state.bucket, self.tracker.scaler_now))
            if not state.has_residual and self.algorithm.nonfinite != "propagate":
                state.nonfinite = look_at(gradients, state.bucket.device)
        self._started.add(index)

    # -- in synchronize() --------------------------------------------------------------------------------

    @no_compile
    @torch.no_grad()
    def synchronize(self) -> bool:
        """Exchange gradients and leave the aggregate in ``p.grad``.

        Returns:
            True if a rank's scaled gradients overflowed: then nothing was exchanged, no residual was
            touched, and every rank has an infinity in its gradients, for its GradScaler to find.
        """
        self._end_unused_step()
        self.skips_step = False
        self.sync_buckets()
        tracked = self.tracker.tracked
        if self._scaled and self.comm.any_rank(grad_scaler.overflowed(tracked)):
            grad_scaler.poison(tracked)
            self.reset_pass_counts()
            return True
        self._rates.note_step_rate(self.optimizer, self.states)
        try:
            self._exchange()
        except BaseException:
            for state in self.states:
                state.discard_step()
            raise
        finally:
            # Also after a failed collective: an elastic job goes on from here.
            self.reset_pass_counts()
        self._exchanged = True
        self._act_on_nonfinite()  # may write into the results
        self._versions = {parameter: result._version for parameter, result in self._left.items()}
        return False

    def _launch_nonfinite(self) -> None:
        """Tell other ranks of infinities and nan in this rank's gradients, if anything depends on that (collective)."""
        flags = [flags_of(state) for state in self.states] if any(s.nonfinite is not None for s in self.states) else []
        if self._partition.sparse and self.algorithm.nonfinite != "propagate":
            names = [self.tracker.names[p] for p in self._partition.sparse]
            flags.append(
                Flags(names, look_at([p.grad for p in self._partition.sparse], self._partition.sparse[0].device))
            )
        self._nonfinite.launch(flags)

    def _act_on_nonfinite(self) -> None:
        """Let every rank see the infinities and nan that any has found in its gradients: see ``Algorithm.nonfinite``.

        Raises:
            FloatingPointError: on every rank, if the algorithm asks for that.
        """
        counts = self._nonfinite.finish()
        if self.algorithm.nonfinite == "propagate":
            for state, flags in zip(self.states, counts):
                found = [i for i, p in enumerate(state.bucket.parameters) if p.grad is not None]
                gradients = [cast(Tensor, state.bucket.parameters[i].grad) for i in found]
                values = [g._values() if g.is_sparse else g for g in gradients]
                poison(values, flags if len(found) == len(flags) else flags[found])
        elif any_set(counts):
            self._refuse_nonfinite("gradient")

    def _exchange(self) -> None:
        for index in range(len(self.states)):
            if index not in self._started:
                self._start(index)
        self._launch_nonfinite()
        names = [self.tracker.names[p] for p in self._partition.sparse]
        waits = sparse.launch(self.comm, self._partition.sparse, names, self.reduction.op)
        # Later rounds are launched here, in one order on every rank, whatever the order of hooks.
        with self.recorder.timing("encode_seconds"):
            for state in self.states:
                state.next_round()
        with self.recorder.timing("decode_seconds"):
            for state in self.states:
                self._write_gradients(state)
        for parameter, wait in zip(self._partition.sparse, waits):
            result = wait()
            if parameter.grad is not None or self.tracker.counts_passes:
                parameter.grad = result
                self._left[parameter] = result

    def _write_gradients(self, state: GradientState) -> None:
        for index, (parameter, result) in enumerate(zip(state.bucket.parameters, state.finish())):
            if index in state.inactive:
                continue
            if parameter.grad is None and not self.tracker.counts_passes and not state.has_residual:
                continue  # one rank: as the wrapped optimizer alone would see it
            if parameter.grad is not None and parameter.grad.is_sparse:
                result = result.to_sparse(1)
            if parameter.grad is not result:
                state.bucket.require_unconverted(parameter, state.bucket.layout.names[index])
                parameter.grad = result
            self._left[parameter] = result

    def wrap_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure whose gradients are exchanged and whose loss is averaged each time it runs."""

        def synchronized_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            if self.comm.member:
                self.synchronize()
                self.before_step()
            return self._mean_loss(loss)

        return synchronized_closure

    def _mean_loss(self, loss: Any) -> Any:
        """Return the mean over ranks of what a closure returned if it is a number, so that line searches agree."""
        number = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, (int, float))
        if not self.comm.member or self.comm.size == 1 or not number:
            return loss
        value = torch.as_tensor(loss).detach().to(torch.float64).reshape(()).clone()
        mean = self.comm.allreduce(value, "loss")
        return mean.to(loss.dtype) if isinstance(loss, Tensor) else float(mean)

    # -- the step is taken, or given up --------------------------------------------------------------------

    def before_step(self) -> None:
        """Let what the exchange has changed count: the wrapped optimizer is about to step with its results."""
        if self._exchanged:
            for state in self.states:
                state.commit()
            self._end_exchange()
            self.step += 1
            self.trainer.apart = self.algorithm.local_models
            self.recorder.close_step()

    def discard_step(self) -> None:
        self._discard_exchange()
        super().discard_step()

    def _discard_exchange(self) -> None:
        for state in self.states:
            state.discard_step()
        self._end_exchange()

    def _end_exchange(self) -> None:
        self._exchanged = False
        self._left.clear()
        self._versions.clear()

    def _end_unused_step(self, parameter: Optional[Parameter] = None) -> None:
        """Take or give up an exchange that no step has followed, as new gradients have arrived.

        If they were added to its results, which are still in p.grad, these are used, and count. If p.grad was zeroed or
        replaced, they were thrown away.

        Args:
            parameter: the one with the first new gradient; None if this rank has none.
        """
        if not self._exchanged:
            return
        if parameter is None:
            used = any(p.grad is left for p, left in self._left.items())
        else:
            left = self._left.get(parameter)
            used = left is not None and parameter.grad is left and left._version == self._versions[parameter] + 1
        if used:
            self.before_step()
        else:
            self._discard_exchange()

    def has_new_gradients(self) -> bool:
        """Return whether this rank has gradients that no exchange has seen, also such as were not made by backward."""
        return self.tracker.fired or any(
            p.grad is not None and p.grad is not self._left.get(p) for p in self.tracker.tracked
        )

    # -- bookkeeping -------------------------------------------------------------------------------------

    def set_passes(self, passes: int) -> None:
        # Buckets that were started need their names and buffers again, and peers may have started others, or none.
        # After a failure in an elastic job no peer answers any more.
        begun = self._check.launched or self._verdict is not None
        if begun and not is_elastic() and self.comm.any_rank(bool(self._started)):
            for index in range(len(self.states)):
                if index not in self._started:
                    self._start(index)
            for state in self.states:
                state.drain()
        super().set_passes(passes)

    def reset_pass_counts(self) -> None:
        super().reset_pass_counts()
        self._rates.forget()
        self._started, self._complete = set(), []
        self._ready = [0] * len(self.states)

    def build(self) -> None:
        super().build()
        self._ready += [0] * (len(self.states) - len(self._ready))
