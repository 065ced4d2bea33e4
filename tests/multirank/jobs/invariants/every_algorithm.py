"""Invariants of every algorithm at any number of ranks: mass, equal replicas, determinism, data-parallel if exact."""

from __future__ import annotations

import random
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from tests.multirank.support.algorithm_cases import EXACT, LOSSY
from tests.multirank.support.assertions import close
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.reference_checks import keep_mass
from tests.multirank.support.training import sgd, shared_model, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4, 8)
MPI_RANKS = (3, 8)
STEPS = 10


def rate(t: int) -> float:
    """Return the learning rate of step ``t``."""
    return 0.05 if t < STEPS // 2 else 0.005


@cases(EXACT, LOSSY)
def check_mass_is_kept_and_replicas_agree(compression: Any) -> None:
    keep_mass(compression, steps=STEPS)


@cases(EXACT, LOSSY)
def check_same_seed_same_bits(compression: Any) -> None:
    results = []
    for seed in (1, 2):  # global generators do not matter and do not change
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        model = network()
        states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"]
        optimizer = wrap(model, sgd(model, momentum=0.9), compression)
        train(model, optimizer, STEPS, rate)
        results.append(torch.cat((flat(model), shared_model(model, optimizer))))
        assert torch.equal(states[0], torch.get_rng_state()), f"torch's generator after {compression}"
        assert states[1] == random.getstate(), f"Python's generator after {compression}"
        key = np.random.get_state(legacy=False)["state"]["key"]
        assert np.array_equal(states[2], key), f"numpy's generator after {compression}"
    assert torch.equal(*results), f"{compression} depends on timing or on a generator"


@cases(EXACT)
def check_data_parallel_where_everything_is_sent(compression: Any) -> None:
    model = network(torch.float64)
    plain = sgd(model, momentum=0.9, weight_decay=1e-2, nesterov=True)
    for t in range(STEPS):
        plain.param_groups[0]["lr"] = rate(t)
        plain.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        for name, p in model.named_parameters():
            p.grad = hvd.allreduce(p.grad, name=f"test.plain.{name}")
        plain.step()
    twin = network(torch.float64)
    optimizer = wrap(twin, sgd(twin, momentum=0.9, weight_decay=1e-2, nesterov=True), compression)
    train(twin, optimizer, STEPS, rate)
    close(shared_model(twin, optimizer), flat(model), 1e-12, f"x with {compression}")
    if hvd.size() == 1:
        close(flat(twin), flat(model), 1e-12, f"parameters of one rank with {compression}")
