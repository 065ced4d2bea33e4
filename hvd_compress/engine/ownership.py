"""Optimizers over the same parameters: whose gradients and whose points are in them.

Where several train one parameter, a gradient belongs to the one that steps next, which hooks can't know: they do
nothing then, and the optimizer takes what it finds in ``p.grad`` when it steps. One that takes over must not mistake
another's own points for the model.
"""

from __future__ import annotations

import gc
import weakref
from typing import Optional, Sequence

import torch
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

_trainers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> WeakSet of all its trainers
_generation = 0


class Trainer:
    """One optimizer's part in this.

    Args:
        optimizer: only a weak reference is kept.

    Attributes:
        apart: whether it has left points in its parameters that differ between ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.apart = False
        self._shared: dict[Parameter, weakref.WeakSet[Trainer]] = {}
        self._seen = 0
        self._parameters: Sequence[Parameter] = ()

    def register(self, parameters: Sequence[Parameter]) -> None:
        """Note that this optimizer trains ``parameters``."""
        global _generation
        _generation += 1
        self._parameters = parameters
        for parameter in parameters:
            _trainers.setdefault(parameter, weakref.WeakSet()).add(self)

    def taken(self) -> Optional[Parameter]:
        """Return a parameter in which another optimizer has left points that differ between ranks, or None.

        An optimizer that has been dropped, but not collected yet, does not count: ranks collect at different times.
        """
        self._look()
        if self._taken() is None:
            return None
        gc.collect()
        return self._taken()

    def shares(self, parameter: Parameter) -> bool:
        """Return whether another optimizer, which has not been dropped, trains ``parameter`` too."""
        self._look()
        if not self._shared:
            return False
        trainers = self._shared.get(parameter, ())
        return any(trainer is not self and trainer._optimizer() is not None for trainer in trainers)

    def _look(self) -> None:
        """Find the parameters that others have registered too, if any optimizer has registered some since."""
        if self._seen != _generation:
            found = {parameter: _trainers[parameter] for parameter in self._parameters}
            self._shared = {parameter: trainers for parameter, trainers in found.items() if len(trainers) > 1}
            self._seen = _generation

    def _taken(self) -> Optional[Parameter]:
        for parameter, trainers in self._shared.items():
            if any(trainer is not self and trainer.apart for trainer in trainers):
                return parameter
        return None
