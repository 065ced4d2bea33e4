"""What must not happen during backward, and what to say of it (Horovod's words where it has some)."""

from __future__ import annotations


def too_many_passes(name: str, rank: int, passes: int) -> AssertionError:
    """For a gradient computed once more than there are passes in a step."""
    return AssertionError(
        "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
        f"backward_passes_per_step to accumulate gradients locally. (parameter {name!r}, rank {rank}, "
        f"backward_passes_per_step={passes})"
    )


def graph_wanted(name: str, rank: int) -> AssertionError:
    """For a gradient with a graph of its own, which what ranks exchange cannot have."""
    return AssertionError(
        f"backward(create_graph=True) is not supported on several ranks (parameter {name!r}, rank {rank}): what ranks "
        "exchange has no graph. Take such gradients by torch.autograd.grad"
    )
