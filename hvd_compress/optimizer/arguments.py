"""Arguments of DistributedOptimizer: Horovod's checks and messages."""

from __future__ import annotations

import reprlib
import warnings
from numbers import Real
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from hvd_compress import validation
from hvd_compress.algorithms import Algorithm, Dense
from hvd_compress.comm import communicator
from hvd_compress.comm.communicator import Adasum, Average, Sum
from hvd_compress.compressors import Cast, Compressor
from hvd_compress.engine.bucketing import Groups

_NO_PAIRS = (
    "named_parameters should be a sequence of tuples (name, parameter), usually produced by model.named_parameters()."
)


def require_horovod() -> None:
    """Raise ValueError unless ``hvd.init()`` has been called."""
    if not communicator.is_initialized():
        raise ValueError("hvd_compress.DistributedOptimizer: Horovod has not been initialized; call hvd.init() first")


def algorithm_of(compression: Any) -> Algorithm:
    """Return the algorithm for the argument ``compression``: ours, or one of Horovod's ``Compression`` classes.

    Raises:
        ValueError: for anything else; a bare compressor gets told what to wrap it in.
    """
    if isinstance(compression, Algorithm):
        return compression
    if compression is communicator.Compression.none:
        return Dense()
    if compression is communicator.Compression.fp16:
        return Dense(Cast(torch.float16))
    if isinstance(compression, Compressor):
        raise ValueError(
            f"DistributedOptimizer: compression={compression!r} is a compressor, which alone would lose what it "
            f"does not send; give it to an algorithm, such as EF({compression!r}) or DEF({compression!r})"
        )
    raise ValueError(
        f"DistributedOptimizer: compression={compression!r} is not allowed; it must be an algorithm of "
        "hvd_compress (Dense, EF, DEF, ...) or Horovod's Compression.none or Compression.fp16"
    )


def adasum_compression(compression: Any) -> Any:
    """Return Horovod's own compression for op=Adasum.

    Raises:
        ValueError: if ``compression`` is an algorithm other than Dense: Adasum is Horovod's own, uncompressed.
    """
    algorithm = algorithm_of(compression)
    if not isinstance(algorithm, Dense):
        raise ValueError(
            f"DistributedOptimizer: op=Adasum cannot be combined with compression={algorithm!r}; use op=Average, "
            "or op=Adasum with Dense()"
        )
    if isinstance(compression, Algorithm):
        fp16 = algorithm == Dense(Cast(torch.float16))
        return communicator.Compression.fp16 if fp16 else communicator.Compression.none
    return compression


def check_reduction(op: int, gradient_predivide_factor: float, backward_passes_per_step: int) -> None:
    """Check op, predivide factor and passes as Horovod does, with its messages."""
    if isinstance(op, bool) or op not in (Average, Sum, Adasum):
        raise ValueError(f"DistributedOptimizer: op={op!r} is not allowed; it must be Average, Sum or Adasum")
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    validation.positive("DistributedOptimizer", "gradient_predivide_factor", gradient_predivide_factor)
    if isinstance(backward_passes_per_step, Real) and backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    validation.integer("DistributedOptimizer", "backward_passes_per_step", backward_passes_per_step, 1)


def check_optimizer(optimizer: Any) -> None:
    """Raise ValueError unless ``optimizer`` can be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"DistributedOptimizer: optimizer={_short(optimizer)} is not allowed; it must be a torch.optim.Optimizer "
            "object, such as torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if "_hvd_base" in type(optimizer).__dict__:
        raise ValueError("DistributedOptimizer: the optimizer is already distributed; wrap the plain torch optimizer")


def check_process_set(process_set: Any) -> None:
    """Raise ValueError unless ``process_set`` is one that Horovod knows."""
    if not isinstance(process_set, communicator.ProcessSet):
        raise ValueError(
            f"DistributedOptimizer: process_set={_short(process_set)} is not allowed; it must be a Horovod ProcessSet, "
            "such as hvd.global_process_set or what hvd.add_process_set([0, 1]) returns"
        )
    if process_set.process_set_id is None:
        raise ValueError(
            f"DistributedOptimizer: process_set={_short(process_set)} is not registered; call "
            "hvd.add_process_set(process_set) on every rank first"
        )


def check_closure(closure: Any) -> None:
    """Raise ValueError unless ``closure`` is None or can be called."""
    if closure is not None and not callable(closure):
        raise ValueError(
            f"step: closure={_short(closure)} is not allowed; it must be a function that computes the loss and its "
            "gradients, or None"
        )


def require_exchangeable(parameters: Iterable[Parameter], names: Mapping[Parameter, str]) -> None:
    """Raise ValueError if there is a parameter that Horovod cannot exchange, or one without values."""
    for p in parameters:
        name = f"DistributedOptimizer: parameter {names.get(p, '?')!r}"
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet; run the model once before its optimizer is built")
        if p.is_meta:
            raise ValueError(f"{name} is on the device 'meta', without values; build the model on a CPU or GPU")
        if p.is_complex():
            raise ValueError(
                f"{name} is complex ({p.dtype}), which Horovod cannot exchange; store its real and imaginary parts in "
                "a real parameter, and use torch.view_as_complex(parameter) in the model"
            )


def require_known(groups: Groups, names: Mapping[Parameter, str]) -> None:
    """Raise ValueError if ``groups`` are lists with a tensor that is no parameter; one may be added later by name."""
    known = {id(p) for p in names}
    for group in groups if isinstance(groups, (list, tuple)) else ():
        for p in group:
            if id(p) not in known:
                raise ValueError(
                    f"groups holds a tensor of shape {tuple(p.shape)} that is no parameter of the optimizer, nor in "
                    "named_parameters"
                )


def _short(value: Any) -> str:
    """Return ``repr`` without the many lines of a model."""
    return reprlib.repr(value) if isinstance(value, (str, list, tuple, dict)) else " ".join(repr(value).split())[:80]


def resolve_groups(num_groups: int, groups: Groups) -> Groups:
    """Return ``groups``, with the deprecated ``num_groups`` folded in; raises Horovod's ValueErrors."""
    if num_groups != 0:
        warnings.warn(
            "Parameter `num_groups` has been replaced by `groups` and will be removed in v0.23.0.",
            DeprecationWarning,
            stacklevel=3,
        )
        if groups is None:
            groups = num_groups
    if groups is None:
        return None
    if not (isinstance(groups, (list, tuple)) or (isinstance(groups, int) and groups > 0)) or groups is True:
        raise ValueError(
            f"groups should be a non-negative integer or a list of list of torch.Tensor. (groups={_short(groups)})"
        )
    if not isinstance(groups, int):
        _check_lists(groups)
    return groups


def _check_lists(groups: Sequence[Sequence[Tensor]]) -> None:
    """Raise ValueError unless ``groups`` are lists of tensors, each tensor in one of them."""
    seen: set[int] = set()
    for group in groups:
        # The rows of a tensor would pass for tensors of a group.
        if isinstance(group, Tensor) or not hasattr(group, "__len__"):
            raise ValueError(
                "groups should be a non-negative integer or a list of list of torch.Tensor. (groups holds "
                f"{_short(group)}, which is no list)"
            )
        for p in group:
            if not isinstance(p, Tensor):
                raise ValueError("groups must consist of torch.Tensor.")
            if id(p) in seen:
                raise ValueError("A parameter can only appear once in groups.")
            seen.add(id(p))


def parameter_names(
    optimizer: torch.optim.Optimizer, named_parameters: Optional[Iterable[tuple[str, Parameter]]]
) -> dict[Parameter, str]:
    """Return the name of every parameter; raises Horovod's three ValueErrors. Names of other parameters are kept."""
    groups = optimizer.param_groups
    if named_parameters is None:
        return {p: f"allreduce.noname.{i}.{j}" for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
    if not isinstance(named_parameters, Iterable):
        raise ValueError(f"{_NO_PAIRS} (named_parameters={_short(named_parameters)})")
    named = list(named_parameters)
    for pair in named:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{_NO_PAIRS} (named_parameters holds {_short(pair)})")
        if not isinstance(pair[1], Tensor):
            raise ValueError(f"{_NO_PAIRS} (named_parameters[{pair[0]!r}]={_short(pair[1])})")
    names = [name for name, _ in named]
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise ValueError(
            "Parameter names in named_parameters must be unique. Found duplicates: " + ", ".join(duplicates)
        )
    known = {p: name for name, p in named}
    unnamed = {id(p) for group in groups for p in group["params"] if p not in known}
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named. "
            "Python object ids: " + ", ".join(map(str, unnamed))
        )
    return known
