"""States that do not belong to this optimizer: torch's own, another rank's, another job's, another model's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, LIEC, Dense, DistEF
from tests.multirank.support.algorithm_cases import BLOCK, LOSSY, LOSSY_WITH_OPTIONS, has_local_models
from tests.multirank.support.assertions import raises, same_everywhere
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.internals import add_a_rank, set_format, set_residual, shared_copy
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import harmonic_rate, make, sgd, shared_model, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
WITH_RESIDUAL: tuple[Any, ...] = (EF(BLOCK), DEF(BLOCK), DistEF(BLOCK), LIEC(BLOCK, 8))


def trained(compression: Any) -> tuple[Any, Any]:
    """Return a network and its optimizer after four steps."""
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    train(model, optimizer, 4, lambda t: 0.1)
    return model, optimizer


@cases(LOSSY_WITH_OPTIONS)
def check_a_plain_state_clears_the_residual(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 5, harmonic_rate)
    # One rank's residual may be zero: that of a server's shard, and that of signs if there is no other rank.
    norm = torch.tensor([optimizer.stats().residual_norm])
    assert hvd.size() == 1 or float(hvd.allreduce(norm, name="test.norm")) > 0, f"{compression}"
    plain = torch.optim.SGD(network().parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.stats().residual_norm == 0


@cases(compression=(LOSSY, DEF(BLOCK, local_steps=3)), loads=(False, True))
def check_a_plain_state_leaves_the_shared_model(compression: Any, loads: bool) -> None:
    """A plain state has no residuals; x does not change, or is the model that was loaded before."""
    model = network()
    optimizer = wrap(model, sgd(model, momentum=0.9), compression)
    train(model, optimizer, 5, lambda t: 0.05)
    x = shared_model(model, optimizer)
    if loads:
        model.load_state_dict(network(seed=4).state_dict())
    optimizer.load_state_dict(sgd(network(), momentum=0.9).state_dict())
    if not has_local_models(compression) and compression.local_steps == 1:
        with optimizer.consensus():
            expected = flat(network(seed=4)) if loads else x
            assert torch.equal(flat(model), expected), f"{compression}, loads={loads}"
    train(model, optimizer, 6, lambda t: 0.05, first=5)
    with optimizer.consensus():
        same_everywhere(flat(model), f"after a plain state, {compression}, loads={loads}")


@cases(compression=(Dense(), LOSSY_WITH_OPTIONS), momentum=(0.9, 0.0))
def check_state_is_readable_by_the_plain_optimizer(compression: Any, momentum: float) -> None:
    model, optimizer = make(compression, momentum=momentum)
    train(model, optimizer, 3, harmonic_rate)
    plain = torch.optim.SGD(network().parameters(), lr=0.05, momentum=momentum)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, harmonic_rate, first=3)


@several_ranks
def check_another_ranks_residual_is_refused() -> None:
    model, optimizer = make(DEF(BLOCK))
    train(model, optimizer, 5, harmonic_rate)
    state = hvd.broadcast_object(optimizer.state_dict(), root_rank=0)
    weights = hvd.broadcast_object(model.state_dict(), root_rank=0)
    again, resumed = make(DEF(BLOCK))
    train(again, resumed, 1, harmonic_rate)
    again.load_state_dict(weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(state)
    refused = any("residual of rank 0" in str(w.message) and "flush()" in str(w.message) for w in caught)
    assert refused == (hvd.rank() != 0)
    assert (resumed.stats().residual_norm > 0) == (hvd.rank() == 0)
    with resumed.consensus():
        assert torch.equal(flat(again), shared_copy(optimizer))


@cases(*WITH_RESIDUAL)
def check_the_residual_of_a_job_of_another_size_is_refused(compression: Any) -> None:
    model, optimizer = trained(compression)
    state = copy.deepcopy(optimizer.state_dict())
    add_a_rank(state)
    again = network()
    resumed = wrap(again, sgd(again), compression)
    again.load_state_dict(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(state)
        with resumed.consensus():  # buckets are made here, if at the first exchange
            pass
    warned = [str(w.message) for w in caught if "holds the residual of rank" in str(w.message)]
    assert warned or optimizer.stats().residual_norm == 0, compression
    assert resumed.stats().residual_norm == 0, compression


@cases(Dense(), EF(BLOCK), DEF(BLOCK))
def check_no_warning_without_a_residual(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 3, harmonic_rate)
    optimizer.flush()
    state = hvd.broadcast_object(optimizer.state_dict(), root_rank=0)
    weights = hvd.broadcast_object(model.state_dict(), root_rank=0)
    again, resumed = make(compression)
    again.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
        train(again, resumed, 1, harmonic_rate, first=3)


def check_wrong_shapes_are_refused() -> None:
    model, optimizer = make(DEF(BLOCK))
    train(model, optimizer, 1, harmonic_rate)
    state = copy.deepcopy(optimizer.state_dict())
    set_residual(state, "0.bias", torch.zeros(9))
    raises(ValueError, "0.bias", "(9,)", "(7,)", call=lambda: optimizer.load_state_dict(state))


def check_an_unknown_format_is_refused() -> None:
    _, optimizer = trained(DEF(BLOCK))
    state = optimizer.state_dict()
    set_format(state, 1)
    raises(ValueError, "format 1", call=lambda: optimizer.load_state_dict(state))


@cases(DEF(BLOCK), DistEF(BLOCK))
def check_a_model_of_the_users_choice_does_not_change(compression: Any) -> None:
    """The parameters are neither the state's model nor this rank's own point, as in fine-tuning with kept momentum."""
    _, optimizer = trained(compression)
    state = copy.deepcopy(optimizer.state_dict())
    model = network(seed=4)
    resumed = wrap(model, sgd(model), compression)
    resumed.load_state_dict(state)
    with resumed.consensus():
        assert torch.equal(flat(model), flat(network(seed=4))), compression
    train(model, resumed, 2, lambda t: 0.1)
    with resumed.consensus():
        same_everywhere(flat(model), f"x of another model, {compression}")
