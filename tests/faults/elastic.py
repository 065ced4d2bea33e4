"""An elastic job: one worker trains, a second joins; the first keeps its residual, both go on as one."""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from common import flat, loss_of, network, saved, wrap

from hvd_compress import DEF, EF, RandomBlock

HOSTS, NAME = Path(sys.argv[1]), sys.argv[2]
BLOCK = RandomBlock(density=0.25)
COMPRESSION = {"ef": EF(BLOCK), "def": DEF(BLOCK)}[NAME]
GROW_AT, END = 6, 16


def main() -> None:
    hvd.init()
    model = network()
    # Without momentum the optimizer has no state of its own: the step count must travel all the same.
    momentum = 0.9 if sys.argv[3] == "momentum" else 0.0
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum), COMPRESSION)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0)
    owed: list[torch.Tensor] = []

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        if owed:
            assert torch.equal(saved(optimizer, "residual"), owed[-1]), "sync touched a survivor's residual"
            print("residual kept", flush=True)
        while state.batch < END:
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), state.batch).backward()
            optimizer.step()
            state.batch += 1
            if state.batch == GROW_AT and hvd.size() == 1:
                HOSTS.write_text("localhost:2\n")
            if state.batch > GROW_AT and hvd.size() == 1:
                state.batch = GROW_AT  # wait for the second worker
            owed.append(saved(optimizer, "residual"))
            state.commit()

    train(state)
    assert hvd.size() == 2
    with optimizer.consensus():
        every = hvd.allgather(flat(model).reshape(1, -1), name="test.x")
        assert torch.equal(every[0], every[1]), "replicas differ after growing"
    counts = hvd.allgather(torch.tensor([optimizer.state_dict()["hvd_compress"]["step"]]), name="test.steps")
    assert len(set(counts.tolist())) == 1, counts
    print(f"finished on {hvd.size()} ranks after {counts[0]} exchanges", flush=True)


main()
