"""What is owed survives: checkpoints of several algorithms and local steps, buckets cut anew, rates that change."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import (
    close,
    flat,
    network,
    resumes_exactly,
    same_everywhere,
    shared,
    through_a_file,
    train,
    virtual,
    wrap,
)
from everything import BLOCK, FULL

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    BlockSign,
    CountSketch,
    Dense,
    DistEF,
    GlobalSketch,
    Identity,
    LowRank,
    Policy,
    RandomBlock,
    TopK,
)

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
# Buckets of one class, group and dtype, whose coefficients differ.
POLICIES: tuple[Any, ...] = (Policy(DEF(BLOCK), dense_dims=1), Policy(DEF(BLOCK, 1.0), patterns={"2.*": DEF(BLOCK)}))
if FULL:
    POLICIES += (
        Policy(DEF(BLOCK, "auto"), dense_dims=1),
        Policy(DEF(BLOCK), patterns={"*bias": DEF(TopK(0.5), 0.0)}),
        Policy(DEF(BLOCK, "auto"), patterns={"2.*": DEF(RandomBlock(0.5), "auto")}),
        Policy(GlobalSketch(CountSketch(columns=8, rows=3)), patterns={"2.weight": DEF(BLOCK, 1.0)}),
    )


def rate(t: int) -> float:
    return 0.05 if t < 5 else 0.01


def make(compression: Any, seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, Any]:
    model = network(dtype, seed)
    sgd = torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **kwargs})
    return model, wrap(model, sgd, compression)


def goes_on(compression: Any, steps: int, what: str) -> None:
    resumes_exactly(lambda seed: make(compression, seed, torch.float32), steps, 7, rate, what)


def check_policies_resume_exactly() -> None:
    for compression in POLICIES:
        goes_on(compression, 6, str(compression))


def check_local_steps_resume_exactly() -> None:
    for compression in (DEF(BLOCK, 0.3, local_steps=3), DEF(TopK(0.25), 1.0, local_steps=3)):
        for steps in (6, 7, 8):
            goes_on(compression, steps, f"{compression} after {steps} steps")


def check_local_steps_count_for_the_virtual_point() -> None:
    """y moves by the mean of the local steps, in mid-cycle too, and flush() loses none of them."""
    model, optimizer = make(DEF(BLOCK, 0.3, local_steps=3), momentum=0.0)
    for t in range(8):
        before, start = flat(model), virtual(model, optimizer)
        train(model, optimizer, 1, rate, first=t)
        if t % 3 != 2:  # after an exchange the parameters have moved for other reasons
            moved = hvd.allreduce(flat(model) - before, name="test.moved")
            close(virtual(model, optimizer), start + moved, 1e-13, f"y after step {t}")
    wanted = virtual(model, optimizer)
    optimizer.flush()
    close(flat(model), wanted, 1e-13, "parameters after flush()")
    same_everywhere(flat(model), "parameters after flush()")
    train(model, optimizer, 2, rate, first=8)
    assert optimizer.state_dict()["hvd_compress"]["local_steps_done"] == 2, "a new cycle has begun"


def check_a_rate_set_between_steps_changes_no_debt() -> None:
    for compression in (EF(BLOCK), EF(BlockSign()), DEF(BLOCK), DistEF(), LIEC(averaging_period=8)):
        for lr in (0.01, 0.3, 0.0):
            model, optimizer = make(compression)
            train(model, optimizer, 6, lambda t: 0.05)
            wanted = virtual(model, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
            close(virtual(model, optimizer), wanted, 1e-14, f"y at rate {lr} with {compression}")
            optimizer.flush()
            close(flat(model), wanted, 1e-13, f"parameters after flush() at rate {lr} with {compression}")


def grown(compression: Any, frozen: bool) -> tuple[Any, Any]:
    """The second layer joins after five steps, when the rate falls: buckets of their own.

    Args:
        frozen: it has been there, frozen; else it comes as a parameter group.
    """
    model = network(torch.float64)
    later = list(model[2].parameters())
    sgd = torch.optim.SGD((model if frozen else model[0]).parameters(), lr=0.05, momentum=0.9)
    for p in later:
        p.requires_grad_(not frozen)
    optimizer = wrap(model, sgd, compression)
    train(model, optimizer, 5, rate)
    if frozen:
        for p in later:
            p.requires_grad_()
    else:
        optimizer.add_param_group({"params": later})
    train(model, optimizer, 6, rate, first=5)
    return model, optimizer


def check_buckets_that_are_cut_otherwise() -> None:
    """Loaded where both layers are there from the start: nothing owed is lost, and random blocks go on alike."""
    compressions: tuple[Any, ...] = (
        DEF(BLOCK),
        DEF(BLOCK, "auto"),
        EF(BLOCK),
        EF(TopK(0.25)),
        DistEF(),
        DistEF(BLOCK),
        LIEC(BLOCK, 100),
        LIEC(),
    )
    for compression, frozen in itertools.product(compressions, (False, True)):
        model, optimizer = grown(compression, frozen)
        wanted = virtual(model, optimizer)
        saved: tuple[Any, Any] = (model, optimizer)
        for times in ("once", "twice, with no step between"):
            again = network(torch.float64, 1)
            groups = [{"params": list(part.parameters())} for part in ((again,) if frozen else (again[0], again[2]))]
            resumed = wrap(again, torch.optim.SGD(groups, lr=0.05, momentum=0.9), compression)
            again.load_state_dict(through_a_file(saved[0].state_dict()))
            resumed.load_state_dict(through_a_file(saved[1].state_dict()))
            close(virtual(again, resumed), wanted, 1e-12, f"y after loading {times}, {compression}")
            saved = (again, resumed)
        train(again, resumed, 4, rate, first=11)
        with resumed.consensus():
            same_everywhere(flat(again), f"x after resuming, {compression}")
        if compression in (DEF(BLOCK), EF(BLOCK)):
            train(model, optimizer, 4, rate, first=11)
            close(flat(again), flat(model), 1e-12, f"resumed against uninterrupted, {compression}")


def own_momentum(algorithm: Any) -> set[str]:
    """Layers whose momentum each rank keeps for itself: wherever updates are exchanged, or models are local."""
    if isinstance(algorithm, Policy):
        return {"2"}
    return {"0", "2"} if algorithm.exchanges_updates or algorithm.local_models else set()


def check_states_of_another_algorithm_load() -> None:
    """What is held back goes on where it means the same; else it is lost with a warning, and without one if flushed."""
    kinds: tuple[Any, ...] = (
        Dense(),
        EF(BLOCK),
        EF(TopK(0.25)),
        LIEC(averaging_period=100),
        DEF(BLOCK),
        DEF(BLOCK, "auto"),
        DistEF(),
        GlobalSketch(CountSketch(columns=8, rows=3)),
        EF(LowRank(1)),
        EF(LowRank(2)),
        Policy(EF(BLOCK), patterns={"2.*": LIEC(averaging_period=100)}),
    )
    for before, after in itertools.permutations(kinds, 2):
        for flushed in (False, True):
            what = f"from {before} to {after}, flushed={flushed}"
            model, optimizer = make(before)
            train(model, optimizer, 6, rate)
            if flushed:
                optimizer.flush()
            x, y = shared(model, optimizer), virtual(model, optimizer)
            again, resumed = make(after, seed=1)
            with optimizer.consensus():
                again.load_state_dict(through_a_file(model.state_dict()))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                resumed.load_state_dict(through_a_file(optimizer.state_dict()))
                now = shared(again, resumed)
                point = virtual(again, resumed)
            close(now, x, 1e-12, f"x {what}")
            # A server's error is lost where its shard is: on some ranks.
            told = any("lost" in str(w.message) for w in caught)
            lost = bool(hvd.allreduce(torch.tensor([int(told)]), op=hvd.Sum, name="test.lost"))
            kept = torch.allclose(point, y, rtol=1e-9, atol=1e-9)
            assert kept or lost, f"y {what}: {[str(w.message) for w in caught]}"
            assert not (flushed and lost), f"nothing is owed, {what}: {[str(w.message) for w in caught]}"
            had, has = (own_momentum(algorithm) for algorithm in (before, after))
            warned = any("momentum" in str(w.message) for w in caught)
            assert warned == (hvd.size() > 1 and bool(had - has)), what
            if had - has:
                hvd.broadcast_optimizer_state(resumed, root_rank=0)
            train(again, resumed, 4, rate, first=6)
            with resumed.consensus():
                same_everywhere(flat(again), f"x {what}")
                assert torch.isfinite(flat(again)).all()


def check_parameters_that_keep_their_algorithm_keep_what_they_are_owed() -> None:
    """They may share a bucket with some that have another one now."""
    for before, after in (
        (Policy(EF(BLOCK), patterns={"2.*": LIEC(averaging_period=100)}), EF(BLOCK)),
        (Policy(EF(BLOCK), patterns={"0.*": LIEC(averaging_period=100)}), EF(BLOCK)),
        (Policy(EF(BLOCK), patterns={"2.*": Dense()}), EF(BLOCK)),
    ):
        model, optimizer = make(before, momentum=0.0)
        train(model, optimizer, 6, rate)
        owed = optimizer.state_dict()["hvd_compress"]["buffers"]["residual"]
        again, resumed = make(after, seed=1, momentum=0.0)
        with optimizer.consensus():
            again.load_state_dict(through_a_file(model.state_dict()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
            virtual(again, resumed)
        found = resumed.state_dict()["hvd_compress"]["buffers"]["residual"]
        for name, values in found.items():
            if name in owed:
                assert torch.equal(values, owed[name]) and values.any(), f"{name} from {before}"
            else:
                assert not values.any(), f"{name} from {before}"


def check_sum_is_horovods_sum() -> None:
    """With weight decay and with Adam, whose steps are not proportional to the gradient."""
    kinds: tuple[tuple[Any, dict[str, float]], ...] = (
        (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    )
    for kind, settings in kinds:
        model = network(torch.float64)
        theirs = hvd.DistributedOptimizer(kind(model.parameters(), **settings), model.named_parameters(), op=hvd.Sum)
        train(model, theirs, 20, lambda t: 0.02)
        for compression in (EF(Identity()), LIEC(Identity(), 5), DEF(Identity()), DistEF(Identity())):
            # Updates of Adam are averaged, not made of an averaged gradient.
            if kind is not torch.optim.SGD and compression.exchanges_updates and hvd.size() > 1:
                continue
            twin = network(torch.float64)
            ours = wrap(twin, kind(twin.parameters(), **settings), compression, op=hvd.Sum)
            train(twin, ours, 20, lambda t: 0.02)
            with ours.consensus():
                close(flat(twin), flat(model), 1e-9, f"x with {compression} and {kind.__name__}")


if __name__ == "__main__":
    harness.main(globals())
