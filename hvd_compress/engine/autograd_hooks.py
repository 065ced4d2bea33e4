"""Hooks on parameters that do not keep alive what they call, and errors for what must not happen during backward."""

from __future__ import annotations

import weakref
from typing import Any, Callable, TypeVar, cast

from torch import Tensor
from torch._compile import _disable_dynamo

_Function = TypeVar("_Function", bound=Callable[..., Any])


def no_compile(function: _Function) -> _Function:
    """Exclude ``function`` from ``torch.compile`` (of a training step, say): it communicates."""
    disabled: Any = _disable_dynamo(function)
    return cast(_Function, disabled)


def weak_hook(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook that calls a bound method as long as its object lives.

    A parameter keeps its hooks where the garbage collector does not look. An object that they held, and that
    itself holds the parameter, would live for ever, and go on exchanging gradients of a model that has been
    given to another optimizer.
    """
    found = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        act = found()
        if act is not None:
            act(parameter)

    return hook


def too_many_passes(name: str, rank: int, passes: int) -> AssertionError:
    """Return Horovod's error for a gradient computed once more than there are passes in a step."""
    return AssertionError(
        "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
        f"backward_passes_per_step to accumulate gradients locally. (parameter {name!r}, rank {rank}, "
        f"backward_passes_per_step={passes})"
    )


def graph_wanted(name: str, rank: int) -> AssertionError:
    """Return the error for a gradient with a graph of its own, which an aggregate cannot have."""
    return AssertionError(
        f"backward(create_graph=True) is not supported on several ranks (parameter {name!r}, rank {rank}): an "
        "aggregate over ranks has no graph. Take such gradients by torch.autograd.grad"
    )
