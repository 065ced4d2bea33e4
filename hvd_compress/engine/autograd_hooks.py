"""Hooks on parameters that do not keep alive what they call, and code that a compiler shall leave alone."""

from __future__ import annotations

import weakref
from typing import Any, Callable, TypeVar, cast

from torch import Tensor
from torch._compile import _disable_dynamo

_Function = TypeVar("_Function", bound=Callable[..., Any])


def no_compile(function: _Function) -> _Function:
    """Not to be traced by ``torch.compile``, of a training step say: it talks to other ranks."""
    disabled: Any = _disable_dynamo(function)
    return cast(_Function, disabled)


def weak_hook(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that calls a bound method as long as its object lives.

    A parameter keeps its hooks where the garbage collector does not look. An object that they held, and that
    itself holds the parameter, would stay for ever; and go on exchanging gradients of a model that has been
    given to another optimizer.
    """
    found = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        act = found()
        if act is not None:
            act(parameter)

    return hook
