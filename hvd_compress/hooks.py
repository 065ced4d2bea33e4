"""Hooks on parameters that do not keep alive what they call."""

from __future__ import annotations

import weakref
from typing import Callable

from torch import Tensor


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
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
