"""Agreement of all ranks on their parameters and options, before anything is exchanged."""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.bucket import ParamEntry
from hvd_compress.comm.communicator import Communicator, Reduction
from hvd_compress.engine.bucketing import Groups


class Options(NamedTuple):
    """Arguments of DistributedOptimizer that the engine needs.

    Attributes:
        algorithm: what is exchanged, and how.
        reduction: op and predivide factor.
        passes: backward passes per step.
        groups: parameters that the user wants exchanged together.
        sparse_as_dense: exchange sparse gradients as dense ones.
    """

    algorithm: Algorithm
    reduction: Reduction
    passes: int
    groups: Groups
    sparse_as_dense: bool


def description(optimizer: Any, options: Options) -> list[tuple[str, Any]]:
    """Return what must be the same on every rank: (what, value) pairs, one per parameter and a few more."""
    names = optimizer._parameter_names
    items: list[tuple[str, Any]] = [
        ("compression", repr(options.algorithm)),
        ("nonfinite", options.algorithm.nonfinite),
        ("op, gradient_predivide_factor, backward_passes_per_step", (*options.reduction, options.passes)),
        ("sparse_as_dense", bool(options.sparse_as_dense)),
        ("the class of the optimizer", optimizer._hvd_base.__name__),
        ("HVD_COMPRESS_CHECK_REPLICAS in the environment", optimizer.check_replicas),
    ]
    groups = options.groups
    if groups is not None:
        # In whatever order a rank has them: only which parameters belong together matters.
        by_id = {id(p): name for p, name in names.items()}
        lists = groups if isinstance(groups, int) else sorted(sorted(by_id.get(id(p), "?") for p in g) for g in groups)
        items.append(("groups", lists))
    for index, group in enumerate(optimizer.param_groups):
        items += [parameter_item(ParamEntry(parameter, names[parameter], index)) for parameter in group["params"]]
    return items


def parameter_item(entry: ParamEntry) -> tuple[str, Any]:
    """Return what must be the same on every rank of one parameter."""
    p = entry.parameter
    kind = (tuple(p.shape), str(p.dtype), p.stride(), p.requires_grad, entry.group)
    return f"parameter {entry.name!r} (shape, dtype, strides, requires_grad, group)", kind


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
            (what, own), (their_what, theirs) = next((a, b) for a, b in zip(first, other) if a != b)
            difference = f"rank 0 has {what} = {own}, rank {rank} has {their_what} = {theirs}"
        raise ValueError(
            f"DistributedOptimizer: ranks disagree ({difference}; this is rank {comm.rank}). Build the same model, "
            "optimizer and compression on every rank, with the parameters in the same order"
        )
