"""What scripts write into parameters between steps: best weights put back, rows, noise; what is the model then."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, BlockSign, CountSketch, Dense, DistEF, GlobalSketch, TopK
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, LOSSY_WITH_OPTIONS, has_local_models
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, more_in_full, several_ranks
from tests.multirank.support.networks import flat
from tests.multirank.support.training import make, shared_model, take_step, train, virtual_iterate, wrap

RANKS = (3,)
FULL_RANKS = (1, 2)
UPDATES = (DEF(BLOCK), DEF(BLOCK, 0.0), DistEF(), GlobalSketch(CountSketch(density=0.5, rows=3)))


@cases(EXACT, LOSSY_WITH_OPTIONS)
def check_each_rank_puts_its_best_weights_back(compression: Any) -> None:
    """The model is at once where it was when they were kept, and a step at rate 0 leaves it there."""
    model, optimizer = make(compression, momentum=0.0)
    train(model, optimizer, 10, lambda t: 0.1)
    best, point = copy.deepcopy(model.state_dict()), shared_model(model, optimizer)
    train(model, optimizer, 6, lambda t: 3.0, first=10)
    way = float((shared_model(model, optimizer) - point).norm())
    model.load_state_dict(best)
    assert float((shared_model(model, optimizer) - point).norm()) < 0.1 * way, "after loading"
    train(model, optimizer, 1, lambda t: 0.0, first=16)
    assert float((shared_model(model, optimizer) - point).norm()) < 0.1 * way, "after a step at rate 0"
    if not has_local_models(compression):
        same_everywhere(shared_model(model, optimizer), f"x, {compression}")


@cases(
    compression=(Dense(), EF(TopK(1 / 8)), DEF(BLOCK), DEF(BlockSign()), DistEF(), GlobalSketch(CountSketch(1 / 50))),
    row=more_in_full((50,), (0, 399)),
)
def check_a_row_that_all_ranks_write_alike_is_the_models(compression: Any, row: int) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(400, 8)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)

    def step(t: int) -> None:
        places = torch.arange(100, 300)[t :: 7 + hvd.rank()]
        optimizer.zero_grad()
        (model(places) ** 2).mean().backward()
        optimizer.step()

    for t in range(6):
        step(t)
    with torch.no_grad():
        model.weight[row] = 5.0  # no batch uses this row
    step(6)
    # Signs move every element a little at every step.
    assert float((model.weight.detach()[row] - 5.0).abs().max()) < 1e-3, "this rank's own point"
    with optimizer.consensus():
        assert float((model.weight.detach()[row] - 5.0).abs().max()) < 1e-3, "the model"


@cases(compression=UPDATES, step_between=(True, False))
def check_each_ranks_own_noise_is_part_of_its_update(compression: Any, step_between: bool) -> None:
    """The mean of what the ranks have written reaches the model, by the next step or by flush()."""
    torch.manual_seed(0)
    model = nn.Linear(10, 8, bias=False)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
    generator = torch.Generator(device="cpu").manual_seed(hvd.rank())

    def own() -> torch.Tensor:
        return torch.randn(8, 10, generator=generator, device="cpu").to(model.weight.device)

    for _ in range(4):
        model.weight.grad = own()
        optimizer.step()
    expected, noise = virtual_iterate(model, optimizer), own()
    with torch.no_grad():
        model.weight += noise
    expected += hvd.allreduce(noise, name="test.noise").reshape(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told once by name: the next check
        close(virtual_iterate(model, optimizer), expected, 1e-5, "the virtual iterate, at once")
        if step_between:
            model.weight.grad = torch.zeros(8, 10)
            optimizer.step()
        optimizer.flush()
    close(flat(model), expected, 1e-5, "the model after flush()")


@several_ranks
@cases(DEF(BLOCK), DistEF())
def check_own_values_are_told_of_once_and_can_be_adopted(compression: Any) -> None:
    model, optimizer = make(compression, momentum=0.0)
    train(model, optimizer, 4, lambda t: 0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in (4, 5):
            with torch.no_grad():
                model[0].weight += 1.0 + hvd.rank()
            take_step(model, optimizer, t)
    told = [str(w.message) for w in caught if "adopt_parameters" in str(w.message)]
    assert len(told) == 1 and "'0.weight'" in told[0], "once, by name"
    with torch.no_grad():
        model[0].weight.fill_(float(hvd.rank()))
    optimizer.adopt_parameters()
    assert bool((model[0].weight == (hvd.size() - 1) / 2).all()), "their mean"
    same_everywhere(flat(model), "the parameters")
    assert torch.equal(shared_model(model, optimizer), flat(model))
    assert optimizer.stats().residual_norm == 0


@cases(EXACT, LOSSY)
def check_the_same_data_on_all_ranks_is_no_write(compression: Any) -> None:
    """Passes counted anew, a group added, a parameter unfrozen: ranks coincide by chance then, nothing was loaded."""
    slope = torch.linspace(0.5, 1.5, 64)
    for event in ("nothing", "passes", "added", "unfrozen"):
        w, v = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64), requires_grad=event != "unfrozen")
        trained = [w, v] if event == "unfrozen" else [w]
        model = nn.ParameterDict({"w": w, "v": v})
        optimizer = wrap(model, torch.optim.SGD(trained, lr=0.1), compression)
        for t in range(12):
            if t == 6 and event == "passes":
                optimizer.set_backward_passes_per_step(1)
            if t == 6 and event == "added":
                optimizer.add_param_group({"params": [v]})
            if t == 6 and event == "unfrozen":
                v.requires_grad_(True)
            optimizer.zero_grad()
            both = t >= 6 and event in ("added", "unfrozen")
            ((w * slope).sum() + (v * slope).sum() * both).backward()
            optimizer.step()
        optimizer.zero_grad()
        optimizer.flush()
        close(w.detach(), -1.2 * slope, 1e-2, f"{event}, {compression}")


@cases(LOSSY)
def check_a_broadcast_of_one_ranks_weights_is_the_model(compression: Any) -> None:
    """As at the end of an epoch: from then on all are where that rank was."""
    model, optimizer = make(compression)
    train(model, optimizer, 5, lambda t: 0.05)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    sent = flat(model)
    x = shared_model(model, optimizer)
    close(x, sent, 0.05, "the shared model")
    same_everywhere(x, f"x, {compression}")
    train(model, optimizer, 3, lambda t: 0.05, first=5)
    same_everywhere(shared_model(model, optimizer), f"x, {compression}")
