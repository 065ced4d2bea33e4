"""Bad input is a clear error on every rank, before any collective of the exchange, and never a hang."""

from __future__ import annotations

import os
import warnings
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
    GlobalTopK,
    LowRank,
    Policy,
    RandomBlock,
    RandomK,
    TopK,
    Warmup,
)
from tests.multirank.support.assertions import raises
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import network
from tests.multirank.support.training import sgd, wrap

RANKS = (3,)
FULL_RANKS = (2,)
PROCESS_SETS = True


def attempt(model: nn.Module, compression: object = None, **kwargs: object) -> None:
    """Wrap an optimizer of the model."""
    wrap(model, sgd(model), Dense() if compression is None else compression, **kwargs)


# Builds a compression, and fragments of the error.
WRONG: list[tuple[Callable[[], object], tuple[str, ...]]] = [
    (lambda: DEF(RandomBlock(), 1.5), ("coefficient=1.5", "[0, 1]")),
    (lambda: Dense(RandomBlock()), ("Lossy", "EF(")),
    (lambda: RandomBlock(), ("RandomBlock", "EF(")),
    (lambda: "def", ("compression='def'",)),
    (lambda: EF(TopK(density=0)), ("TopK", "density", "0")),
    (lambda: EF(RandomK(density=1.5)), ("RandomK", "density", "1.5")),
    (lambda: DistEF(BlockSign(block_size=0)), ("BlockSign", "block_size", "=0")),
    (lambda: DistEF(LowRank()), ("DistEF", "LowRank", "EF(...)")),
    (lambda: DistEF(BlockSign(), CountSketch()), ("DistEF", "server_compressor", "CountSketch", "GlobalSketch")),
    (lambda: DistEF(Warmup(TopK())), ("DistEF", "Warmup", "EF(...)")),
    (lambda: EF(CountSketch()), ("EF", "CountSketch", "GlobalSketch")),
    (lambda: DEF(BlockSign(), "auto"), ("DEF", "coefficient='auto'", "BlockSign")),
    (lambda: DEF(BlockSign(), masking=True), ("DEF", "masking", "BlockSign")),
    (lambda: DEF(TopK(), clip_norm=-1.0), ("DEF", "clip_norm=-1.0")),
    (lambda: LIEC(averaging_period=0), ("LIEC", "averaging_period=0")),
    (
        lambda: GlobalSketch(TopK()),  # type: ignore[arg-type]
        ("GlobalSketch", "sketch=TopK", "CountSketch"),
    ),
    (lambda: GlobalSketch(exchange="ring"), ("GlobalSketch", "exchange='ring'", "allgather")),
    (lambda: GlobalSketch(k=0), ("GlobalSketch", "k=0")),
    (lambda: GlobalTopK(density=2), ("GlobalTopK", "density", "2")),
    (lambda: Warmup(BlockSign()), ("Warmup", "BlockSign", "density")),
    (lambda: Policy(EF(TopK()), groups={0: DEF(TopK())}), ("Policy", "DEF", "gradients", "updates")),
    (lambda: Policy(EF(TopK()), patterns={3: Dense()}), ("Policy", "patterns")),
    (lambda: Policy(DEF(TopK()), groups={0: DEF(TopK(), clip_norm=5.0)}), ("Policy", "clip_norm=5.0", "default")),
    (lambda: Policy(DEF(TopK()), groups={0: DEF(TopK(), local_steps=2)}), ("Policy", "local_steps=2")),
]
# Arguments of DistributedOptimizer, and fragments of the error.
WRONG_OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, ("predivide",)),
    ({"gradient_predivide_factor": 0.0}, ("predivide",)),
    ({"op": 17}, ("op=",)),
    *(
        ({"gradient_predivide_factor": factor}, (f"gradient_predivide_factor={factor!r}", "> 0"))
        for factor in (float("inf"), float("nan"), -1.0, "2", None)
    ),
    *(({"backward_passes_per_step": n}, ("backward_passes_per_step must be > 0",)) for n in (0, -1)),
    *(
        ({"backward_passes_per_step": n}, (f"backward_passes_per_step={n!r}", "integer >= 1"))
        for n in (1.5, "2", None, True)
    ),
]


@cases(density=(0, 2, float("nan"), -0.5))
def check_density(density: float) -> None:
    raises(ValueError, "density", repr(density), call=lambda: attempt(network(), DEF(RandomBlock(density=density))))


@cases({" ".join(fragments): (build, fragments) for build, fragments in WRONG})
def check_values_of_compression(case: tuple[Callable[[], object], tuple[str, ...]]) -> None:
    build, fragments = case
    raises(ValueError, *fragments, call=lambda: attempt(network(), build()))


@cases({", ".join(f"{k}={v!r}" for k, v in options.items()): (options, text) for options, text in WRONG_OPTIONS})
def check_reduction(case: tuple[dict[str, Any], tuple[str, ...]]) -> None:
    options, fragments = case
    raises(ValueError, *fragments, call=lambda: attempt(network(), **options))


@cases(DEF(RandomBlock()), EF(RandomBlock()))
def check_adasum(compression: Any) -> None:
    raises(ValueError, "Adasum", "Average", call=lambda: attempt(network(), compression, op=hvd.Adasum))


@cases(passes=(0, -1, 1.5, "2", None, True))
def check_passes_set_later(passes: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), Dense())
    raises(
        ValueError,
        "set_backward_passes_per_step",
        f"passes={passes!r}",
        "integer >= 1",
        call=lambda: optimizer.set_backward_passes_per_step(passes),
    )
    assert optimizer.backward_passes_per_step == 1


@cases(
    {
        "None": (lambda: None, "optimizer=None"),
        "model": (network, "optimizer=Sequential"),
        "class": (lambda: torch.optim.SGD, "SGD"),
        "string": (lambda: "sgd", "optimizer='sgd'"),
    }
)
def check_wrapped_object(case: tuple[Callable[[], Any], str]) -> None:
    build, shown = case
    raises(
        ValueError,
        shown,
        "torch.optim.Optimizer",
        call=lambda: DistributedOptimizer(build(), compression=Dense()),
    )


@cases({"None": None, "'global'": "global", "[0]": [0]})
def check_process_set(wrong: Any) -> None:
    raises(
        ValueError,
        f"process_set={wrong!r}",
        "ProcessSet",
        "hvd.add_process_set",
        call=lambda: attempt(network(), process_set=wrong),
    )


def check_process_set_that_is_not_registered() -> None:
    raises(
        ValueError,
        "process_set=",
        "not registered",
        "hvd.add_process_set",
        call=lambda: attempt(network(), process_set=hvd.ProcessSet([0])),
    )


@cases(Dense(), EF(TopK()), DEF(RandomBlock()))
def check_complex_parameters(compression: Any) -> None:
    model = network()
    model.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    raises(ValueError, "'phase'", "complex64", "view_as_complex", call=lambda: attempt(model, compression))
    plain = network()
    optimizer = wrap(plain, sgd(plain), compression)
    raises(ValueError, "noname.1.0", "complex64", call=lambda: optimizer.add_param_group({"params": [model.phase]}))
    plain(torch.ones(2, 5)).sum().backward()
    optimizer.step()  # the group was not added


def check_names() -> None:
    model = network()
    same = [("a", p) for p in model.parameters()]
    raises(ValueError, "must be unique", "a", call=lambda: DistributedOptimizer(sgd(model), named_parameters=same))
    raises(
        ValueError,
        "were not named",
        call=lambda: DistributedOptimizer(sgd(model), named_parameters=list(model.named_parameters())[1:]),
    )
    raises(
        ValueError,
        "sequence of tuples",
        call=lambda: DistributedOptimizer(sgd(model), named_parameters=model.parameters()),
    )


def check_groups() -> None:
    model = network()
    raises(ValueError, "groups should be", call=lambda: attempt(model, groups=0))
    raises(ValueError, "groups should be", call=lambda: attempt(model, groups="all"))
    raises(ValueError, "groups should be", "groups=True", call=lambda: attempt(model, groups=True))
    raises(ValueError, "groups should be", "1, which is no list", call=lambda: attempt(model, groups=[1, 2]))
    raises(ValueError, "groups should be", "no list", call=lambda: attempt(model, groups=list(model.parameters())))
    raises(ValueError, "torch.Tensor", call=lambda: attempt(model, groups=[["0.weight"]]))
    p = next(model.parameters())
    raises(ValueError, "only appear once", call=lambda: attempt(model, groups=[[p], [p]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attempt(model, num_groups=2)
    assert any(issubclass(w.category, DeprecationWarning) for w in caught)


def check_wrapped_twice() -> None:
    model = network()
    once = wrap(model, sgd(model), Dense())
    raises(ValueError, "already distributed", call=lambda: wrap(model, once, Dense()))


def check_ranks_disagree_in_shape() -> None:
    model = nn.Linear(3, 2 + (hvd.rank() == 1))
    raises(ValueError, "rank 0 has", "rank 1 has", "weight", f"this is rank {hvd.rank()}", call=lambda: attempt(model))


def check_ranks_disagree_in_number() -> None:
    layers = [nn.Linear(3, 3) for _ in range(2 + (hvd.rank() == hvd.size() - 1))]
    raises(ValueError, "rank 0 describes", f"rank {hvd.size() - 1}", call=lambda: attempt(nn.Sequential(*layers)))


def check_ranks_disagree_in_order() -> None:
    model = network()
    named = list(model.named_parameters())
    if hvd.rank() == 1:
        named.reverse()
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1)
    raises(
        ValueError,
        "order",
        "rank 1",
        call=lambda: DistributedOptimizer(optimizer, named_parameters=named, compression=Dense()),
    )


def check_ranks_disagree_in_compression() -> None:
    density = 0.5 if hvd.rank() == 0 else 0.25
    raises(ValueError, "0.5", "0.25", call=lambda: attempt(network(), EF(RandomBlock(density=density))))


def check_ranks_disagree_in_frozen_parameters() -> None:
    model = network()
    if hvd.rank() == 1:
        next(model.parameters()).requires_grad_(False)
    raises(ValueError, "requires_grad", "rank 1", call=lambda: attempt(model))


def check_ranks_disagree_in_options() -> None:
    model = network()
    odd = hvd.rank() == 1
    raises(ValueError, "sparse_as_dense", "rank 1 has", call=lambda: attempt(model, sparse_as_dense=odd))
    op = hvd.Sum if odd else hvd.Average
    raises(ValueError, "op, gradient_predivide_factor", "rank 1 has", call=lambda: attempt(model, op=op))
    passes = 1 + odd
    raises(ValueError, "passes", "rank 1 has", call=lambda: attempt(model, backward_passes_per_step=passes))
    kind = torch.optim.Adam if odd else torch.optim.SGD
    raises(
        ValueError,
        "class of the optimizer",
        "SGD",
        "Adam",
        f"this is rank {hvd.rank()}",
        call=lambda: wrap(model, kind(model.parameters(), lr=0.1), Dense()),
    )
    if odd:
        os.environ["HVD_COMPRESS_CHECK_REPLICAS"] = "1"
    raises(ValueError, "HVD_COMPRESS_CHECK_REPLICAS", "rank 1 has", call=lambda: attempt(model))
    os.environ.pop("HVD_COMPRESS_CHECK_REPLICAS", None)


@cases(compression=(Dense(), EF(RandomBlock()), DEF(RandomBlock()), EF(TopK())), what=("shape", "requires_grad"))
def check_ranks_disagree_in_an_added_group(compression: Any, what: str) -> None:
    odd = hvd.rank() == 1
    shape, trained = (8 + odd, True) if what == "shape" else (8, not odd)
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    added = nn.Parameter(torch.ones(shape), requires_grad=trained)
    optimizer.add_param_group({"params": [added]})
    (model(torch.ones(2, 5)).sum() + added.square().sum()).backward()
    raises(ValueError, "noname.1.0", "rank 1 has", f"this is rank {hvd.rank()}", call=optimizer.step)


def check_horovod_still_works_afterwards() -> None:
    """The checks above have left no collective behind: an optimizer still trains."""
    model = network()
    optimizer = wrap(model, sgd(model), DEF(RandomBlock(density=0.5)))
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert float(hvd.allreduce(torch.ones(1), op=hvd.Sum, name="test.alive")) == hvd.size()
