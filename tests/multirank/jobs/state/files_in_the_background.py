"""``hvd_compress.checkpoint``: files written while training goes on, and errors of a writer, raised on every rank."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import Any, Iterator

import horovod.torch as hvd
import pytest
import torch

from hvd_compress import DEF, EF, checkpoint
from hvd_compress.checkpoint import background, files, saving
from tests.multirank.support.algorithm_cases import BLOCK
from tests.multirank.support.assertions import raises
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.checkpoints import last_rank, shared_directory
from tests.multirank.support.networks import flat
from tests.multirank.support.training import harmonic_rate, make, train

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


@contextmanager
def blocked_writers(error_on: int = -1) -> Iterator[threading.Event]:
    """Let writers of the background wait for an event, and fail on one rank then."""
    event, write = threading.Event(), files.write_state

    def blocked(*args: Any) -> Any:
        assert event.wait(60)
        if hvd.rank() == error_on:
            raise OSError("No space left on device")
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_state", blocked)
        try:
            yield event
        finally:
            event.set()


@cases(EF(BLOCK), DEF(BLOCK))
def check_training_goes_on_while_a_checkpoint_is_written(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 4, harmonic_rate)
    then = flat(model)
    with shared_directory() as where:
        with blocked_writers() as event:
            pending = checkpoint.save(where, model, optimizer, asynchronous=True)
            train(model, optimizer, 4, harmonic_rate, first=4)
            assert not pending.done(), "nothing can have been written yet"
            assert not torch.equal(flat(model), then)
            hvd.barrier()
            event.set()
            assert pending.wait() == where / "step-00000004"
            assert pending.done()
        again, resumed = make(compression, seed=1)
        checkpoint.load(where, again, resumed)
        assert torch.equal(flat(again), then), "the state at the time of save()"
        train(again, resumed, 4, harmonic_rate, first=4)
        assert torch.equal(flat(again), flat(model))


def check_the_next_save_and_load_wait() -> None:
    model, optimizer = make(EF(BLOCK))
    with shared_directory() as where:
        handles = [checkpoint.save(where, model, optimizer, step=s, asynchronous=True) for s in (1, 2, 3)]
        assert handles[0].done()
        assert handles[1].done()
        checkpoint.load(where, model, optimizer, step=3)
        assert handles[2].done()


@several_ranks
@cases(by=("wait", "save", "load"))
def check_a_writers_error_is_raised_on_every_rank(by: str) -> None:
    model, optimizer = make(EF(BLOCK))
    fragments = ("step-00000002", "No space left on device", f"(rank {last_rank()})")
    with shared_directory() as where, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.save(where, model, optimizer, step=1)
        with blocked_writers(error_on=last_rank()) as event:
            pending = checkpoint.save(where, model, optimizer, step=2, asynchronous=True)
            event.set()
            pending._thread.join()
        assert any(fragments[1] in str(w.message) for w in caught)
        if by == "wait":
            raises(checkpoint.CheckpointError, *fragments, call=pending.wait)
        elif by == "save":
            again = lambda: checkpoint.save(where, model, optimizer, step=3)  # noqa: E731
            raises(checkpoint.CheckpointError, *fragments, call=again)
            assert again() == where / "step-00000003"
            assert not (where / "step-00000002").exists()
            return
        checkpoint.load(where, model, optimizer)  # of step 1
        raises(
            checkpoint.CheckpointError, "step-00000002", call=lambda: checkpoint.load(where, model, optimizer, step=2)
        )


@several_ranks
def check_a_failure_to_write_is_raised_on_every_rank() -> None:
    model, optimizer = make(EF(BLOCK))
    with shared_directory() as where:
        with blocked_writers(error_on=last_rank()) as event:
            event.set()
            call = lambda: checkpoint.save(where, model, optimizer)  # noqa: E731
            raises(checkpoint.CheckpointError, "OSError: No space left", f"(rank {last_rank()})", call=call)
        assert not list(where.glob("*/checkpoint.json"))


@several_ranks
def check_a_rank_that_is_not_heard_of() -> None:
    """Its note never comes, as if it had died: the others do not wait for ever, and say whom they have missed."""
    model, optimizer = make(EF(BLOCK))
    with shared_directory() as where, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if hvd.rank() == 1:
            patch.setattr(background.FileAgreement, "_note", lambda *_: None)
        pending = checkpoint.save(where, model, optimizer, asynchronous=True, timeout=0.5)
        raises(checkpoint.CheckpointError, "nothing was heard of rank 1 for 0.5 s", "timeout=", call=pending.wait)
