"""Thousands of steps in which parameters are added, frozen, saved, loaded, joined, discarded at random from a seed.

Losses are linear and the optimizer is plain SGD, so the virtual iterate is known: what all gradients that counted have
made of the start. Every algorithm has its turn. Run by ``make soak``:

    horovodrun -np 4 python -m tests.soak.soak --steps 20000 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import random
import zlib
from pathlib import Path
from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    BlockSign,
    CountSketch,
    Dense,
    DistEF,
    DistributedOptimizer,
    GlobalSketch,
    LowRank,
    Policy,
    RandomBlock,
    RandomK,
    TopK,
)
from tests.multirank.support.waiting import wait_without_spinning, yield_to_other_ranks

ALGORITHMS: tuple[Any, ...] = (
    Dense(),
    EF(RandomBlock(0.1)),
    EF(TopK(0.1)),
    EF(BlockSign()),
    EF(LowRank(2)),
    DEF(RandomBlock(0.1)),
    DEF(RandomK(0.1), "auto"),
    DEF(BlockSign(), 0.5),
    DistEF(),
    DistEF(RandomBlock(0.2), BlockSign()),
    LIEC(averaging_period=7),
    GlobalSketch(CountSketch(columns=64, rows=3)),
    Policy(EF(TopK(0.2)), dense_dims=1),
)
SHAPES = ((24, 16), (16,), (16, 40), (3, 5, 7), (1,))
TOLERANCE = 1e-5  # of the length of the path; float32 sums of thousands of steps
MEMORY = 48 * 2**20  # bytes by which a process may grow after its first third


class Soak:
    """One algorithm, one model, and where its virtual iterate should be."""

    def __init__(self, algorithm: Any, seed: int) -> None:
        self.random = random.Random(seed)  # the same on all ranks
        self.algorithm, self.step = algorithm, 0
        self.model = nn.ParameterDict({f"p{i}": nn.Parameter(self.draw(f"start{i}", s)) for i, s in enumerate(SHAPES)})
        inner = torch.optim.SGD(list(self.model.values()), lr=0.1)
        self.optimizer = DistributedOptimizer(inner, list(self.model.items()), algorithm)
        self.expected = {name: p.detach().double().clone() for name, p in self.model.items()}
        self.way = dict.fromkeys(self.model, 1.0)  # the length of each one's path

    def draw(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return random numbers that depend on ``key`` only."""
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return torch.randn(shape, generator=generator)

    def gradient(self, name: str, rank: int, step: int) -> Tensor:
        """Return a rank's gradient of a parameter: a part that is common, and one of its own."""
        shape = tuple(self.model[name].shape)
        return self.draw(f"{name} {step // 50}", shape) + self.draw(f"{name} {rank} {step}", shape)

    def backward(self, factor: float = 1.0) -> None:
        """Compute this rank's gradients."""
        self.optimizer.zero_grad()
        trained = [(n, p) for n, p in self.model.items() if p.requires_grad]
        loss = torch.stack([(p * self.gradient(n, hvd.rank(), self.step)).sum() for n, p in trained]).sum()
        (factor * loss).backward()

    def train(self, ranks: int) -> None:
        """Take a step of which the first ``ranks`` ranks are part."""
        if hvd.rank() < ranks:
            self.backward()
            self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        for name, p in self.model.items():
            if p.requires_grad:
                total = torch.stack([self.gradient(name, rank, self.step) for rank in range(ranks)]).double().sum(0)
                self.expected[name] -= lr * total / hvd.size()
                self.way[name] += float((lr * total / hvd.size()).norm())
        self.step += 1

    # -- what scripts do ---------------------------------------------------------------------------------

    def add(self) -> None:
        """Add a parameter."""
        if len(self.model) < 12:
            name = f"added{len(self.model)}"
            self.model[name] = nn.Parameter(self.draw(name, (self.random.randint(1, 30), 8)))
            self.expected[name], self.way[name] = self.model[name].detach().double().clone(), 1.0
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.add_param_group({"params": [self.model[name]], "lr": lr})

    def freeze(self) -> None:
        """Freeze a parameter, or train it again."""
        name = self.random.choice(sorted(self.model)[1:])
        self.model[name].requires_grad_(not self.model[name].requires_grad)
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Give a step up after its exchange."""
        self.backward(1000.0)
        self.optimizer.synchronize()
        self.optimizer.zero_grad()

    def load(self) -> None:
        """Save, go on for a few steps, and go back."""
        kept = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.expected, self.step))
        for _ in range(3):
            self.train(hvd.size())
        self.model.load_state_dict(kept[0])
        self.optimizer.load_state_dict(kept[1])
        self.expected, self.step = kept[2:]

    def join(self) -> None:
        """Let ranks run out of data one after the other; all take the last one's model."""
        if not self.algorithm.allreduce_only:
            return
        for ranks in range(hvd.size(), 0, -1):
            self.train(ranks)
        last = hvd.join()
        with self.optimizer.consensus():
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        hvd.broadcast_parameters(weights, root_rank=last)
        self.model.load_state_dict(weights)

    def rate(self) -> None:
        """Change the learning rate."""
        lr = self.random.choice((0.02, 0.05, 0.1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def flush(self) -> None:
        """Apply all that is pending."""
        self.optimizer.flush()

    def evaluate(self) -> None:
        """Look at the shared model."""
        with self.optimizer.consensus():
            sum(float(p.detach().sum()) for p in self.model.values())

    def check(self) -> None:
        """Fail unless the virtual iterate is where it should be, and replicas are equal."""
        with self.optimizer.consensus("virtual"):
            for name, p in self.model.items():
                if not p.requires_grad:
                    continue  # what is pending for it waits
                off = float((p.detach().double() - self.expected[name]).norm())
                assert off <= TOLERANCE * self.way[name], f"{self.algorithm}, step {self.step}: {name} off {off:.3g}"
        if not self.algorithm.local_models:
            with self.optimizer.consensus():
                x = torch.cat([p.detach().reshape(-1) for p in self.model.values()])
            every = hvd.allgather(x.reshape(1, -1), name="soak.x")
            assert bool((every == every[0]).all()), f"{self.algorithm}, step {self.step}: replicas differ"

    def run(self, steps: int) -> None:
        """Train with an event every few steps, and look at the result often."""
        events: list[Callable[[], None]] = [
            self.add,
            self.freeze,
            self.discard,
            self.load,
            self.join,
            self.rate,
            self.flush,
            self.evaluate,
        ]
        while self.step < steps:
            for _ in range(self.random.randint(1, 12)):
                self.train(hvd.size())
            self.random.choice(events)()
            if self.random.random() < 0.2:
                self.check()
        self.check()


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def main() -> None:
    """Give every algorithm its share of the steps, several times over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000, help="in all, at least")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wait_without_spinning()
    hvd.init()
    yield_to_other_ranks()
    rounds = 3
    share = max(20, math.ceil(args.steps / (rounds * len(ALGORITHMS))))
    memory = []
    for turn in range(rounds):
        for index, algorithm in enumerate(ALGORITHMS):
            Soak(algorithm, args.seed * 1000 + turn * 100 + index).run(share)
            if hvd.rank() == 0:
                print(f"round {turn + 1} of {rounds}: {algorithm} {share} steps", flush=True)
        memory.append(resident())
    growth = memory[-1] - memory[0]
    assert growth < MEMORY, f"rank {hvd.rank()} has grown by {growth / 2**20:.1f} MiB after the first round"
    print(f"rank {hvd.rank()}: {rounds * len(ALGORITHMS) * share} steps, memory {growth / 2**20:+.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
