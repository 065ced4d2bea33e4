"""Checkpoints, broadcasts, elastic save and restore, consensus, flush, replicas."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import everything
import harness
import horovod.torch as hvd
import torch
from common import (
    close,
    flat,
    held,
    loss_of,
    network,
    raises,
    resumes_exactly,
    same_everywhere,
    saved,
    through_a_file,
    train,
    virtual,
    wrap,
)
from everything import BLOCK
from horovod.torch.elastic import TorchState

from hvd_compress import DEF, EF, LIEC, Dense, Policy

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
LOSSY = (*everything.LOSSY, DEF(BLOCK, 0.0), DEF(BLOCK, "auto"), Policy(LIEC(BLOCK, 4), dense_dims=1))


def make(compression: Any, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
    model = network(dtype, seed)
    settings = {"lr": 0.05, "momentum": 0.9, **kwargs}
    return model, wrap(model, torch.optim.SGD(model.parameters(), **settings), compression)


def rate(t: int) -> float:
    return 0.05 / (1 + t // 7)


def check_resume_is_bit_exact() -> None:
    for compression in LOSSY:
        resumes_exactly(lambda seed, c=compression: make(c, seed=seed), 10, 10, rate, str(compression))


def check_load_into_a_running_optimizer() -> None:
    for compression in LOSSY:
        model, optimizer = make(compression)
        train(model, optimizer, 5, rate)
        with optimizer.consensus():
            weights = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        point = flat(model)
        train(model, optimizer, 5, rate, first=5)
        end = flat(model)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert torch.equal(flat(model), point), "the parameters stand where they stood, not at x"
        train(model, optimizer, 5, rate, first=5)
        assert torch.equal(flat(model), end), f"{compression}"


def check_plain_torch_state_empties_the_residual() -> None:
    for compression in LOSSY:
        model, optimizer = make(compression)
        train(model, optimizer, 5, rate)
        # A server's shard may have nothing left; of signs that of one rank never has.
        owed = torch.tensor([optimizer.stats().residual_norm])
        assert hvd.size() == 1 or float(hvd.allreduce(owed, name="test.owed")) > 0, f"{compression}"
        plain = torch.optim.SGD(network().parameters(), lr=0.05, momentum=0.9)
        optimizer.load_state_dict(plain.state_dict())
        assert optimizer.stats().residual_norm == 0


def check_state_is_readable_by_the_plain_optimizer() -> None:
    for momentum in (0.9, 0.0):
        for compression in (Dense(), *LOSSY):
            model, optimizer = make(compression, momentum=momentum)
            train(model, optimizer, 3, rate)
            plain = torch.optim.SGD(network().parameters(), lr=0.05, momentum=momentum)
            plain.load_state_dict(optimizer.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer, 2, rate, first=3)


def check_another_ranks_residual_is_refused() -> None:
    if hvd.size() == 1:
        return
    model, optimizer = make(DEF(BLOCK))
    train(model, optimizer, 5, rate)
    state = hvd.broadcast_object(optimizer.state_dict(), root_rank=0)
    weights = hvd.broadcast_object(model.state_dict(), root_rank=0)
    again, resumed = make(DEF(BLOCK))
    train(again, resumed, 1, rate)
    again.load_state_dict(weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(state)
    refused = any("residual of rank 0" in str(w.message) and "flush()" in str(w.message) for w in caught)
    assert refused == (hvd.rank() != 0)
    assert (resumed.stats().residual_norm > 0) == (hvd.rank() == 0)
    with resumed.consensus():
        assert torch.equal(flat(again), saved(optimizer, "shared"))


def check_where_nothing_is_held_back_nothing_is_said_to_be_lost() -> None:
    for compression in (Dense(), EF(BLOCK), DEF(BLOCK)):
        model, optimizer = make(compression)
        train(model, optimizer, 3, rate)
        optimizer.flush()
        state = hvd.broadcast_object(optimizer.state_dict(), root_rank=0)
        weights = hvd.broadcast_object(model.state_dict(), root_rank=0)
        again, resumed = make(compression)
        again.load_state_dict(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(state)
            train(again, resumed, 1, rate, first=3)


def check_wrong_shapes_are_refused() -> None:
    model, optimizer = make(DEF(BLOCK))
    train(model, optimizer, 1, rate)
    state = copy.deepcopy(optimizer.state_dict())
    state["hvd_compress"]["buffers"]["residual"]["0.bias"] = torch.zeros(9)
    raises(ValueError, "0.bias", "(9,)", "(7,)", call=lambda: optimizer.load_state_dict(state))


def check_broadcast_of_optimizer_state() -> None:
    """Only rank 0 has restored a state: nobody hangs, momenta spread, and residuals stay their ranks' own."""
    for compression in (Dense(), *LOSSY):
        for momentum in (0.9, 0.0):
            model, optimizer = make(compression, momentum=momentum)
            if hvd.rank() == 0:
                twin = network()
                plain = torch.optim.SGD(twin.parameters(), lr=0.02, momentum=momentum)
                loss_of(twin, 0, 0).backward()
                plain.step()
                optimizer.load_state_dict(plain.state_dict())
                model.load_state_dict(twin.state_dict())
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            if momentum:
                assert optimizer.param_groups[0]["lr"] == 0.02
                same_everywhere(optimizer.state[model[0].weight]["momentum_buffer"].flatten(), "momentum")
            train(model, optimizer, 5, rate)
            with optimizer.consensus():
                same_everywhere(flat(model), f"x with {compression}")
            if compression == Dense():
                continue
            owed = held(optimizer)
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            assert torch.equal(held(optimizer), owed), "a broadcast must not touch residuals"


def check_a_state_loaded_on_one_rank_is_broadcast() -> None:
    """Horovod's recipe: rank 0 restores a checkpoint, the others are new. Loading must not wait for them."""
    for compression in (Dense(), *LOSSY):
        model, optimizer = make(compression)
        train(model, optimizer, 4, rate)
        with optimizer.consensus():
            weights = through_a_file(model.state_dict())
            wanted = flat(model)
        state = through_a_file(optimizer.state_dict())
        again, resumed = make(compression, seed=1)
        if hvd.rank() == 0:
            again.load_state_dict(weights)
            resumed.load_state_dict(state)
        hvd.broadcast_parameters(again.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(resumed, root_rank=0)
        with resumed.consensus():
            # Not equal: what is broadcast is rank 0's own point.
            close(flat(again), wanted, 0.2, f"x of the checkpoint, {compression}")
            same_everywhere(flat(again), f"x after the broadcast, {compression}")
        train(again, resumed, 4, rate, first=4)
        with resumed.consensus():
            same_everywhere(flat(again), f"x after going on, {compression}")


def check_elastic_save_restore_sync() -> None:
    for compression in LOSSY:
        model, optimizer = make(compression)
        state = TorchState(model=model, optimizer=optimizer, batch=0)
        state.sync()
        train(model, optimizer, 5, rate)
        state.save()
        point, owed = flat(model), held(optimizer)
        train(model, optimizer, 3, rate, first=5)
        end = flat(model)
        state.restore()
        assert torch.equal(flat(model), point)
        assert torch.equal(held(optimizer), owed)
        train(model, optimizer, 3, rate, first=5)
        assert torch.equal(flat(model), end), f"restored run differs with {compression}"
        owed = held(optimizer)
        state.sync()
        assert torch.equal(held(optimizer), owed), "sync leaves a survivor's residual alone"
        train(model, optimizer, 3, rate, first=8)
        with optimizer.consensus():
            same_everywhere(flat(model), f"x after sync, {compression}")


def check_consensus() -> None:
    for compression in (Dense(), *LOSSY):
        model, optimizer = make(compression)
        with optimizer.consensus():
            close(flat(model), flat(network()), 1e-7, "before the first step x is the model")
        train(model, optimizer, 4, rate)
        point = flat(model)
        for name in ("shared", "virtual"):
            with optimizer.consensus(point=name):
                same_everywhere(flat(model), name)
                forbidden = {
                    "step": (),
                    "synchronize": (),
                    "load_state_dict": (optimizer.state_dict(),),
                    "add_param_group": ({"params": [torch.nn.Parameter(torch.ones(2))]},),
                }
                for action, args in forbidden.items():
                    raises(
                        RuntimeError,
                        f"{action}() inside optimizer.consensus(",
                        call=lambda o=optimizer, a=action, args=args: getattr(o, a)(*args),
                    )
                raises(RuntimeError, "consensus", call=lambda o=optimizer: o.consensus().__enter__())
            assert torch.equal(flat(model), point), "bitwise back"
            raises(KeyError, call=lambda o=optimizer, n=name: fail_inside(o, n))
            assert torch.equal(flat(model), point), "bitwise back after an exception"
        raises(ValueError, "point='mine'", call=lambda o=optimizer: o.consensus("mine").__enter__())
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), 4).backward()
        if hvd.size() > 1:
            raises(RuntimeError, "between loss.backward()", call=lambda o=optimizer: o.consensus().__enter__())
        optimizer.step()


def fail_inside(optimizer: Any, name: str) -> None:
    with optimizer.consensus(name):
        raise KeyError(name)


def check_flush_empties_residuals_into_the_model() -> None:
    for compression in LOSSY:
        model, optimizer = make(compression, torch.float64)
        train(model, optimizer, 6, rate)
        wanted = virtual(model, optimizer)
        optimizer.flush()
        close(flat(model), wanted, 1e-13, f"parameters with {compression}")
        same_everywhere(flat(model), "parameters")
        assert optimizer.stats().residual_norm == 0
        train(model, optimizer, 2, rate, first=6)


def check_an_evaluation_in_inference_mode_before_the_first_step() -> None:
    """All buffers are made then, and training must be able to write to them."""
    for compression in (*everything.EXACT, *LOSSY):
        results = []
        for evaluated in (False, True):
            model, optimizer = make(compression)
            if evaluated:
                for name in ("shared", "virtual"):
                    with torch.inference_mode(), optimizer.consensus(name):
                        loss_of(model, hvd.rank(), 0)
            train(model, optimizer, 4, rate)
            with torch.inference_mode(), optimizer.consensus():
                results.append(flat(model).clone())
            with torch.inference_mode():
                optimizer.flush()
            train(model, optimizer, 2, rate, first=4)
        assert torch.equal(*results), f"{compression}"


def check_replica_check_stops_every_rank() -> None:
    os.environ["HVD_COMPRESS_CHECK_REPLICAS"] = "1"
    model, optimizer = make(DEF(BLOCK))
    del os.environ["HVD_COMPRESS_CHECK_REPLICAS"]
    assert optimizer.check_replicas
    train(model, optimizer, 3, rate)
    if hvd.size() == 1:
        return
    shared = optimizer.state_dict()["hvd_compress"]["buffers"]["shared"]["2.weight"]
    if hvd.rank() == hvd.size() - 1:
        shared[0, 0] += 1e-6
    raises(
        RuntimeError,
        "replicas differ",
        "'2.weight'",
        f"[{hvd.size() - 1}]",
        call=lambda: train(model, optimizer, 1, rate, first=3),
    )


if __name__ == "__main__":
    harness.main(globals())
