"""Methods of distributed optimizers: Horovod's contract, word for word, around any torch optimizer."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from typing import Any, Callable, Iterator, Optional

import torch
from torch.nn import Parameter

from hvd_compress import validation
from hvd_compress.comm.communicator import Communicator, is_elastic
from hvd_compress.engine import grad_scaler, replica_check
from hvd_compress.engine.agreement import Options, agree, description
from hvd_compress.engine.autograd_hooks import no_compile
from hvd_compress.engine.gradient_reducer import GradientReducer
from hvd_compress.engine.reducer import Reducer
from hvd_compress.engine.update_reducer import UpdateReducer
from hvd_compress.optimizer import arguments, checkpoint, elastic, messages
from hvd_compress.optimizer.consensus import Consensus
from hvd_compress.optimizer.copies import copied, ours_of
from hvd_compress.optimizer.saved_state import KEY
from hvd_compress.optimizer.scaled_step import ScaledStep
from hvd_compress.telemetry import Stats


class DistributedMethods(torch.optim.Optimizer):
    """Methods that ``DistributedOptimizer`` gives an optimizer besides those of its base, ``_hvd_base``.

    Attributes:
        check_replicas: compare the ranks' models every so many steps, and raise RuntimeError on all ranks at the first
            difference; 0: never. At first what HVD_COMPRESS_CHECK_REPLICAS says; must be the same on all ranks.
    """

    _hvd_base: Any
    # GradScaler then always calls step(), on every rank, and leaves it to us to skip: see ``ScaledStep``.
    _step_supports_amp_scaling = True

    def _setup(self, names: dict[Parameter, str], comm: Communicator, options: Options) -> None:
        grad_scaler.watch()
        self._parameter_names = names
        self.op, self.gradient_predivide_factor = options.reduction
        self.sparse_as_dense = options.sparse_as_dense
        self.process_set = comm.process_set
        self.check_replicas = replica_check.period(os.environ.get(replica_check.VARIABLE, ""))
        fused = bool(self.__dict__.pop("_step_supports_amp_scaling", False))
        self._synchronized, self._should_synchronize = False, True
        if comm.member and not is_elastic():
            agree(comm, description(self, options))
        if comm.member:
            options.algorithm.check(comm)
        kind = UpdateReducer if options.algorithm.exchanges_updates else GradientReducer
        self._reducer: Reducer = kind(self, names, comm, options)
        self._scaled_step = ScaledStep(self._reducer, fused)
        self._consensus = Consensus(self._reducer)
        self._checkpoint = checkpoint.OptimizerCheckpoint(self._reducer)
        self._elastic = elastic.ElasticResiduals(self._reducer)
        elastic.watch_commits()
        base_step = self._hvd_base.step
        # torch wraps step() to run step hooks; ours must see the exchanged gradients and the final
        # parameters, so it goes around the exchange, once, and the base's own wrapper is taken off.
        self._bare_step = getattr(base_step, "__wrapped__", base_step) if hasattr(base_step, "hooked") else base_step
        self._hooked_step = torch.optim.Optimizer.profile_hook_step(DistributedMethods._apply)

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes whose gradients are summed before the exchange."""
        return self._reducer.tracker.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change the number of backward passes per step; counting starts anew."""
        validation.integer("set_backward_passes_per_step", "passes", passes, 1)
        self._reducer.set_passes(passes)

    def synchronize(self) -> None:
        """Finish the exchange of gradients; the aggregate is then in ``p.grad`` of every rank.

        With LIEC it is this rank's own direction. Algorithms that exchange updates (DEF) exchange nothing here:
        gradients stay local, and clipping then acts on them. A missing gradient becomes zeros either way.

        What is remembered between steps changes only in ``step()``. If the gradients are thrown away instead
        (``zero_grad()``, or new ones take their place), everything is as if they had not been.
        """
        self._consensus.require_training("synchronize()")
        reducer = self._reducer
        # Once more without a step: only if there are new gradients, on any rank.
        if self._synchronized and not (reducer.comm.member and reducer.comm.any_rank(reducer.has_new_gradients())):
            return
        if reducer.comm.member:
            self._scaled_step.overflowed = reducer.synchronize()
        self._synchronized = True

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Context in which ``step()`` does not synchronize, for use after ``synchronize()``."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    @no_compile
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Take one optimization step on all ranks.

        Args:
            closure: reevaluates the model and returns the loss. Its gradients are exchanged each time it
                runs, and what it returns is averaged over ranks, so that optimizers that look at the loss
                decide alike everywhere. Algorithms that exchange updates (DEF) leave both local: the wrapped
                optimizer searches along this rank's own loss, and what it has subtracted in the end is exchanged.

        Raises:
            ValueError: if ``closure`` cannot be called.
            RuntimeError: inside ``consensus()``, or inside ``skip_synchronize()`` without a ``synchronize()`` before.
            FloatingPointError: on every rank, if a rank's gradient holds an infinity or nan and the algorithm has
                ``nonfinite="raise"``.
        """
        self._consensus.require_training("step()")
        reducer = self._reducer
        arguments.check_closure(closure)
        reducer.has_closure = closure is not None
        if closure is not None:
            closure = reducer.wrap_closure(closure)
        elif not self._should_synchronize:
            if reducer.tracker.counts_passes and not self._synchronized:
                raise RuntimeError(messages.SKIPPED_TOO_EARLY.format(rank=reducer.comm.rank))
        else:
            if self._synchronized and not reducer.has_new_gradients():
                warnings.warn(messages.STEP_AFTER_SYNCHRONIZE, stacklevel=2)
            self.synchronize()
        self._synchronized = False
        self._original._opt_called = True  # type: ignore[attr-defined]
        if self._scaled_step.skip() or reducer.skips_step:
            reducer.discard_step()
            return None
        return self._hooked_step(self, closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _apply(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        reducer, exchanges = self._reducer, self._reducer.step
        reducer.before_step()
        if reducer.skips_step:
            reducer.discard_step()
            return None
        loss = self._bare_step(self) if closure is None else self._bare_step(self, closure)
        reducer.after_step()
        due = bool(self.check_replicas) and reducer.step > exchanges and reducer.step % self.check_replicas == 0
        if due and reducer.comm.member:
            replica_check.check_replicas(reducer.comm, reducer.states, reducer.step)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do torch's ``zero_grad``; AssertionError between ``backward()`` and ``step()``/``synchronize()``."""
        if self._reducer.tracker.busy:
            raise AssertionError(messages.ZERO_GRAD_TOO_EARLY)
        if self._synchronized:
            self._reducer.discard_step()
            self._synchronized = False
        # Some optimizers' own zero_grad knows no argument.
        self._hvd_base.zero_grad(self, **({} if set_to_none else {"set_to_none": False}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Do torch's ``add_param_group``; parameters not in ``named_parameters`` are named by their position."""
        self._consensus.forbid("add_param_group()")
        self._hvd_base.add_param_group(self, param_group)
        index = len(self.param_groups) - 1
        added = self.param_groups[index]["params"]
        names = {parameter: f"allreduce.noname.{index}.{j}" for j, parameter in enumerate(added)}
        try:
            arguments.require_exchangeable(added, names)
        except ValueError:
            self.param_groups.pop()
            raise
        self._parameter_names.update({p: name for p, name in names.items() if p not in self._parameter_names})
        self._reducer.track()

    def consensus(self, point: str = "shared") -> Any:
        """Return a context in which the parameters are the model to evaluate or save (collective).

        Args:
            point: "shared", the model x, bitwise the same on every rank; or "virtual", x minus the updates
                that ranks have not sent yet (costs one dense allreduce; with ``LIEC``, whose x is the mean of
                local models, both do). Buffers, such as statistics of batch normalisation, are left alone.

        Raises:
            ValueError: for any other ``point``.
            RuntimeError: between ``backward()`` and ``step()`` (several ranks), inside another ``consensus()``, or for
                "virtual" where the residual holds gradients (EF, LIEC) of an optimizer whose update is not proportional
                to them (Adam).
        """
        return self._consensus.at(point)

    def flush(self) -> None:
        """Apply all residuals in one dense step; they are then zero on every rank (collective).

        What is pending for frozen parameters waits until they are trained again.

        Where the residual holds gradients (EF, LIEC) of an optimizer whose update is not proportional to them (Adam),
        that is a step of the optimizer with their mean; else the mean of the pending updates is subtracted.
        """
        self._consensus.flush()

    def adopt_parameters(self) -> None:
        """Make the parameters as they are the model, their mean where ranks differ; nothing stays pending (collective).

        For a script that has written into parameters between steps and means the result to be the model, whatever ranks
        have not sent yet. Without this call, what all ranks have written alike is the model's, pending updates still
        join it, and what each rank has written of its own counts as part of its next update.
        """
        self._consensus.adopt()

    def stats(self) -> Stats:
        """Return figures of the last exchange and in total, of this rank."""
        reducer = self._reducer
        size, nbytes = reducer.comm.size, [s.bucket.layout.total * s.bucket.dtype.itemsize for s in reducer.states]
        residuals = [r for r in (state.residual_vector() for state in reducer.states) if r is not None]
        norm = math.hypot(*(float(torch.linalg.vector_norm(residual)) for residual in residuals))
        coefficients = [s.coefficient for s in reducer.states if hasattr(s, "coefficient")]
        return reducer.recorder.snapshot(
            2 * (size - 1) / size * sum(nbytes), norm, coefficients[0] if coefficients else math.nan
        )

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under "hvd_compress" this rank's residual and the shared model."""
        state: dict[str, Any] = self._hvd_base.state_dict(self)
        return self._checkpoint.add_to_state(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return copied, (self._hvd_base.__getstate__(self), ours_of(self.state_dict()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict()`` of this rank; a plain torch state empties the residuals."""
        self._consensus.forbid("load_state_dict()")
        self._checkpoint.require_readable(state_dict)
        self._synchronized, self._should_synchronize, self._scaled_step.overflowed = False, True, False
        self._reducer.set_passes(self._reducer.tracker.passes)
        self._hvd_base.load_state_dict(self, self._checkpoint.to_torch_state(state_dict))
        self._checkpoint.load(state_dict.get(KEY))
