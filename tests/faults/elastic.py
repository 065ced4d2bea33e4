"""An elastic job whose number of ranks changes: surviving ranks keep their residuals, and all agree afterwards.

Arguments: a file of hosts, the algorithm, "momentum" or "none", and the numbers of ranks, such as "1-2".
"""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, LIEC, DistEF
from tests.multirank.support.algorithm_cases import BLOCK, exchanges_updates
from tests.multirank.support.internals import pending_update_share, residuals, step_count
from tests.multirank.support.networks import flat, loss_of
from tests.multirank.support.training import make, shared_model, virtual_iterate

HOSTS, NAME, MOMENTUM, SIZES = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
# DistEF by blocks: with signs, the server of a single rank has no residual.
COMPRESSION = {"ef": EF(BLOCK), "def": DEF(BLOCK), "dist-ef": DistEF(BLOCK), "liec": LIEC(BLOCK, 100)}[NAME]
BEFORE, AFTER = (int(size) for size in SIZES.split("-"))
CHANGE_AT, END, LR = 6, 16, 0.05


def main() -> None:
    """Train, change the number of ranks once, and train on."""
    hvd.init()
    # Without momentum the optimizer has no state of its own: the step count must be broadcast all the same.
    model, optimizer = make(COMPRESSION, lr=LR, momentum=0.9 if MOMENTUM == "momentum" else 0.0)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0)
    saved: list[torch.Tensor] = []
    pending: list[torch.Tensor] = []

    def pending_update() -> torch.Tensor:
        """Return the pending update of all ranks together (collective)."""
        return shared_model(model, optimizer) - virtual_iterate(model, optimizer)

    def share() -> torch.Tensor:
        """Return this rank's share of the pending update."""
        return pending_update_share(model, optimizer, AFTER) * (1.0 if exchanges_updates(COMPRESSION) else LR)

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: hvd.elastic.TorchState) -> None:
        if saved:
            assert torch.equal(residuals(optimizer), saved[-1]), "sync changed a survivor's residual"
            print("residual kept", flush=True)
        if hvd.size() == AFTER and not pending:
            mine = share() if saved else torch.zeros_like(flat(model))
            everyone = hvd.allreduce(mine, op=hvd.Sum, name="test.pending")
            pending.append(pending_update())
            assert bool(everyone.any()), "all residuals were zero"
            assert torch.allclose(pending[0], everyone, rtol=1e-4, atol=1e-6), (pending[0], everyone)
        while state.batch < END:
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), state.batch).backward()
            optimizer.step()
            state.batch += 1
            if state.batch == CHANGE_AT and hvd.size() == BEFORE and hvd.rank() == 0:
                HOSTS.write_text(f"localhost:{AFTER}\n")
            if state.batch > CHANGE_AT and hvd.size() == BEFORE:
                state.batch = CHANGE_AT  # wait for the change
            saved.append(residuals(optimizer))
            state.commit()

    train(state)
    assert hvd.size() == AFTER
    with optimizer.consensus():
        every = hvd.allgather(flat(model).reshape(1, -1), name="test.x")
        assert torch.equal(every[0], every[-1]), "replicas differ after the change"
    counts = hvd.allgather(torch.tensor([step_count(optimizer)]), name="test.steps")
    assert len(set(counts.tolist())) == 1, counts
    print(f"finished on {hvd.size()} ranks after {counts[0]} exchanges", flush=True)


main()
