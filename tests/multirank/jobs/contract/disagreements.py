"""Ranks that differ: the same error on every rank, which names what differs and the ranks, and no hang."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    BlockSign,
    CountSketch,
    Dense,
    DistEF,
    DistributedOptimizer,
    GlobalSketch,
    LowRank,
    Policy,
    RandomBlock,
    RandomK,
    TopK,
    Warmup,
)
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import network
from tests.multirank.support.refusals import Bad, refused
from tests.multirank.support.training import sgd, take_step, wrap

RANKS = (2,)
BLOCK = RandomBlock(0.25)
ALGORITHMS = (EF(BLOCK), DEF(BLOCK), DistEF(), LIEC(), EF(TopK(0.25)))
BOTH = ("rank 0 has", "rank 1 has", "this is rank {rank}")

# What rank 0 has, and what rank 1.
COMPRESSIONS: dict[str, tuple[Any, Any]] = {
    "density": (EF(RandomBlock(0.5)), EF(RandomBlock(0.25))),
    "seed": (EF(RandomBlock(0.5, seed=1)), EF(RandomBlock(0.5, seed=2))),
    "compressor": (EF(RandomBlock(0.5)), EF(RandomK(0.5))),
    "algorithm": (EF(BLOCK), DEF(BLOCK)),
    "dense": (EF(BLOCK), Dense()),
    "rank of factors": (EF(LowRank(1)), EF(LowRank(2))),
    "block size": (EF(BlockSign(8)), EF(BlockSign(16))),
    "sampled": (EF(TopK(0.1)), EF(TopK(0.1, sampled=True))),
    "warm-up": (EF(Warmup(TopK(0.1), (0.5,), 10)), EF(Warmup(TopK(0.1), (0.5,), 20))),
    "coefficient": (DEF(BLOCK, 0.3), DEF(BLOCK, 0.4)),
    "local steps": (DEF(BLOCK, local_steps=1), DEF(BLOCK, local_steps=2)),
    "masking": (DEF(BLOCK), DEF(BLOCK, masking=True)),
    "clip norm": (DEF(BLOCK, clip_norm=1.0), DEF(BLOCK, clip_norm=2.0)),
    "server": (DistEF(TopK(0.5)), DistEF(TopK(0.5), BlockSign())),
    "averaging period": (LIEC(averaging_period=3), LIEC(averaging_period=4)),
    "rows": (GlobalSketch(CountSketch(rows=3)), GlobalSketch(CountSketch(rows=5))),
    "k": (GlobalSketch(k=3), GlobalSketch(k=4)),
    "exchange": (GlobalSketch(), GlobalSketch(exchange="allgather")),
    "pattern": (Policy(EF(BLOCK), patterns={"a*": Dense()}), Policy(EF(BLOCK), patterns={"b*": Dense()})),
    "policy": (EF(BLOCK), Policy(EF(BLOCK))),
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "op": ({"op": hvd.Average}, {"op": hvd.Sum}, "op, gradient_predivide_factor"),
    "predivide": ({}, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    "passes": ({}, {"backward_passes_per_step": 2}, "backward_passes_per_step"),
    "sparse_as_dense": ({}, {"sparse_as_dense": True}, "sparse_as_dense"),
    "groups": ({"groups": 2}, {"groups": 3}, "groups"),
    "num_groups": ({"num_groups": 1}, {"num_groups": 2}, "groups"),
    "groups or none": ({"groups": 2}, {}, "rank 0 describes"),
}


def odd() -> bool:
    """Return whether this is the rank that differs."""
    return bool(hvd.rank() == 1)


def layers(*sizes: int, **kwargs: Any) -> nn.Sequential:
    """Return linear layers."""
    return nn.Sequential(*(nn.Linear(a, b, **kwargs) for a, b in zip(sizes, sizes[1:])))


def frozen(model: nn.Module, index: int) -> nn.Module:
    """Return the model with one parameter frozen."""
    list(model.parameters())[index].requires_grad_(False)
    return model


def transposed(model: Any) -> Any:
    """Return the model with a weight stored by columns."""
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model


# Models of rank 0 and of rank 1, and fragments of the error.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[str, ...]]] = {
    "shape": (lambda: layers(3, 4), lambda: layers(3, 5), ("'0.weight'", "(4, 3)", "(5, 3)", *BOTH)),
    "number": (lambda: layers(3, 4), lambda: layers(3, 4, 4), ("rank 0 describes", "rank 1 has", "rank {rank}")),
    "bias": (lambda: layers(3, 4), lambda: layers(3, 4, bias=False), ("rank 0 describes", "rank {rank}")),
    "dtype": (lambda: layers(3, 4), lambda: layers(3, 4).double(), ("torch.float32", "torch.float64", *BOTH)),
    "frozen": (lambda: layers(3, 4), lambda: frozen(layers(3, 4), 1), ("'0.bias'", "True", "False", *BOTH)),
    "strides": (lambda: layers(3, 4), lambda: transposed(layers(3, 4)), ("'0.weight'", "(3, 1)", "(1, 4)", *BOTH)),
}


@cases(COMPRESSIONS)
def check_compression(pair: tuple[Any, Any]) -> None:
    model = network()
    parts = ("compression", repr(pair[0]), repr(pair[1]), *BOTH)
    refused(Bad(lambda: wrap(model, sgd(model), pair[odd()]), parts))


@cases(OPTIONS)
def check_option(case: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    model, options = network(), case[odd()]
    refused(Bad(lambda: wrap(model, sgd(model), EF(BLOCK), **options), (case[2], "rank 1 has", "rank {rank}")))  # type: ignore[arg-type]


@cases(MODELS)
def check_model(case: tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[str, ...]]) -> None:
    model = case[odd()]()  # type: ignore[operator]
    refused(Bad(lambda: wrap(model, sgd(model), EF(BLOCK)), case[2]))


def check_names() -> None:
    model = network()
    named = [(name.replace("2.", "3.") if odd() else name, p) for name, p in model.named_parameters()]
    refused(Bad(lambda: _wrap_named(model, named), ("'2.weight'", "'3.weight'", *BOTH)))


def check_order() -> None:
    model = network()
    named = list(model.named_parameters())
    if odd():
        named.reverse()
    refused(Bad(lambda: _wrap_named(nn.ParameterList([p for _, p in named]), named), ("same order", *BOTH)))


def _wrap_named(model: nn.Module, named: list[tuple[str, nn.Parameter]]) -> None:
    DistributedOptimizer(sgd(model), named_parameters=named, compression=EF(BLOCK))


def check_class() -> None:
    model = network()
    kind: Any = torch.optim.Adam if odd() else torch.optim.SGD
    refused(Bad(lambda: wrap(model, kind(model.parameters(), lr=0.1), EF(BLOCK)), ("SGD", "Adam", *BOTH)))


def check_parameter_groups() -> None:
    model = network()
    ps = list(model.parameters())
    groups = [{"params": ps[: 3 - odd()]}, {"params": ps[3 - odd() :]}]
    refused(Bad(lambda: wrap(model, torch.optim.SGD(groups, lr=0.1), EF(BLOCK)), ("'2.weight'", *BOTH)))


# -- later ---------------------------------------------------------------------------------------------------


def add_on_one(model: nn.Module, optimizer: Any) -> None:
    """Add a group of parameters on one rank."""
    if odd():
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def add_other_shapes(model: nn.Module, optimizer: Any) -> None:
    """Add parameters of different shapes."""
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3 + odd()))]})


def add_frozen_on_one(model: nn.Module, optimizer: Any) -> None:
    """Add a parameter that is frozen on one rank."""
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3), requires_grad=not odd())]})


def freeze_on_one(model: nn.Module, optimizer: Any) -> None:
    """Freeze a parameter on one rank."""
    next(model.parameters()).requires_grad_(not odd())


def remove_on_one(model: nn.Module, optimizer: Any) -> None:
    """Take a parameter out of its group on one rank."""
    if odd():
        optimizer.param_groups[0]["params"].pop()


CHANGES = {
    "add_param_group on one": (add_on_one, ("rank 0 describes 4", "rank 1 has 5", "rank {rank}")),
    "add other shapes": (add_other_shapes, ("noname.1.0", "(3,)", "(4,)", *BOTH)),
    "add frozen on one": (add_frozen_on_one, ("noname.1.0", "requires_grad", *BOTH)),
    "freeze on one": (freeze_on_one, ("'0.weight'", "requires_grad", *BOTH)),
    "remove on one": (remove_on_one, ("rank 0 describes 4", "rank 1 has 3", "rank {rank}")),
}


@cases(compression=ALGORITHMS, change=CHANGES)
def check_change(compression: Any, change: tuple[Callable[[nn.Module, Any], None], tuple[str, ...]]) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    take_step(model, optimizer, 0)
    change[0](model, optimizer)
    refused(Bad(lambda: take_step(model, optimizer, 1), change[1]))


@cases(compression=ALGORITHMS)
def check_unfreezing_on_one_rank(compression: Any) -> None:
    model = network()
    first = next(model.parameters()).requires_grad_(False)
    optimizer = wrap(model, sgd(model), compression)
    take_step(model, optimizer, 0)
    first.requires_grad_(odd())
    refused(Bad(lambda: take_step(model, optimizer, 1), ("'0.weight'", "requires_grad", *BOTH)))
    first.requires_grad_(True)
    optimizer.set_backward_passes_per_step(1)
    take_step(model, optimizer, 1)


def enter(optimizer: Any, point: str = "shared") -> None:
    """Go to a consensus point and back."""
    with optimizer.consensus(point):
        pass


# Methods of rank 0 and of rank 1; None: a whole step.
CALLS: dict[str, tuple[Any, Any]] = {
    "consensus and step": (enter, None),
    "flush and step": (lambda optimizer: optimizer.flush(), None),
    "step and adopt": (None, lambda optimizer: optimizer.adopt_parameters()),
    "consensus and flush": (enter, lambda optimizer: optimizer.flush()),
    "two points": (enter, lambda optimizer: enter(optimizer, "virtual")),
}


@cases(compression=ALGORITHMS, pair=CALLS)
def check_different_methods(compression: Any, pair: tuple[Any, Any]) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    take_step(model, optimizer, 0)
    act = pair[odd()] or (lambda o: take_step(model, o, 1))
    refused(Bad(lambda: act(optimizer), ("different methods", "rank {rank} is in", "on all ranks"), RuntimeError))
    optimizer.set_backward_passes_per_step(1)
    take_step(model, optimizer, 1)
    enter(optimizer)
