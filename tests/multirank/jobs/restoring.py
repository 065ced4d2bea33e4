"""States and models that do not belong together, and what is built in another order: what stays, what is said."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import flat, network, raises, same_everywhere, sgd, train, wrap
from everything import BLOCK

from hvd_compress import DEF, EF, LIEC, DistEF

RANKS = (2,)
FULL_RANKS = (1, 3)
HOLDING: tuple[Any, ...] = (EF(BLOCK), DEF(BLOCK), DistEF(BLOCK), LIEC(BLOCK, 8))


def trained(compression: Any) -> tuple[Any, Any]:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    train(model, optimizer, 4, lambda t: 0.1)
    return model, optimizer


def check_the_same_rank_of_another_world_is_another() -> None:
    for compression in HOLDING:
        model, optimizer = trained(compression)
        state = copy.deepcopy(optimizer.state_dict())
        state["hvd_compress"]["size"] += 1
        again = network()
        resumed = wrap(again, sgd(again), compression)
        again.load_state_dict(model.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.load_state_dict(state)
            with resumed.consensus():  # where buckets are cut at the first exchange
                pass
        said = [str(w.message) for w in caught if "holds the residual of rank" in str(w.message)]
        assert said or optimizer.stats().residual_norm == 0, compression
        assert resumed.stats().residual_norm == 0, compression


def check_an_unknown_format_is_refused() -> None:
    _, optimizer = trained(DEF(BLOCK))
    state = optimizer.state_dict()
    state["hvd_compress"]["format"] = 1
    raises(ValueError, "format 1", call=lambda: optimizer.load_state_dict(state))


def check_a_model_of_the_users_choice_stays() -> None:
    """Parameters that are neither the state's model nor this rank's own point: fine-tuning with a kept momentum."""
    for compression in (DEF(BLOCK), DistEF(BLOCK)):
        _, optimizer = trained(compression)
        state = copy.deepcopy(optimizer.state_dict())
        model = network(seed=4)
        resumed = wrap(model, sgd(model), compression)
        resumed.load_state_dict(state)
        with resumed.consensus():
            assert torch.equal(flat(model), flat(network(seed=4))), compression
        train(model, resumed, 2, lambda t: 0.1)
        with resumed.consensus():
            same_everywhere(flat(model), f"x of a model of the user's, {compression}")


def check_ranks_that_start_apart_are_told() -> None:
    if hvd.size() == 1:
        return
    for compression in (DEF(BLOCK), DistEF(BLOCK)):
        model = network(seed=hvd.rank())
        optimizer = wrap(model, sgd(model), compression)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, 1, lambda t: 0.1)
        assert any("broadcast_parameters" in str(w.message) for w in caught), compression


def check_a_scheduler_that_was_built_before() -> None:
    """It has the optimizer that was wrapped, and looks whether that has stepped."""
    model = network()
    plain = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1)
    optimizer = wrap(model, plain, EF(BLOCK))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, lambda t: 0.1)
        scheduler.step()
    assert abs(optimizer.param_groups[0]["lr"] - 0.01) < 1e-12


if __name__ == "__main__":
    harness.main(globals())
