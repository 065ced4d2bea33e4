"""gs-SGD, gTop-k and PowerSGD equal numpy; by mpirun also with trees of messages."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, CountSketch, GlobalSketch, GlobalTopK, LowRank
from tests.multirank.support import reference, reference_flat
from tests.multirank.support import reference_compressors as maps
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import by_mpi, cases, more_in_full, only, several_ranks, without_mpi
from tests.multirank.support.compressor_cases import EXCHANGES, SKETCH, with_trees
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.reference import joined
from tests.multirank.support.reference_checks import STEPS, compare, heavy_ball, schedule, torch_sgd
from tests.multirank.support.training import process_set, sgd, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2, 3, 4, 5)
PROCESS_SETS = True
WHOLE = CountSketch(density=1.0, rows=3)
TREE = GlobalSketch(SKETCH, "tree", dense_vectors=False)


@cases(exchange=EXCHANGES, masking=more_in_full((True,), (False,)))
def check_global_sketch(exchange: str, masking: bool) -> None:
    expected = reference_flat.global_sketch(
        hvd.size(), STEPS, 8, 4, maps.matrix_of(SKETCH), schedule, heavy_ball, masking
    )
    compare(GlobalSketch(SKETCH, exchange, masking=masking, dense_vectors=False), expected, heavy_ball)


@cases(rescale=(True, False))
def check_global_sketch_beside_dense_vectors(rescale: bool) -> None:
    """The number k follows from the size of the sketch; a change of rate changes residuals unless rescaled."""
    sketch = CountSketch(density=0.5, rows=3, seed=4)
    names = tuple(name for name in maps.ORDER if len(reference.SHAPES[name]) > 1)
    k = sketch.width(sum(maps.SIZES[name] for name in names)) // 2
    expected = reference_flat.global_sketch(
        hvd.size(), STEPS, k, 4, maps.matrix_of(sketch, names), schedule, heavy_ball, True, rescale
    )
    compare(GlobalSketch(sketch, rescale_residual=rescale), expected, heavy_ball)


def check_numbers_of_candidates_and_applied_coordinates() -> None:
    expected = reference_flat.global_sketch(hvd.size(), 30, 3, 2, maps.matrix_of(SKETCH), schedule, heavy_ball, True)
    compare(GlobalSketch(SKETCH, k=3, candidates=2, dense_vectors=False), expected, heavy_ball)


@cases(exchange=EXCHANGES)
def check_sketches_of_everything_are_data_parallel(exchange: str) -> None:
    model = network(torch.float64)
    optimizer = wrap(model, torch_sgd(model, heavy_ball()), GlobalSketch(WHOLE, exchange, masking=False))
    train(model, optimizer, STEPS, schedule)
    run = reference.data_parallel(hvd.size(), STEPS, schedule, heavy_ball)
    close(flat(model), joined(run.x), 1e-9, exchange)


@with_trees
@cases(density=(0.1, 0.5, 1.0), rescale=(True, False), where=lambda density, rescale: rescale or density == 0.1)
def check_global_topk(density: float, rescale: bool) -> None:
    expected = reference_flat.global_topk(hvd.size(), STEPS, density, schedule, heavy_ball, rescale)
    compare(GlobalTopK(density, rescale), expected, heavy_ball)


@only(lambda job: job.mpi and job.ranks > 2)
@cases(TREE, GlobalTopK(0.1))
def check_trees_within_a_process_set(algorithm: Any) -> None:
    """The members are not neighbours, and their ranks differ from those within the set."""
    if algorithm == TREE:
        expected = reference_flat.global_sketch(2, STEPS, 8, 4, maps.matrix_of(SKETCH), schedule, heavy_ball, True)
    else:
        expected = reference_flat.global_topk(2, STEPS, 0.1, schedule, heavy_ball)
    with process_set([0, 2]) as some:
        model = network(torch.float64)
        optimizer = wrap(model, torch_sgd(model, heavy_ball()), algorithm, process_set=some)
        for t in range(STEPS if some.included() else 0):
            optimizer.param_groups[0]["lr"] = schedule(t)
            optimizer.zero_grad()
            loss_of(model, some.rank(), t).backward()
            optimizer.step()
        if some.included():
            close(flat(model), joined(maps.from_flat(expected.x)), 1e-5, f"x with {algorithm}")
        every = hvd.allgather(flat(model).reshape(1, -1), name="test.trees")
        assert torch.equal(every[0], every[2])


@several_ranks
@without_mpi
@cases(
    {
        "GlobalSketch": (GlobalSketch(exchange="tree"), "GlobalSketch: exchange='tree'"),
        "GlobalTopK": (GlobalTopK(), "GlobalTopK"),
    }
)
def check_trees_are_refused_without_mpi(case: tuple[Any, str]) -> None:
    algorithm, owner = case
    model = network()
    raises(
        ValueError,
        owner,
        "needs MPI",
        f"rank {hvd.rank()}",
        "mpirun",
        call=lambda: wrap(model, sgd(model), algorithm),
    )


@by_mpi
@cases({"GlobalSketch": (TREE, 3 * 16 * 8), "GlobalTopK": (GlobalTopK(0.1), None)})
def check_trees_send_as_much_as_in_the_papers(case: tuple[Any, Any]) -> None:
    """A rank sends at most log2(P) tables, or as many messages of gTop-k; nothing else grows with P."""
    algorithm, message = case
    rounds = (hvd.size() - 1).bit_length()
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), algorithm)
    train(model, optimizer, 3, lambda t: 0.1)
    # Allreduces of the candidates' values, and of the check for overwritten parameters: a number per parameter.
    ring = 2 * (hvd.size() - 1) / hvd.size()
    sent = optimizer.stats().bytes_sent - ring * 5 * 4
    if message is not None:
        values = ring * min(maps.TOTAL, 4 * 8) * 8
        assert sent - values <= (rounds + 1) * message + 1e-6, (sent, values, message)
    else:
        k = int(0.1 * maps.TOTAL)
        assert sent <= (rounds + 1) * (-(-k * 12 // 8) * 8) + 1e-6, sent


@cases(EF(LowRank(1)), DEF(LowRank(1), 0.3), EF(LowRank(7)), DEF(LowRank(7), 0.0))
def check_low_rank_equals_powersgd_of_the_mean(algorithm: Any) -> None:
    """All ranks decode the same; at full rank it is the mean, where residuals cancel."""
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model, lr=0.02, momentum=0.9), algorithm)
    history: list[torch.Tensor] = []

    def remember(t: int) -> None:
        with optimizer.consensus():
            history.append(flat(model))

    train(model, optimizer, 30, lambda t: 0.02, after_step=remember)
    same_everywhere(torch.cat(history), f"x with {algorithm}")
    if algorithm.compressor == LowRank(7):  # full rank: everything is sent
        run = reference.data_parallel(hvd.size(), 30, lambda t: 0.02, lambda: reference.SGD(0.9))
        close(history[-1], joined(run.x), 1e-9, str(algorithm))
