"""States of another algorithm: pending updates are kept where they mean the same, else lost with a warning."""

from __future__ import annotations

import warnings
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, LIEC, CountSketch, Dense, DistEF, GlobalSketch, LowRank, Policy, TopK
from tests.multirank.support.algorithm_cases import BLOCK, exchanges_updates, has_local_models
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.checkpoints import through_a_file
from tests.multirank.support.internals import residual_by_name
from tests.multirank.support.networks import flat
from tests.multirank.support.training import dropping_rate, make, shared_model, train, virtual_iterate

RANKS = (2,)
FULL_RANKS = (1, 3, 4)


def own_momentum(algorithm: Any) -> set[str]:
    """Return the layers whose momentum differs between ranks: updates are exchanged, or models are local."""
    if isinstance(algorithm, Policy):
        return {"2"}
    return {"0", "2"} if exchanges_updates(algorithm) or has_local_models(algorithm) else set()


_KINDS: tuple[Any, ...] = (
    Dense(),
    EF(BLOCK),
    LIEC(averaging_period=100),
    DEF(BLOCK),
    Policy(EF(BLOCK), patterns={"2.*": LIEC(averaging_period=100)}),
)
_KINDS_FULL: tuple[Any, ...] = (
    EF(TopK(0.25)),
    DEF(BLOCK, "auto"),
    DistEF(),
    GlobalSketch(CountSketch(columns=8, rows=3)),
    EF(LowRank(1)),
    EF(LowRank(2)),
)
KINDS = more_in_full(_KINDS, _KINDS_FULL)


@cases(
    before=KINDS,
    after=KINDS,
    flushed=more_in_full((False,), (True,)),
    where=lambda before, after, flushed: before != after,
)
def check_states_of_another_algorithm_load(before: Any, after: Any, flushed: bool) -> None:
    """The pending update is kept if it means the same; else it is lost with a warning, and without one if flushed."""
    what = f"from {before} to {after}, flushed={flushed}"
    model, optimizer = make(before, torch.float64)
    train(model, optimizer, 6, dropping_rate)
    if flushed:
        optimizer.flush()
    x, y = shared_model(model, optimizer), virtual_iterate(model, optimizer)
    again, resumed = make(after, torch.float64, seed=1)
    with optimizer.consensus():
        again.load_state_dict(through_a_file(model.state_dict()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        now = shared_model(again, resumed)
        point = virtual_iterate(again, resumed)
    close(now, x, 1e-12, f"x {what}")
    # A server's error is lost by the rank of its shard: warnings may differ between ranks.
    told = any("lost" in str(w.message) for w in caught)
    lost = bool(hvd.allreduce(torch.tensor([int(told)]), op=hvd.Sum, name="test.lost"))
    kept = torch.allclose(point, y, rtol=1e-9, atol=1e-9)
    assert kept or lost, f"y {what}: {[str(w.message) for w in caught]}"
    assert not (flushed and lost), f"nothing is pending, {what}: {[str(w.message) for w in caught]}"
    had, has = (own_momentum(algorithm) for algorithm in (before, after))
    if had - has:
        hvd.broadcast_optimizer_state(resumed, root_rank=0)
    train(again, resumed, 4, dropping_rate, first=6)
    with resumed.consensus():
        same_everywhere(flat(again), f"x {what}")
        assert torch.isfinite(flat(again)).all()


@cases(
    Policy(EF(BLOCK), patterns={"2.*": LIEC(averaging_period=100)}),
    Policy(EF(BLOCK), patterns={"0.*": LIEC(averaging_period=100)}),
    Policy(EF(BLOCK), patterns={"2.*": Dense()}),
)
def check_parameters_that_keep_their_algorithm_keep_their_residual(before: Any) -> None:
    """They may share a bucket with parameters that have another algorithm now, of which the pending update joins."""
    model, optimizer = make(before, torch.float64, momentum=0.0)
    train(model, optimizer, 6, dropping_rate)
    saved, y = residual_by_name(optimizer), virtual_iterate(model, optimizer)
    again, resumed = make(EF(BLOCK), torch.float64, seed=1, momentum=0.0)
    with optimizer.consensus():
        again.load_state_dict(through_a_file(model.state_dict()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        close(virtual_iterate(again, resumed), y, 1e-12, f"y from {before}")
    assert not any("lost" in str(w.message) for w in caught), f"from {before}"
    for name, values in residual_by_name(resumed).items():
        if name in saved:
            assert torch.equal(values, saved[name]) and values.any(), f"{name} from {before}"
