"""Same seed, same ranks, same data: same bits, also with several buckets under way at once."""

from __future__ import annotations

import harness
import horovod.torch as hvd
import torch
from common import close, flat, same_everywhere, wrap
from torch import nn

from hvd_compress import DEF, EF, Cast, Dense, Identity, RandomBlock

RANKS = (3,)
FULL_RANKS = (1,)


def trained(compression: object) -> torch.Tensor:
    torch.manual_seed(0)
    parameters = nn.ParameterList([nn.Parameter(torch.randn(3000)) for _ in range(12)])
    optimizer = wrap(parameters, torch.optim.SGD(parameters.parameters(), lr=0.1, momentum=0.9), compression, groups=6)
    for t in range(25):
        optimizer.zero_grad()
        # Small parts first or last by turns, so that what is ready in one cycle of Horovod differs.
        for k, p in enumerate(parameters if t % 2 else reversed(list(parameters))):
            ((p - torch.sin(torch.arange(3000.0) * (hvd.rank() + 1) + k)) ** 2).sum().backward()
        optimizer.step()
    return flat(parameters)


def check_runs_repeat_bitwise() -> None:
    for compression in (Dense(), EF(RandomBlock(density=0.3)), DEF(RandomBlock(density=0.3))):
        first = trained(compression)
        for _ in range(4):
            assert torch.equal(trained(compression), first), f"{compression} depends on timing"
        if not isinstance(compression, DEF):
            same_everywhere(first, "parameters")


def check_buckets_change_nothing() -> None:
    """Many buckets, each scaled by a power of two on its way, give what one bucket gives."""
    for compression in (Dense(), EF(RandomBlock(density=0.3)), EF(Identity()), EF(Cast())):
        results = []
        for groups in (None, 12):
            torch.manual_seed(0)
            parameters = nn.ParameterList([nn.Parameter(torch.randn(50)) for _ in range(12)])
            plain = torch.optim.SGD(parameters.parameters(), lr=0.1, momentum=0.9)
            optimizer = wrap(parameters, plain, compression, groups=groups)
            for t in range(6):
                optimizer.zero_grad(set_to_none=t % 2 == 0)
                sum(((p - hvd.rank() - k) ** 2).sum() for k, p in enumerate(parameters)).backward()
                optimizer.step()
            results.append(flat(parameters))
        tolerance = 1e-3 if compression == EF(Cast()) else 1e-6  # float16 sums depend on where a ring cuts
        close(results[1], results[0], tolerance, f"parameters with {compression}")


if __name__ == "__main__":
    harness.main(globals())
