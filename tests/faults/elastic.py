"""An elastic job whose number of ranks changes: who stays keeps what it holds back, and all go on as one."""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from common import flat, held, loss_of, network, wrap

from hvd_compress import DEF, EF, LIEC, DistEF, RandomBlock

HOSTS, NAME, MOMENTUM, SIZES = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
BLOCK = RandomBlock(density=0.25)
# Of signs a server of one rank holds nothing back.
COMPRESSION = {"ef": EF(BLOCK), "def": DEF(BLOCK), "dist-ef": DistEF(BLOCK), "liec": LIEC(BLOCK, 100)}[NAME]
BEFORE, AFTER = (int(size) for size in SIZES.split("-"))
CHANGE_AT, END, LR = 6, 16, 0.05


def main() -> None:
    hvd.init()
    model = network()
    # Without momentum the optimizer has no state of its own: the step count must travel all the same.
    momentum = 0.9 if MOMENTUM == "momentum" else 0.0
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum), COMPRESSION)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0)
    owed: list[torch.Tensor] = []
    debts: list[torch.Tensor] = []

    def debt() -> torch.Tensor:
        """What all ranks together still owe, as an update (collective)."""
        with optimizer.consensus():
            shared = flat(model)
        with optimizer.consensus("virtual"):
            return shared - flat(model)

    def share() -> torch.Tensor:
        """What this rank brings into that: its worker's part of a mean, its shard of the server's error."""
        units = 1.0 if COMPRESSION.exchanges_updates else LR
        buffers = optimizer.state_dict()["hvd_compress"]["buffers"]
        parts = []
        for name, p in model.named_parameters():
            part = torch.zeros(p.numel())
            if "residual" in buffers:
                part += buffers["residual"][name].reshape(-1) / AFTER
            if "server" in buffers:
                begin = optimizer.state_dict()["hvd_compress"]["begins"][name]
                values = buffers["server"][name].reshape(-1)
                part[begin : begin + values.numel()] += values
            parts.append(part * units)
        return torch.cat(parts)

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: hvd.elastic.TorchState) -> None:
        if owed:
            assert torch.equal(held(optimizer), owed[-1]), "sync touched a survivor's residual"
            print("residual kept", flush=True)
        if hvd.size() == AFTER and not debts:
            everyone = hvd.allreduce(share() if owed else torch.zeros_like(flat(model)), op=hvd.Sum, name="test.debt")
            debts.append(debt())
            assert bool(everyone.any()), "nothing was held back"
            assert torch.allclose(debts[0], everyone, rtol=1e-4, atol=1e-6), (debts[0], everyone)
        while state.batch < END:
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), state.batch).backward()
            optimizer.step()
            state.batch += 1
            if state.batch == CHANGE_AT and hvd.size() == BEFORE and hvd.rank() == 0:
                HOSTS.write_text(f"localhost:{AFTER}\n")
            if state.batch > CHANGE_AT and hvd.size() == BEFORE:
                state.batch = CHANGE_AT  # wait for the change
            owed.append(held(optimizer))
            state.commit()

    train(state)
    assert hvd.size() == AFTER
    with optimizer.consensus():
        every = hvd.allgather(flat(model).reshape(1, -1), name="test.x")
        assert torch.equal(every[0], every[-1]), "replicas differ after the change"
    counts = hvd.allgather(torch.tensor([optimizer.state_dict()["hvd_compress"]["step"]]), name="test.steps")
    assert len(set(counts.tolist())) == 1, counts
    print(f"finished on {hvd.size()} ranks after {counts[0]} exchanges", flush=True)


main()
