"""What holds for every wrapped optimizer class: state broadcasts, missing gradients, Adasum."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import close, flat, loss_of, network, same_everywhere, train, wrap
from torch import nn

from hvd_compress import DEF, EF, Dense, Identity, RandomBlock

RANKS = (2,)
FULL_RANKS = (1, 3)
BLOCK = RandomBlock(density=0.25)
EXACT = (Dense(), EF(Identity()), DEF(Identity()))
LOSSY = (EF(BLOCK), DEF(BLOCK))
# Not here: LBFGS (Horovod refuses to broadcast it), SparseAdam (sparse gradients only), Muon (matrices only).
NAMES = (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
CLASSES = [getattr(torch.optim, name) for name in NAMES if hasattr(torch.optim, name)]


def build(cls: Any, model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    wanted = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    known = inspect.signature(cls.__init__).parameters
    optimizer: torch.optim.Optimizer = cls(model.parameters(), **{k: v for k, v in wanted.items() if k in known})
    return optimizer


def entries(optimizer: Any, model: nn.Module) -> torch.Tensor:
    """Everything the optimizer remembers about the parameters, as one vector."""
    values = [torch.as_tensor(v) for p in model.parameters() for _, v in sorted(optimizer.state[p].items())]
    return torch.cat([v.detach().double().reshape(-1) for v in values])


def check_state_of_every_class_is_broadcast() -> None:
    """Rank 0 alone has restored a state, and other options; a new optimizer's state is made without a step of ours."""
    for cls in CLASSES:
        for compression in (Dense(), *LOSSY):
            model = network(seed=hvd.rank())
            optimizer = wrap(model, build(cls, model, lr=0.01 * (1 + hvd.rank())), compression)
            if hvd.rank() == 0:
                twin = network(seed=5)
                plain = build(cls, twin)
                for t in range(2):
                    plain.zero_grad()
                    loss_of(twin, 0, t).backward()
                    plain.step()
                model.load_state_dict(twin.state_dict())
                optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
            # To make a state, Horovod takes a step with zero gradients, which would decay the weights.
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            broadcast = flat(model)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            what = f"{cls.__name__}, {compression}"
            assert torch.equal(flat(model), broadcast), f"parameters moved, {what}"
            same_everywhere(flat(model), f"parameters, {what}")
            same_everywhere(entries(optimizer, model), f"state, {what}")
            assert optimizer.param_groups[0]["lr"] == 0.01
            for t in range(3):
                optimizer.zero_grad()
                loss_of(model, hvd.rank(), t).backward()
                optimizer.step()
            with optimizer.consensus():
                same_everywhere(flat(model), f"x, {what}")
                assert torch.isfinite(flat(model)).all()


def check_step_count_is_right_as_soon_as_it_was_broadcast() -> None:
    """A checkpoint, or an elastic commit, may be taken before the next step."""
    for compression in (Dense(), *LOSSY):
        model = network()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
        if hvd.rank() == 0:
            state = optimizer.state_dict()
            state["hvd_compress"]["step"] = 7
            optimizer.load_state_dict(state)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        counts = [optimizer.state_dict()["hvd_compress"]["step"]]
        train(model, optimizer, 1, lambda t: 0.1)
        counts.append(optimizer.state_dict()["hvd_compress"]["step"])
        assert counts == [7, 8], f"{counts} with {compression}"


def check_missing_gradients_count_as_zeros() -> None:
    """Also under momentum and weight decay, and for parameters that no rank has used."""
    for compression in EXACT:
        for recipe in ("step", "synchronize", "closure"):
            results = []
            for distributed in (True, False):
                torch.manual_seed(0)
                model = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
                plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
                optimizer: Any = wrap(model, plain, compression) if distributed else plain
                for t in range(6):
                    loss = model[(hvd.rank() + t) % 2](torch.ones(2, 3)).square().sum()
                    optimizer.zero_grad()
                    if not distributed:
                        loss.backward()
                        # One rank trains as it would without us: no gradient, no step.
                        for name, p in model.named_parameters() if hvd.size() > 1 else ():
                            grad = torch.zeros_like(p) if p.grad is None else p.grad
                            p.grad = hvd.allreduce(grad, name=f"test.missing.{name}")
                        optimizer.step()
                    elif recipe == "closure":
                        optimizer.step(lambda: (loss.backward(), loss)[1])  # noqa: B023
                    else:
                        loss.backward()
                        if recipe == "synchronize":
                            optimizer.synchronize()
                            assert hvd.size() == 1 or all(p.grad is not None for p in model.parameters())
                            with optimizer.skip_synchronize():
                                optimizer.step()
                        else:
                            optimizer.step()
                if distributed:
                    with optimizer.consensus():
                        results.append(flat(model))
                else:
                    results.append(flat(model))
            close(results[0], results[1], 1e-5, f"parameters with {compression}, {recipe}")


def check_adasum_is_horovods_own() -> None:
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), Dense(), op=hvd.Adasum)
    assert issubclass(type(optimizer), torch.optim.SGD)
    assert type(optimizer).synchronize.__module__ == "horovod.torch.optimizer"
    assert optimizer._compression is hvd.Compression.none


if __name__ == "__main__":
    harness.main(globals())
