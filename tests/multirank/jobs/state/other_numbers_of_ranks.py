"""A checkpoint of some ranks goes on with any other number of ranks, and nothing that they had not sent is lost."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch

import hvd_compress
from hvd_compress import DEF, EF, LIEC, DistEF
from tests.multirank.support.algorithm_cases import BLOCK, LOSSY_WITH_OPTIONS, exchanges_updates
from tests.multirank.support.assertions import close, raises
from tests.multirank.support.cases import PerJob, cases
from tests.multirank.support.checkpoints import through_a_file
from tests.multirank.support.internals import step_count
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import harmonic_rate, process_set, sgd, shared_model, train, virtual_iterate, wrap

RANKS = (4,)
FULL_RANKS = (5,)
PROCESS_SETS = True
STEPS = 10  # not one at which LIEC averages
QUICK, MORE, AT_FIVE = ("4-2", "2-4"), ("4-1", "3-2"), ("3-5", "5-3")
SEVERAL = PerJob(lambda job: AT_FIVE if job.ranks > 4 else (*QUICK, *MORE) if job.full else QUICK)


def first_ranks(number: int) -> Any:
    """Return a context in which the first ``number`` ranks are a process set."""
    return contextlib.nullcontext(hvd.global_process_set) if number == hvd.size() else process_set(list(range(number)))


class Saved:
    """What a job of ``ranks`` ranks has saved, on every rank of this launch, and the points that it was at.

    Args:
        inside: save inside of ``consensus()``.
        frozen: freeze the first layer and take two more steps before.
    """

    def __init__(self, compression: Any, ranks: int, inside: bool = False, frozen: bool = False) -> None:
        content: Any = None
        with first_ranks(ranks) as some:
            if some.included():
                model = network()
                optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, process_set=some)
                train(model, optimizer, STEPS, harmonic_rate)
                if frozen:
                    model[0].requires_grad_(False)
                    train(model, optimizer, 2, harmonic_rate, first=STEPS)
                    content = through_a_file([model.state_dict(), optimizer.state_dict()])
                    model[0].requires_grad_(True)
                x, y = shared_model(model, optimizer), virtual_iterate(model, optimizer)
                if frozen:
                    content = (*content, x, y)
                elif inside:
                    with optimizer.consensus():
                        own = (model.state_dict(), optimizer.state_dict())
                        content = (*through_a_file(list(own)), x, y)
                else:
                    content = (*through_a_file([model.state_dict(), optimizer.state_dict()]), x, y)
        every = [found for found in hvd.allgather_object(content, name="test.saved") if found is not None]
        self.models, self.states, points, iterates = zip(*every)
        self.x, self.y = points[0], iterates[0]


def resumed(saved: Saved, compression: Any, some: Any, rank: int) -> tuple[Any, Any]:
    """Return a model and an optimizer that go on from all ranks' states, with another rank's model."""
    model = network(seed=7)
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, process_set=some)
    model.load_state_dict(saved.models[rank % len(saved.models)])
    optimizer.load_state_dict(hvd_compress.merge_states(saved.states))
    return model, optimizer


@cases(compression=LOSSY_WITH_OPTIONS, change=SEVERAL)
def check_all_residuals_are_shared_out(compression: Any, change: str) -> None:
    """X and the virtual iterate are where they were, with as many ranks as there are now."""
    before, after = map(int, change.split("-"))
    saved = Saved(compression, before)
    with first_ranks(after) as some:
        if not some.included():
            return
        model, optimizer = resumed(saved, compression, some, hvd.rank())
        _, again = resumed(saved, compression, some, 0)
        assert step_count(optimizer) == step_count(again) == STEPS
        x, y = shared_model(model, optimizer), virtual_iterate(model, optimizer)
        pending = saved.x - saved.y
        assert bool(pending.any()), "nothing was pending"
        close(x, saved.x, 1e-7, f"x, {change}")
        close(x - y, pending, 1e-6 if compression.exchanges_updates else 2e-5, f"pending updates, {change}")
        train(model, optimizer, 4, harmonic_rate, first=STEPS)
        every = hvd.allgather(shared_model(model, optimizer).reshape(1, -1), name="test.x", process_set=some)
        assert torch.equal(every[0], every[-1]), "replicas"


@cases(compression=LOSSY_WITH_OPTIONS)
def check_what_is_pending_for_a_frozen_layer_is_shared_out(compression: Any) -> None:
    saved = Saved(compression, 4, frozen=True)
    with first_ranks(2) as some:
        if some.included():
            model, optimizer = resumed(saved, compression, some, hvd.rank())
            x, y = shared_model(model, optimizer), virtual_iterate(model, optimizer)
            close(x, saved.x, 1e-7, "x")
            close(x - y, saved.x - saved.y, 1e-6 if compression.exchanges_updates else 2e-5, "pending updates")


@cases(EF(BLOCK), DEF(BLOCK), LIEC(BLOCK, 8))
def check_momenta_are_averaged(compression: Any) -> None:
    saved = Saved(compression, 4)
    momenta = [state["state"][0]["momentum_buffer"] for state in saved.states]
    merged = hvd_compress.merge_states(iter(saved.states))["state"][0]["momentum_buffer"]
    close(merged, torch.stack(momenta).double().mean(0), 1e-6, "momentum")
    if all(torch.equal(momenta[0], other) for other in momenta):
        assert torch.equal(merged, momenta[0]), "the same on all ranks"
    else:
        assert exchanges_updates(compression) or isinstance(compression, LIEC)


@cases(DEF(BLOCK), DistEF(BLOCK))
def check_local_steps_and_a_state_saved_at_the_shared_model(compression: Any) -> None:
    """Saved in the middle of local steps, inside of consensus(): steps not sent yet are pending updates too."""
    if isinstance(compression, DEF):
        compression = DEF(BLOCK, local_steps=3)  # of 10 steps one has not been sent
    saved = Saved(compression, 4, inside=True)
    with first_ranks(2) as some:
        if some.included():
            model, optimizer = resumed(saved, compression, some, hvd.rank())
            close(shared_model(model, optimizer), saved.x, 1e-7, "x")
            close(
                shared_model(model, optimizer) - virtual_iterate(model, optimizer), saved.x - saved.y, 1e-6, "pending"
            )


@cases(EF(BLOCK), DEF(BLOCK))
def check_another_model_that_was_loaded_is_the_model(compression: Any) -> None:
    """Weights that no rank has saved were chosen by the script: they are the model, and pending updates join it."""
    saved = Saved(compression, 4)
    with first_ranks(2) as some:
        if some.included():
            model = network(seed=3)
            optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, process_set=some)
            optimizer.load_state_dict(hvd_compress.merge_states(saved.states))
            x = shared_model(model, optimizer)
            assert torch.equal(x, flat(network(seed=3)))
            close(x - virtual_iterate(model, optimizer), saved.x - saved.y, 2e-5, "pending updates")


def check_states_that_do_not_belong_together_are_refused() -> None:
    saved = Saved(EF(BLOCK), 3)
    one, two, three = saved.states
    for states, fragment in (
        ([], "states is empty"),
        ([one, two], "2 states of a job of 3 ranks"),
        ([two, one, three], "state 0 should be of"),
        ([one, two, three, three], "state 3 should be of"),
        ([one, {k: v for k, v in two.items() if k != "hvd_compress"}, three], "state 1 should be of"),
        ([{"state": {}, "param_groups": []}], "the state of rank 0 has no entry"),
    ):
        raises(ValueError, "merge_states", fragment, call=partial(hvd_compress.merge_states, states))


def check_a_merged_state_is_the_same_training_at_one_rank() -> None:
    """One rank that takes over from four has all of their pending updates, and applies them at once."""
    saved = Saved(DEF(BLOCK), 4)
    with first_ranks(1) as some:
        if some.included():
            model, optimizer = resumed(saved, DEF(BLOCK), some, 0)
            optimizer.flush()
            close(flat(model), saved.y, 1e-6, "the virtual iterate, after flush()")
            loss_of(model, 0, 0).backward()
            optimizer.step()
