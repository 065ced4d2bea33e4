"""gs-SGD, gTop-k and PowerSGD: what ranks find or make together; trees of messages where the job uses MPI."""

from __future__ import annotations

from typing import Any

import harness
import horovod.torch as hvd
import numpy as np
import reference
import reference_flat as plain
import torch
from common import close, flat, joined, loss_of, network, raises, same_everywhere, train, wrap
from comparing import STEPS, compare, heavy_ball, keep_mass, schedule
from kinds import MPI, SKETCH, exchanges
from reference_more import matrix_of

from hvd_compress import DEF, EF, CountSketch, GlobalSketch, GlobalTopK, LowRank

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2, 3, 4, 5)
EXACT = CountSketch(density=1.0, rows=3)


def check_global_sketch() -> None:
    for masking in (True, False):
        expected = plain.global_sketch(hvd.size(), STEPS, 8, 4, matrix_of(SKETCH), schedule, heavy_ball, masking)
        for exchange in exchanges():
            compare(GlobalSketch(SKETCH, exchange, masking=masking, dense_vectors=False), expected, heavy_ball)


def check_global_sketch_beside_dense_vectors() -> None:
    """Also k by the size of the sketch, and a change of learning rate that changes what is owed."""
    sketch = CountSketch(density=0.5, rows=3, seed=4)
    names = tuple(name for name in plain.ORDER if len(reference.SHAPES[name]) > 1)
    k = sketch.width(sum(plain.SIZES[name] for name in names)) // 2
    for rescale in (True, False):
        expected = plain.global_sketch(
            hvd.size(), STEPS, k, 4, matrix_of(sketch, names), schedule, heavy_ball, True, rescale
        )
        compare(GlobalSketch(sketch, rescale_residual=rescale), expected, heavy_ball)


def check_how_many_are_looked_for_and_applied() -> None:
    expected = plain.global_sketch(hvd.size(), 30, 3, 2, matrix_of(SKETCH), schedule, heavy_ball, True)
    compare(GlobalSketch(SKETCH, k=3, candidates=2, dense_vectors=False), expected, heavy_ball)


def check_sketches_of_everything_are_data_parallel() -> None:
    for exchange in exchanges():
        model = network(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)
        train(model, wrap(model, sgd, GlobalSketch(EXACT, exchange, masking=False)), STEPS, schedule)
        run = reference.data_parallel(hvd.size(), STEPS, schedule, heavy_ball)
        close(flat(model), np.concatenate([run.x[n].reshape(-1) for n in reference.SHAPES]), 1e-9, exchange)


def check_global_topk() -> None:
    if not MPI() and hvd.size() > 1:
        return
    for density, rescale in ((0.1, True), (0.1, False), (0.5, True), (1.0, True)):
        expected = plain.global_topk(hvd.size(), STEPS, density, schedule, heavy_ball, rescale)
        compare(GlobalTopK(density, rescale), expected, heavy_ball)


def check_trees_within_a_process_set() -> None:
    """Ranks that are not neighbours and whose numbers are not those of the set."""
    if not MPI() or hvd.size() < 3:
        return
    some = hvd.add_process_set([0, 2])
    sketch = GlobalSketch(SKETCH, "tree", dense_vectors=False)
    by_sketch = plain.global_sketch(2, STEPS, 8, 4, matrix_of(SKETCH), schedule, heavy_ball, True)
    by_merging = plain.global_topk(2, STEPS, 0.1, schedule, heavy_ball)
    for algorithm, expected in ((sketch, by_sketch), (GlobalTopK(0.1), by_merging)):
        model, config = network(torch.float64), heavy_ball()
        sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=config.momentum, weight_decay=config.weight_decay)
        optimizer = wrap(model, sgd, algorithm, process_set=some)
        for t in range(STEPS if some.included() else 0):
            optimizer.param_groups[0]["lr"] = schedule(t)
            optimizer.zero_grad()
            loss_of(model, some.rank(), t).backward()
            optimizer.step()
        if some.included():
            close(flat(model), joined(plain.from_flat(expected.x)), 1e-5, f"x with {algorithm}")
        every = hvd.allgather(flat(model).reshape(1, -1), name="test.trees")
        assert torch.equal(every[0], every[2])
    hvd.remove_process_set(some)


def check_mass() -> None:
    sketches: list[Any] = [
        GlobalSketch(SKETCH, exchange, masking=masking) for exchange in exchanges() for masking in (True, False)
    ]
    trees = [GlobalTopK(0.1)] if MPI() or hvd.size() == 1 else []
    for algorithm in (*sketches, *trees, EF(LowRank(1)), DEF(LowRank(2), 0.3)):
        keep_mass(algorithm)
        keep_mass(algorithm, op=hvd.Sum)


def check_trees_are_refused_without_mpi() -> None:
    if MPI() or hvd.size() == 1:
        return
    for algorithm, owner in (
        (GlobalSketch(exchange="tree"), "GlobalSketch: exchange='tree'"),
        (GlobalTopK(), "GlobalTopK"),
    ):
        model = network()
        raises(
            ValueError,
            owner,
            "needs MPI",
            f"rank {hvd.rank()}",
            "mpirun",
            call=lambda a=algorithm, m=model: wrap(m, torch.optim.SGD(m.parameters(), lr=0.1), a),
        )


def check_trees_send_what_the_papers_say() -> None:
    """Per rank at most log2(P) tables up and as many messages of gTop-k; nothing grows with P otherwise."""
    if not MPI():
        return
    rounds = (hvd.size() - 1).bit_length()
    sketched = GlobalSketch(SKETCH, "tree", dense_vectors=False)
    for algorithm, message in ((sketched, 3 * 16 * 8), (GlobalTopK(0.1), None)):
        model = network(torch.float64)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithm)
        train(model, optimizer, 3, lambda t: 0.1)
        # The ring for the candidates' values, and the watch for rewritten parameters, which is a number per parameter.
        ring = 2 * (hvd.size() - 1) / hvd.size()
        sent = optimizer.stats().bytes_sent - ring * 5 * 4
        if message is not None:
            values = ring * min(plain.TOTAL, 4 * 8) * 8
            assert sent - values <= (rounds + 1) * message + 1e-6, (sent, values, message)
        else:
            k = int(0.1 * plain.TOTAL)
            assert sent <= (rounds + 1) * (-(-k * 12 // 8) * 8) + 1e-6, sent


def check_low_rank_equals_powersgd_of_the_mean() -> None:
    """What is decoded is common; at full rank it is the mean, and what ranks hold back cancels out."""
    for algorithm in (EF(LowRank(1)), DEF(LowRank(1), 0.3), EF(LowRank(7)), DEF(LowRank(7), 0.0)):
        model = network(torch.float64)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), algorithm)
        history: list[torch.Tensor] = []

        def remember(t: int, history: list[torch.Tensor] = history, optimizer: Any = optimizer) -> None:
            with optimizer.consensus():
                history.append(flat(model))  # noqa: B023

        train(model, optimizer, 30, lambda t: 0.02, after_step=remember)
        same_everywhere(torch.cat(history), f"x with {algorithm}")
        if algorithm.compressor == LowRank(7):  # full rank: everything is sent
            run = reference.data_parallel(hvd.size(), 30, lambda t: 0.02, lambda: reference.SGD(0.9))
            close(history[-1], np.concatenate([run.x[n].reshape(-1) for n in reference.SHAPES]), 1e-9, str(algorithm))


if __name__ == "__main__":
    harness.main(globals())
