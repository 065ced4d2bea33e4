"""Bad arguments of DistributedOptimizer and of its methods: every rank's error names the argument and the value."""

from __future__ import annotations

import os
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn import Parameter

from hvd_compress import DEF, EF, LIEC, Dense, DistributedOptimizer, RandomBlock, TopK
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import network
from tests.multirank.support.refusals import Bad, refused
from tests.multirank.support.training import sgd, take_step, wrap

RANKS = (2,)
BLOCK = EF(RandomBlock(0.25))


def build(**options: Any) -> Any:
    """Wrap an optimizer of the network."""
    model = network()
    return wrap(model, sgd(model), **{"compression": BLOCK, **options})


def of(optimizer: Any, **options: Any) -> Any:
    """Wrap any object."""
    return DistributedOptimizer(optimizer, **options)


def named(change: Any) -> Any:
    """Wrap with what ``change`` makes of the list of names and parameters."""
    model = network()
    return DistributedOptimizer(sgd(model), named_parameters=change(list(model.named_parameters())))


def with_parameter(p: Any) -> Any:
    """Wrap an optimizer of one parameter."""
    return DistributedOptimizer(torch.optim.SGD([p], lr=0.1), [("phase", p)], BLOCK)


def one_group(change: Any) -> Any:
    """Wrap with ``groups`` of parameters, as ``change`` makes them."""
    model = network()
    return wrap(model, sgd(model), BLOCK, groups=change(list(model.parameters())))


def in_environment(name: str, value: str) -> Any:
    """Wrap with an environment variable set."""
    os.environ[name] = value
    try:
        return build()
    finally:
        del os.environ[name]


OPTIMIZERS = {
    "optimizer=None": Bad(lambda: of(None), ("optimizer=None", "torch.optim.Optimizer")),
    "optimizer=model": Bad(lambda: of(network()), ("optimizer=Sequential",)),
    "optimizer=class": Bad(lambda: of(torch.optim.SGD), ("optimizer=<class", "SGD")),
    "optimizer=parameters": Bad(lambda: of([Parameter(torch.ones(1))]), ("optimizer=[Parameter",)),
    "optimizer distributed": Bad(lambda: of(build()), ("already distributed",)),
}
NAMES = {
    "named_parameters=5": Bad(lambda: named(lambda n: 5), ("named_parameters=5", "tuples")),
    "named_parameters uncalled": Bad(lambda: named(lambda n: network().named_parameters), ("named_parameters=<bound",)),
    "named_parameters=parameters": Bad(lambda: named(lambda n: [p for _, p in n]), ("tuples (name, parameter)",)),
    "named_parameters=dict": Bad(lambda: named(dict), ("tuples", "'0.weight'")),
    "named_parameters triples": Bad(lambda: named(lambda n: [(*pair, 1) for pair in n]), ("tuples (name, parameter)",)),
    "named_parameters numbers": Bad(lambda: named(lambda n: [(i, p) for i, (_, p) in enumerate(n)]), ("tuples (name",)),
    "named_parameters reversed pairs": Bad(lambda: named(lambda n: [(p, m) for m, p in n]), ("tuples (name",)),
    "named_parameters no tensor": Bad(lambda: named(lambda n: [*n, ("x", 3)]), ("named_parameters['x']=3",)),
    "named_parameters twice": Bad(lambda: named(lambda n: n + n), ("must be unique", "0.weight", "2.bias")),
    "named_parameters one missing": Bad(lambda: named(lambda n: n[1:]), ("were not named",)),
    "named_parameters empty": Bad(lambda: named(lambda n: []), ("were not named",)),
    "named_parameters of a copy": Bad(lambda: named(lambda n: list(network().named_parameters())), ("not named",)),
}
REDUCTION = {
    **{
        f"backward_passes_per_step={n!r}": Bad(lambda n=n: build(backward_passes_per_step=n), (text,))  # type: ignore[misc]
        for n, text in (
            (0, "backward_passes_per_step must be > 0"),
            (-2, "backward_passes_per_step must be > 0"),
            (1.5, "backward_passes_per_step=1.5"),
            (True, "backward_passes_per_step=True"),
            ("1", "backward_passes_per_step='1'"),
            (None, "backward_passes_per_step=None"),
        )
    },
    **{
        f"op={op!r}": Bad(lambda op=op: build(op=op), (f"op={op!r}", "Average, Sum or Adasum"))  # type: ignore[misc]
        for op in (hvd.Min, hvd.Max, hvd.Product, "average", None, True, -1)
    },
    "op=Adasum with EF": Bad(lambda: build(op=hvd.Adasum), ("op=Adasum", "EF(", "Average")),
    "op=Adasum with DEF": Bad(lambda: build(op=hvd.Adasum, compression=DEF(TopK())), ("op=Adasum", "DEF(")),
    "op=Adasum with LIEC": Bad(lambda: build(op=hvd.Adasum, compression=LIEC()), ("op=Adasum", "LIEC(")),
    "predivide with op=Sum": Bad(
        lambda: build(op=hvd.Sum, gradient_predivide_factor=2.0), ("gradient_predivide_factor", "op != Average")
    ),
    **{
        f"predivide={f!r}": Bad(
            lambda f=f: build(gradient_predivide_factor=f),  # type: ignore[misc]
            (f"gradient_predivide_factor={f!r}", "> 0"),
        )
        for f in (0, -1.0, float("nan"), float("inf"), "2", None, True)
    },
    "sparse_as_dense='no'": Bad(lambda: build(sparse_as_dense="no"), ("sparse_as_dense='no'", "True or False")),
    "sparse_as_dense=None": Bad(lambda: build(sparse_as_dense=None), ("sparse_as_dense=None",)),
    "time limit": Bad(
        lambda: in_environment("HVD_COMPRESS_TIMEOUT_SECONDS", "soon"), ("HVD_COMPRESS_TIMEOUT_SECONDS='soon'", "> 0")
    ),
    "time limit 0": Bad(lambda: in_environment("HVD_COMPRESS_TIMEOUT_SECONDS", "0"), ("TIMEOUT_SECONDS='0'",)),
}
GROUPS = {
    **{
        f"groups={g!r}": Bad(lambda g=g: build(groups=g), (f"groups={g!r}",))  # type: ignore[misc]
        for g in (0, -1, "all", 1.5, True)
    },
    "groups=[1, 2]": Bad(lambda: build(groups=[1, 2]), ("groups holds 1",)),
    "groups=parameters": Bad(lambda: one_group(lambda ps: ps), ("groups holds Parameter", "no list")),
    "groups of names": Bad(lambda: build(groups=[["0.weight"]]), ("groups must consist of torch.Tensor",)),
    "groups repeat": Bad(lambda: one_group(lambda ps: [ps[:2], ps[1:]]), ("only appear once in groups",)),
    "groups of a stranger": Bad(
        lambda: one_group(lambda ps: [[ps[0], torch.ones(4)]]), ("groups holds", "(4,)", "no parameter")
    ),
    "groups of another model": Bad(lambda: build(groups=[list(network().parameters())]), ("(7, 5)", "no parameter")),
    "num_groups=-1": Bad(lambda: build(num_groups=-1), ("groups=-1",)),
    "num_groups='2'": Bad(lambda: build(num_groups="2"), ("groups='2'",)),
    "num_groups=0.5": Bad(lambda: build(num_groups=0.5), ("groups=0.5",)),
}
PROCESS_SET = {
    **{
        f"process_set={s!r}": Bad(lambda s=s: build(process_set=s), (f"process_set={s!r}", "ProcessSet"))  # type: ignore[misc]
        for s in (None, 0, "global", [0, 1])
    },
    "process_set unregistered": Bad(lambda: build(process_set=hvd.ProcessSet([0, 1])), ("not registered",)),
}
PARAMETERS = {
    "complex": Bad(
        lambda: with_parameter(Parameter(torch.ones(2, dtype=torch.complex64))), ("'phase'", "complex64", "real")
    ),
    "meta": Bad(lambda: with_parameter(Parameter(torch.ones(2, device="meta"))), ("'phase'", "'meta'")),
    "lazy": Bad(lambda: with_parameter(nn.LazyLinear(3).weight), ("'phase'", "no shape")),
}


def trained() -> Any:
    """Return an optimizer that has stepped."""
    model = network()
    optimizer = wrap(model, sgd(model), BLOCK)
    take_step(model, optimizer, 0)
    return optimizer


def add(group: Any, optimizer: Any = None) -> None:
    """Add a parameter group; a refused one must leave the others as they were."""
    optimizer = optimizer or trained()
    try:
        optimizer.add_param_group(group)
    finally:
        assert len(optimizer.param_groups) == 1


def add_known() -> None:
    """Add a parameter that the optimizer has already."""
    optimizer = trained()
    add({"params": optimizer.param_groups[0]["params"][:1]}, optimizer)


METHODS = {
    **{
        f"passes={n!r}": Bad(
            lambda n=n: trained().set_backward_passes_per_step(n),  # type: ignore[misc]
            ("set_backward_passes_per_step", f"passes={n!r}"),
        )
        for n in (0, -1, 2.5, "1", None, True)
    },
    **{
        f"closure={c!r}": Bad(lambda c=c: trained().step(c), (f"step: closure={c!r}", "function"))  # type: ignore[misc]
        for c in (3, "loss", False)
    },
    **{
        f"point={p!r}": Bad(lambda p=p: trained().consensus(p).__enter__(), (f"point={p!r}", "virtual"))  # type: ignore[misc]
        for p in ("nowhere", None, 0, "")
    },
    "group=None": Bad(lambda: add(None), ("dict",), TypeError),
    "group=list": Bad(lambda: add([Parameter(torch.ones(2))]), ("dict",), TypeError),
    "group of numbers": Bad(lambda: add({"params": [1.0]}), ("Tensor",), TypeError),
    "group of a set": Bad(lambda: add({"params": {Parameter(torch.ones(2))}}), ("set",), TypeError),
    "group of a result": Bad(lambda: add({"params": [Parameter(torch.ones(2)) * 2]}), ("non-leaf",)),
    "group of known": Bad(add_known, ("more than one parameter group",)),
    "group complex": Bad(
        lambda: add({"params": [Parameter(torch.ones(2, dtype=torch.complex64))]}), ("noname.1.0", "complex64")
    ),
    "group meta": Bad(lambda: add({"params": [Parameter(torch.ones(2, device="meta"))]}), ("noname.1.0", "'meta'")),
    "group lazy": Bad(lambda: add({"params": [nn.LazyLinear(3).weight]}), ("noname.1.0", "no shape")),
    "broadcast of LBFGS": Bad(
        lambda: hvd.broadcast_optimizer_state(of(torch.optim.LBFGS(network().parameters()), compression=Dense()), 0),
        ("LBFGS",),
    ),
    "broadcast of a number": Bad(lambda: hvd.broadcast_parameters(3, 0), ("params",)),
}


@cases({**OPTIMIZERS, **NAMES, **REDUCTION, **GROUPS, **PROCESS_SET, **PARAMETERS})
def check_argument(bad: Bad) -> None:
    refused(bad)


@cases(METHODS)
def check_method(bad: Bad) -> None:
    refused(bad)
