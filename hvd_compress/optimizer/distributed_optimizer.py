"""DistributedOptimizer: Horovod's contract, word for word, around any torch optimizer."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
from torch.nn import Parameter

from hvd_compress import validation
from hvd_compress.algorithms import Algorithm, Dense
from hvd_compress.comm import communicator as collectives
from hvd_compress.comm.communicator import Adasum, Average, Communicator, Compression, global_process_set
from hvd_compress.compressors import Cast
from hvd_compress.engine import agreement, local_gradients
from hvd_compress.engine import grad_scaler as amp
from hvd_compress.engine.autograd_hooks import no_compile
from hvd_compress.engine.bucketing import Groups
from hvd_compress.engine.reducer import Reducer
from hvd_compress.exchange import Reduction
from hvd_compress.optimizer import arguments
from hvd_compress.optimizer import checkpoint as residuals
from hvd_compress.optimizer import state_init as initialising
from hvd_compress.optimizer.consensus import Consensus
from hvd_compress.optimizer.scaled_step import ScaledStep
from hvd_compress.telemetry import Stats

_STEP_AFTER_SYNCHRONIZE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). This can "
    "cause training slowdown. You may want to consider using optimizer.skip_synchronize() context if you use "
    "optimizer.synchronize() in your code."
)
_ZERO_GRAD_TOO_EARLY = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
    "This is prohibited as it can cause a race condition."
)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Optional[Iterable[tuple[str, Parameter]]] = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups = None,
    sparse_as_dense: bool = False,
    process_set: Any = global_process_set,
) -> Any:
    """Wrap a torch optimizer so that ``step()`` trains data-parallel, with compressed communication.

    Takes the arguments of ``horovod.torch.DistributedOptimizer`` in its order and behaves as it does, save
    for ``compression``. Building it is a collective operation: the ranks check that they agree.

    Args:
        optimizer: the optimizer to wrap; parameter groups and state are shared with it.
        named_parameters: (name, parameter) pairs, usually ``model.named_parameters()``.
        compression: an algorithm (``Dense``, ``EF``, ``DEF``, ``DistEF``, ``LIEC``, ``GlobalSketch``, ``GlobalTopK``
            or a ``Policy`` of them), or Horovod's ``Compression.none`` (= ``Dense()``) or ``Compression.fp16``.
        backward_passes_per_step: backward passes whose gradients are summed before ``step()``.
        op: Average, Sum, or Adasum (only uncompressed: Horovod's own optimizer is returned).
        gradient_predivide_factor: with Average, divide by it before the sum and multiply after.
        num_groups: deprecated name of ``groups``.
        groups: number of groups, or lists of tensors, to be exchanged together.
        sparse_as_dense: exchange sparse gradients as dense ones (they are sparse again afterwards).
        process_set: Horovod process set whose ranks train together; others are left alone.

    Returns:
        An instance of a subclass of ``type(optimizer)`` with the same name, having besides torch's methods
        ``synchronize``, ``skip_synchronize``, ``set_backward_passes_per_step``, ``consensus``, ``flush``
        and ``stats``.

    Raises:
        ValueError: if an argument is not allowed, Horovod is not initialised, or ranks disagree about the
            parameters or the compression (on every rank alike).
    """
    arguments.require_horovod()
    arguments.check_optimizer(optimizer)
    arguments.check_process_set(process_set)
    algorithm = arguments.algorithm_of(compression)
    arguments.check_reduction(op, gradient_predivide_factor, backward_passes_per_step)
    groups = arguments.resolve_groups(num_groups, groups)
    if op == Adasum:
        if not isinstance(algorithm, Dense):
            raise ValueError(
                f"DistributedOptimizer: op=Adasum cannot be combined with compression={algorithm!r}; use op=Average, "
                "or op=Adasum with Dense()"
            )
        if isinstance(compression, Algorithm):
            compression = Compression.fp16 if algorithm == Dense(Cast(torch.float16)) else Compression.none
        return collectives.horovod_optimizer(
            optimizer,
            named_parameters,
            compression,
            backward_passes_per_step,
            op,
            gradient_predivide_factor,
            0,
            groups,
            sparse_as_dense,
            process_set,
        )
    base = type(optimizer)
    names = arguments.parameter_names(optimizer, named_parameters)
    arguments.refuse_complex((p for group in optimizer.param_groups for p in group["params"]), names)
    comm = Communicator(process_set)
    namespace = {k: v for k, v in vars(_DistributedOptimizer).items() if k not in ("__dict__", "__weakref__")}
    # Horovod's broadcast_optimizer_state knows by this module name that it must initialise a state with
    # the step() of the class that this one derives from, without communication.
    namespace.update(_hvd_base=base, __module__=collectives.horovod_optimizer.__module__)
    cls: Any = type(base.__name__, (initialising.between(base),), namespace)
    wrapped = cls.__new__(cls)
    wrapped.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    wrapped._original = optimizer
    reduction = Reduction(op, gradient_predivide_factor)
    wrapped._setup(names, algorithm, comm, reduction, backward_passes_per_step, groups, sparse_as_dense)
    return wrapped


class _DistributedOptimizer(torch.optim.Optimizer):
    """Methods of the dynamic class; ``_hvd_base`` is the wrapped optimizer's own class."""

    _hvd_base: Any
    # GradScaler then always calls step(), on every rank, and leaves it to us to skip: see ``ScaledStep``.
    _step_supports_amp_scaling = True

    def _setup(
        self,
        names: dict[Parameter, str],
        algorithm: Algorithm,
        comm: Communicator,
        reduction: Reduction,
        passes: int,
        groups: Groups,
        sparse_as_dense: bool,
    ) -> None:
        amp.watch()
        self._parameter_names = names
        self.op, self.gradient_predivide_factor = reduction
        self.sparse_as_dense = sparse_as_dense
        self.process_set = comm.process_set
        self.check_replicas = os.environ.get("HVD_COMPRESS_CHECK_REPLICAS", "0") not in ("", "0")
        fused = bool(self.__dict__.pop("_step_supports_amp_scaling", False))
        self._synchronized, self._should_synchronize = False, True
        if comm.member and not collectives.is_elastic():
            agreement.agree(comm, agreement.description(self, algorithm, reduction, passes, groups))
        if comm.member:
            algorithm.check(comm)
        self._reducer = Reducer(self, names, algorithm, comm, reduction, passes, groups, sparse_as_dense)
        self._scaled_step = ScaledStep(self._reducer, fused)
        self._consensus = Consensus(self._reducer)
        self._checkpoint = residuals.OptimizerCheckpoint(self._reducer, self._consensus.outside)
        base_step = self._hvd_base.step
        # torch wraps step() to run step hooks; ours must see the exchanged gradients and the final
        # parameters, so it goes around the exchange, once, and the base's own wrapper is taken off.
        self._bare_step = getattr(base_step, "__wrapped__", base_step) if hasattr(base_step, "hooked") else base_step
        self._hooked_step = torch.optim.Optimizer.profile_hook_step(_DistributedOptimizer._apply)

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes whose gradients are summed before the exchange."""
        return self._reducer.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change the number of backward passes per step; counting starts anew."""
        validation.integer("set_backward_passes_per_step", "passes", passes, 1)
        self._reducer.set_passes(passes)

    def synchronize(self) -> None:
        """Finish the exchange of gradients; the aggregate is then in ``p.grad`` of every rank.

        With LIEC it is this rank's own direction. Algorithms that exchange updates (DEF) exchange nothing here:
        gradients stay local, and clipping then acts on them. A missing gradient becomes zeros either way.
        """
        self._consensus.forbid("synchronize()")
        reducer = self._reducer
        if self._synchronized and not reducer.fired:
            return
        if reducer.comm.member:
            if reducer.algorithm.exchanges_updates:
                reducer.drop_pass_counts()
                local_gradients.prepare(self, reducer)
            else:
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
        """One optimization step on all ranks.

        Args:
            closure: reevaluates the model and returns the loss. Its gradients are exchanged each time it
                runs, and what it returns is averaged over ranks, so that optimizers that look at the loss
                decide alike everywhere. Algorithms that exchange updates (DEF) leave both local: the wrapped
                optimizer searches along this rank's own loss, and what it has subtracted in the end is exchanged.
        """
        self._consensus.forbid("step()")
        reducer = self._reducer
        if reducer.fired:
            self._synchronized = False
        if closure is not None:
            wrapper = self._completing if reducer.algorithm.exchanges_updates else self._synchronizing
            closure = wrapper(closure)
        elif self._should_synchronize:
            if self._synchronized:
                warnings.warn(_STEP_AFTER_SYNCHRONIZE, stacklevel=2)
            self.synchronize()
        self._synchronized = False
        self._original._opt_called = True  # type: ignore[attr-defined]
        if self._scaled_step.skip():
            reducer.drop_pass_counts()
            return None
        return self._hooked_step(self, closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _apply(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        reducer = self._reducer
        updates = reducer.algorithm.exchanges_updates and reducer.comm.member
        if updates:
            reducer.before_update()
            local_gradients.clip(reducer)
        loss = self._bare_step(self) if closure is None else self._bare_step(self, closure)
        if updates:
            reducer.exchange_updates()
        if self.check_replicas and reducer.comm.member:
            self._consensus.check_replicas()
        return loss

    def _synchronizing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def synchronized_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._synchronized = False
            self.synchronize()
            self._synchronized = False  # for the closure's gradients, not for those that may follow
            return self._consensus.mean_loss(loss)

        return synchronized_closure

    def _completing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def completed_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            if self._reducer.comm.member:
                local_gradients.prepare(self, self._reducer)
                local_gradients.clip(self._reducer)
                self._reducer.close_pass()
            return loss

        return completed_closure

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's ``zero_grad``; AssertionError between ``backward()`` and ``step()``/``synchronize()``."""
        if self._reducer.busy:
            raise AssertionError(_ZERO_GRAD_TOO_EARLY)
        # Some optimizers' own zero_grad knows no argument.
        self._hvd_base.zero_grad(self, **({} if set_to_none else {"set_to_none": False}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's ``add_param_group``; parameters not in ``named_parameters`` are named by their position."""
        self._consensus.forbid("add_param_group()")
        self._hvd_base.add_param_group(self, param_group)
        index = len(self.param_groups) - 1
        added = self.param_groups[index]["params"]
        names = {parameter: f"allreduce.noname.{index}.{j}" for j, parameter in enumerate(added)}
        try:
            arguments.refuse_complex(added, names)
        except ValueError:
            self.param_groups.pop()
            raise
        self._parameter_names.update({p: name for p, name in names.items() if p not in self._parameter_names})
        self._reducer.newcomers.update(added)
        self._reducer.track()

    def consensus(self, point: str = "shared") -> Any:
        """Context in which the parameters are the model to evaluate or save (collective).

        Args:
            point: "shared", the model x, bitwise the same on every rank; or "virtual", x minus everything
                that ranks still hold back (costs one dense allreduce; with ``LIEC``, whose x is the mean of
                local models, both do). Buffers, such as statistics of batch normalisation, are left alone.

        Raises:
            ValueError: for any other ``point``.
            RuntimeError: between ``backward()`` and ``step()`` (several ranks), inside another ``consensus()``, or for
                "virtual" where gradients are held back (EF, LIEC) of an optimizer whose update is not proportional
                to them (Adam).
        """
        return self._consensus.at(point)

    def flush(self) -> None:
        """Apply everything that ranks still hold back in one dense step; all residuals are then zero (collective).

        Where gradients are held back (EF, LIEC) of an optimizer whose update is not proportional to them (Adam), that
        is a step of the optimizer with their mean; else what is owed is subtracted.
        """
        self._consensus.flush()

    def stats(self) -> Stats:
        """Figures of the last exchange and in total, of this rank."""
        reducer = self._reducer
        comm, sizes = reducer.comm, [s.bucket.layout.total * s.bucket.dtype.itemsize for s in reducer.states]
        dense_bytes = 2 * (comm.size - 1) / comm.size * sum(sizes)
        norms = [float(torch.linalg.vector_norm(r)) for r in (s.residual() for s in reducer.states) if r is not None]
        coefficients = [s.coefficient for s in reducer.states if hasattr(s, "coefficient")]
        return reducer.recorder.snapshot(
            comm.sent, dense_bytes, math.hypot(*norms), coefficients[0] if coefficients else math.nan
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state, and under "hvd_compress" what this rank holds back and the shared model."""
        state: dict[str, Any] = self._hvd_base.state_dict(self)
        return self._checkpoint.extend(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict()`` of this rank; a plain torch state empties the residuals."""
        self._consensus.forbid("load_state_dict()")
        self._synchronized, self._should_synchronize, self._scaled_step.overflowed = False, True, False
        self._reducer.set_passes(self._reducer.passes)
        self._hvd_base.load_state_dict(self, self._checkpoint.strip(state_dict))
        self._checkpoint.load(state_dict.get(residuals.KEY))
