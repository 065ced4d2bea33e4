"""DistributedOptimizer: an optimizer that trains data-parallel, with Horovod's arguments."""

from __future__ import annotations

from typing import Any, Iterable, Optional

import torch
from torch.nn import Parameter

from hvd_compress import validation
from hvd_compress.comm.communicator import (
    Adasum,
    Average,
    Communicator,
    Compression,
    Reduction,
    global_process_set,
    horovod_optimizer,
)
from hvd_compress.engine.agreement import Options
from hvd_compress.engine.bucketing import Groups
from hvd_compress.optimizer import arguments, elastic
from hvd_compress.optimizer.methods import DistributedMethods
from hvd_compress.optimizer.state_init import with_stateless_step


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
        ``synchronize``, ``skip_synchronize``, ``set_backward_passes_per_step``, ``consensus``, ``flush``,
        ``adopt_parameters`` and ``stats``.

    Raises:
        ValueError: if an argument is not allowed, Horovod is not initialised, or ranks disagree about the
            parameters or the compression (on every rank alike).
    """
    arguments.require_horovod()
    arguments.check_optimizer(optimizer)
    arguments.check_process_set(process_set)
    algorithm = arguments.algorithm_of(compression)
    arguments.check_reduction(op, gradient_predivide_factor, backward_passes_per_step)
    validation.boolean("DistributedOptimizer", "sparse_as_dense", sparse_as_dense)
    groups = arguments.resolve_groups(num_groups, groups)
    if op == Adasum:
        horovods = arguments.adasum_compression(compression)
        return horovod_optimizer(
            optimizer,
            named_parameters,
            horovods,
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
    arguments.require_exchangeable((p for group in optimizer.param_groups for p in group["params"]), names)
    arguments.require_known(groups, names)
    namespace = {k: v for k, v in vars(DistributedMethods).items() if k not in ("__dict__", "__weakref__")}
    # Horovod's broadcast_optimizer_state knows by this module name that it must initialise a state with
    # the step() of the class that this one derives from, without communication.
    namespace.update(_hvd_base=base, __module__=horovod_optimizer.__module__)
    cls: Any = type(base.__name__, (with_stateless_step(base),), namespace)
    elastic.Wrapped.register(cls)
    wrapped = cls.__new__(cls)
    wrapped.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    wrapped._original = optimizer
    reduction = Reduction(op, gradient_predivide_factor)
    options = Options(algorithm, reduction, backward_passes_per_step, groups, sparse_as_dense)
    wrapped._setup(names, Communicator(process_set), options)
    return wrapped
