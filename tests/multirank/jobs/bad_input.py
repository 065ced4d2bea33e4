"""Bad input is a clear error on every rank, before any collective of the exchange, and never a hang."""

from __future__ import annotations

import os
import warnings
from typing import Callable

import harness
import horovod.torch as hvd
import torch
from common import network, raises, sgd, wrap
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

RANKS = (3,)
FULL_RANKS = (2,)


def attempt(model: nn.Module, compression: object = None, **kwargs: object) -> None:
    wrap(model, sgd(model), Dense() if compression is None else compression, **kwargs)


def check_values_of_compression() -> None:
    model = network()
    for density in (0, 2, float("nan"), -0.5):
        raises(ValueError, "density", repr(density), call=lambda d=density: attempt(model, DEF(RandomBlock(density=d))))
    raises(ValueError, "coefficient=1.5", "[0, 1]", call=lambda: attempt(model, DEF(RandomBlock(), 1.5)))
    raises(ValueError, "Lossy", "EF(", call=lambda: attempt(model, Dense(RandomBlock())))
    raises(ValueError, "RandomBlock", "EF(", call=lambda: attempt(model, RandomBlock()))
    raises(ValueError, "compression='def'", call=lambda: attempt(model, "def"))


def check_values_of_the_other_papers() -> None:
    model = network()
    wrong: list[tuple[Callable[[], object], tuple[str, ...]]] = [
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
    for build, fragments in wrong:
        raises(ValueError, *fragments, call=lambda b=build: attempt(model, b()))


def check_reduction() -> None:
    model = network()
    for compression in (DEF(RandomBlock()), EF(RandomBlock())):
        raises(ValueError, "Adasum", "Average", call=lambda c=compression: attempt(model, c, op=hvd.Adasum))
    raises(ValueError, "predivide", call=lambda: attempt(model, op=hvd.Sum, gradient_predivide_factor=2.0))
    raises(ValueError, "predivide", call=lambda: attempt(model, gradient_predivide_factor=0.0))
    raises(ValueError, "backward_passes_per_step must be > 0", call=lambda: attempt(model, backward_passes_per_step=0))
    raises(ValueError, "op=", call=lambda: attempt(model, op=17))
    for factor in (float("inf"), float("nan"), -1.0, "2", None):
        raises(
            ValueError,
            f"gradient_predivide_factor={factor!r}",
            "> 0",
            call=lambda f=factor: attempt(model, gradient_predivide_factor=f),
        )
    raises(ValueError, "backward_passes_per_step must be > 0", call=lambda: attempt(model, backward_passes_per_step=-1))
    for passes in (1.5, "2", None, True):
        raises(
            ValueError,
            f"backward_passes_per_step={passes!r}",
            "integer >= 1",
            call=lambda n=passes: attempt(model, backward_passes_per_step=n),
        )
    optimizer = wrap(model, sgd(model), Dense())
    for passes in (0, -1, 1.5, "2", None, True):
        raises(
            ValueError,
            "set_backward_passes_per_step",
            f"passes={passes!r}",
            "integer >= 1",
            call=lambda n=passes: optimizer.set_backward_passes_per_step(n),
        )
    assert optimizer.backward_passes_per_step == 1


def check_what_is_wrapped() -> None:
    model = network()
    for wrong, shown in ((None, "None"), (model, "Sequential"), (torch.optim.SGD, "SGD"), ("sgd", "'sgd'")):
        raises(
            ValueError,
            f"optimizer={shown}" if wrong is not torch.optim.SGD else shown,
            "torch.optim.Optimizer",
            call=lambda w=wrong: DistributedOptimizer(w, compression=Dense()),
        )


def check_process_sets() -> None:
    model = network()
    for wrong, shown in ((None, "None"), ("global", "'global'"), ([0], "[0]")):
        raises(
            ValueError,
            f"process_set={shown}",
            "ProcessSet",
            "hvd.add_process_set",
            call=lambda w=wrong: attempt(model, process_set=w),
        )
    raises(
        ValueError,
        "process_set=",
        "not registered",
        "hvd.add_process_set",
        call=lambda: attempt(model, process_set=hvd.ProcessSet([0])),
    )


def check_complex_parameters() -> None:
    model = network()
    model.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    for compression in (Dense(), EF(TopK()), DEF(RandomBlock())):
        raises(ValueError, "'phase'", "complex64", "view_as_complex", call=lambda c=compression: attempt(model, c))
        plain = network()
        optimizer = wrap(plain, sgd(plain), compression)
        raises(
            ValueError, "noname.1.0", "complex64", call=lambda o=optimizer: o.add_param_group({"params": [model.phase]})
        )
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


def check_ranks_disagree_in_what_is_frozen() -> None:
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


def check_ranks_disagree_in_an_added_group() -> None:
    odd = hvd.rank() == 1
    for compression in (Dense(), EF(RandomBlock()), DEF(RandomBlock()), EF(TopK())):
        for shape, trained in ((8 + odd, True), (8, not odd)):
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
    """Nothing above has left a collective behind, and a good optimizer still trains."""
    model = network()
    optimizer = wrap(model, sgd(model), DEF(RandomBlock(density=0.5)))
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert float(hvd.allreduce(torch.ones(1), op=hvd.Sum, name="test.alive")) == hvd.size()


if __name__ == "__main__":
    harness.main(globals())
