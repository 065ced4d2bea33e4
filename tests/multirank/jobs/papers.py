"""Every algorithm with every compressor it permits: equal to numpy, mass kept, replicas equal, step by step."""

from __future__ import annotations

from typing import Any, Callable, Optional

import harness
import horovod.torch as hvd
import reference
import reference_flat as plain
import torch
from common import close, flat, joined, loss_of, network, same_everywhere, train, wrap

from hvd_compress import DEF, EF, LIEC, BlockSign, Cast, Compressor, DistEF, Identity, RandomBlock, RandomK, TopK

RANKS = (1, 3)
FULL_RANKS = (2, 4, 8)
MPI_RANKS = (2,)
STEPS = 100
BLOCK, RANDOM = RandomBlock(density=1 / 4, seed=5), RandomK(density=1 / 4, seed=7)
WHOLE = (0, plain.TOTAL)


def momentum() -> reference.SGD:
    return reference.SGD(0.9, 1e-2, True)


def sign_image(block_size: Optional[int]) -> Callable[..., plain.Map]:
    """On the way up a block is a whole tensor's, on the way down (a prefix is given) it ends where a shard ends."""
    return lambda cuts, prefix: plain.signs(plain.sign_blocks(block_size, cuts if prefix else WHOLE))


# Compressor, and the map from a flat vector to what is decoded, given the cuts and a prefix for names.
KINDS: list[tuple[Compressor, Callable[..., plain.Map]]] = [
    (Identity(), lambda cuts, prefix: plain.identity),
    (BLOCK, lambda cuts, prefix: plain.selected(BLOCK.selection, cuts, prefix)),
    (RANDOM, lambda cuts, prefix: plain.selected(RANDOM.selection, cuts, prefix)),
    (TopK(density=0.1), lambda cuts, prefix: plain.top(0.1, cuts)),
    (TopK(density=1.0), lambda cuts, prefix: plain.identity),
    (BlockSign(), sign_image(None)),
    (BlockSign(block_size=4), sign_image(4)),
]


def schedule(t: int) -> float:
    return 0.02 if t < STEPS // 2 else 0.002 * (1 + t % 3)


def run(
    algorithm: Any, expected: plain.FlatRun, make: Callable[[], reference.SGD], tolerance: float = 1e-5,
    coefficient: Optional[float] = None,
) -> None:
    """Train as the reference has been trained and compare everything there is."""
    config = make()
    model = network(torch.float64)
    optimizer = wrap(
        model,
        torch.optim.SGD(
            model.parameters(), lr=0.02, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        ),
        algorithm,
    )
    history: list[torch.Tensor] = []

    def remember(t: int) -> None:
        with optimizer.consensus():
            history.append(flat(model))

    train(model, optimizer, STEPS, schedule, after_step=remember)
    same_everywhere(torch.cat(history), f"x at some step with {algorithm}")
    order = lambda v: joined(plain.from_flat(v))  # noqa: E731
    close(flat(model), order(expected.z[hvd.rank()]), tolerance, f"z with {algorithm}")
    close(history[-1], order(expected.x), tolerance, f"x with {algorithm}")
    lr = 1.0 if algorithm.exchanges_updates else schedule(STEPS - 1)
    held = reference.mean(expected.e) + expected.s
    if isinstance(algorithm, EF):
        return  # momentum comes after the exchange: what is held back is not yet an update
    with optimizer.consensus("virtual"):
        close(flat(model), order(expected.x - lr * held), tolerance, f"y with {algorithm}")


def check_error_feedback() -> None:
    for compressor, image in KINDS:
        for rescale in (True, False):
            expected = plain.error_feedback(hvd.size(), STEPS, image(WHOLE, ""), schedule, momentum, rescale)
            run(EF(compressor, rescale_residual=rescale), expected, momentum)


def check_detached() -> None:
    for compressor, image in KINDS:
        expected = plain.detached(hvd.size(), STEPS, 0.3, image(WHOLE, ""), schedule, momentum)
        run(DEF(compressor, 0.3), expected, momentum)


def check_dist_ef() -> None:
    cuts = plain.borders(hvd.size())
    for compressor, image in KINDS:
        up, down = image(cuts, ""), image(cuts, "server/")
        run(DistEF(compressor), plain.dist_ef(hvd.size(), STEPS, up, down, schedule, momentum), momentum)
    up, down = KINDS[5][1](cuts, ""), KINDS[3][1](cuts, "server/")
    run(DistEF(BlockSign(), TopK(0.1)), plain.dist_ef(hvd.size(), STEPS, up, down, schedule, momentum), momentum)


def check_liec() -> None:
    cuts = plain.borders(hvd.size())
    for compressor, image in KINDS:
        up, down = image(cuts, ""), image(cuts, "server/")
        for make, rescale in ((reference.SGD, True), (momentum, False)):
            expected = plain.liec(hvd.size(), STEPS, 8, up, down, schedule, make, rescale)
            run(LIEC(compressor, 8, rescale_residual=rescale), expected, make)


def check_mass() -> None:
    """y_{t+1} = y_t - eta_t * mean of the local step directions, at every step, whatever the learning rate does."""
    for compressor, _ in [*KINDS, (Cast(), None)]:
        for algorithm in (EF(compressor), DEF(compressor, 0.3), DistEF(compressor), LIEC(compressor, 8)):
            keep_mass(algorithm)


def keep_mass(algorithm: Any, steps: int = 20) -> None:
    # Momentum after the exchange (EF) or kept by models that differ (LIEC) is no part of the identity.
    mu = 0.9 if algorithm.exchanges_updates else 0.0
    model, twin = network(torch.float64), network(torch.float64)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=mu), algorithm)
    with optimizer.consensus("virtual"):
        before = flat(model)
    for t in range(steps):
        lr = (0.02, 0.002, 0.005)[t // 8 % 3]
        optimizer.param_groups[0]["lr"] = lr
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, hvd.rank(), t).backward()
        kept = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
        direction = torch.cat([
            (p.grad if m is None else p.grad + mu * m).reshape(-1) for p, m in zip(twin.parameters(), kept)
        ])
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
        with optimizer.consensus("virtual"):
            after = flat(model)
        mean = hvd.allreduce(direction, name="test.direction")
        close(after, before - lr * mean, 1e-12, f"y at step {t} with {algorithm}")
        before = after


if __name__ == "__main__":
    harness.main(globals())
