"""An elastic job whose number of ranks changes: all that the former ranks had not sent is kept, and all agree.

Arguments: a file of hosts, the algorithm, "momentum" or "none", and the numbers of ranks, such as "1-2".
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, LIEC, DistEF
from tests.multirank.support.algorithm_cases import BLOCK
from tests.multirank.support.assertions import close
from tests.multirank.support.internals import step_count
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
    points: list[torch.Tensor] = []

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: hvd.elastic.TorchState) -> None:
        if hvd.size() == AFTER and (points or AFTER > BEFORE):
            require_all_pending(points[-2:] or [torch.zeros_like(flat(model))] * 2)
        while state.batch < END:
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), state.batch).backward()
            optimizer.step()
            state.batch += 1
            if state.batch == CHANGE_AT and hvd.size() == BEFORE and hvd.rank() == 0:
                HOSTS.write_text(f"localhost:{AFTER}\n")
            if state.batch > CHANGE_AT and hvd.size() == BEFORE:
                state.batch = CHANGE_AT
                time.sleep(0.3)  # until the change is noticed: few steps on one batch
            points.extend((shared_model(model, optimizer), virtual_iterate(model, optimizer)))
            state.commit()

    def require_all_pending(before: list[torch.Tensor]) -> None:
        """Fail unless what all former ranks had not sent at the last commit is what the present ones have not sent."""
        x, y = (hvd.broadcast(point, root_rank=0, name="test.point") for point in before)
        now = shared_model(model, optimizer)
        assert bool((x - y).any()), "all residuals were zero"
        close(now, x, 1e-6, "the shared model")
        close(now - virtual_iterate(model, optimizer), x - y, 2e-5, "pending updates")
        print("pending updates kept", flush=True)

    train(state)
    assert hvd.size() == AFTER
    with optimizer.consensus():
        every = hvd.allgather(flat(model).reshape(1, -1), name="test.x")
        assert torch.equal(every[0], every[-1]), "replicas differ after the change"
    counts = hvd.allgather(torch.tensor([step_count(optimizer)]), name="test.steps")
    assert len(set(counts.tolist())) == 1, counts
    print(f"finished on {hvd.size()} ranks after {counts[0]} exchanges", flush=True)


main()
