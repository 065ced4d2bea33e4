"""Agreement of all ranks on their parameters and options, before anything is exchanged."""

from __future__ import annotations

from typing import Any, Sequence

from torch.nn import Parameter

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.comm.communicator import Communicator
from hvd_compress.engine.bucketing import Groups
from hvd_compress.exchange import Reduction


def description(
    optimizer: Any, algorithm: Algorithm, reduction: Reduction, passes: int, groups: Groups
) -> list[tuple[str, Any]]:
    """What must be the same on every rank: (what, value) pairs, one per parameter and a few more."""
    items: list[tuple[str, Any]] = [
        ("compression", repr(algorithm)),
        ("op, gradient_predivide_factor, backward_passes_per_step", (*reduction, passes)),
        ("sparse_as_dense", bool(optimizer.sparse_as_dense)),
        ("the class of the optimizer", optimizer._hvd_base.__name__),
        ("HVD_COMPRESS_CHECK_REPLICAS in the environment", optimizer.check_replicas),
    ]
    if groups is not None:
        # In whatever order a rank has them: only what belongs together matters.
        names = {id(p): name for p, name in optimizer._parameter_names.items()}
        lists = groups if isinstance(groups, int) else sorted(sorted(names.get(id(p), "?") for p in g) for g in groups)
        items.append(("groups", lists))
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            items.append(parameter_item(optimizer._parameter_names[parameter], parameter, index))
    return items


def parameter_item(name: str, parameter: Parameter, group: int) -> tuple[str, Any]:
    """What must be the same on every rank of one parameter."""
    kind = (tuple(parameter.shape), str(parameter.dtype), parameter.stride(), parameter.requires_grad, group)
    return f"parameter {name!r} (shape, dtype, strides, requires_grad, group)", kind


def agree(comm: Communicator, description: Sequence[tuple[str, Any]]) -> None:
    """Raise the same ValueError on every rank unless all ranks give the same ``description`` (collective).

    Args:
        comm: collectives of the process set.
        description: (what, value) pairs in order, such as one per parameter; values are compared by ``==``.
    """
    everyone = comm.gather_objects(list(description), "agree")
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other == first:
            continue
        if len(other) != len(first):
            difference = f"rank 0 describes {len(first)} items (parameters and options), rank {rank} has {len(other)}"
        else:
            (what, mine), (their_what, theirs) = next((a, b) for a, b in zip(first, other) if a != b)
            difference = f"rank 0 has {what} = {mine}, rank {rank} has {their_what} = {theirs}"
        raise ValueError(
            f"DistributedOptimizer: ranks disagree ({difference}; this is rank {comm.rank}). Build the same model, "
            "optimizer and compression on every rank, with the parameters in the same order"
        )
