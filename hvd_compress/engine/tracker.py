"""The parameters of one optimizer: hooks that see gradients arrive, and backward passes counted."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any, Callable, Iterator, Optional, Sequence, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.bucket import ParamEntry
from hvd_compress.comm.communicator import Communicator, is_elastic
from hvd_compress.engine import grad_scaler
from hvd_compress.engine.autograd_hooks import graph_wanted, too_many_passes, weak_hook
from hvd_compress.engine.ownership import Trainer


class ParameterTracker:
    """Parameters of one optimizer, and how far the backward passes of a step have come.

    Args:
        optimizer: the distributed optimizer; only a weak reference is kept.
        names: names of all parameters.
        comm: collectives of the optimizer's process set.
        passes: backward passes per step.

    Attributes:
        tracked: parameters that have a hook, in the order in which they got it.
        trainer: what other optimizers over the same parameters know of this one.
        on_first: called with the parameter of a step's first gradient.
        on_ready: called with each parameter whose gradient is final.
        scaler: the last GradScaler seen.
        scaled: whether this step's gradients came from it.
        fired: whether a gradient has arrived since the last step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Parameter, str], comm: Communicator, passes: int
    ) -> None:
        # The optimizer refers to this: with a strong reference back it would take a garbage collection to free both.
        self._optimizer = weakref.ref(optimizer)
        self.names, self.passes = names, passes
        self._comm = comm
        self.tracked: list[Parameter] = []
        self.trainer = Trainer(optimizer)
        self.on_first: Callable[[Parameter], None] = lambda parameter: None
        self.on_ready: Callable[[Parameter], None] = lambda parameter: None
        self.scaler: Optional[Any] = None
        self.scaled = False
        self.fired = False
        self._scalers_used = grad_scaler.times_used()  # others, before this optimizer was built, are not its own
        self._passes_left: dict[Parameter, int] = {}
        # One rank needs no hooks to exchange, only to see loss scaling; passes are not counted then.
        self.counts_passes = comm.member and (comm.size > 1 or is_elastic())
        self._described: tuple[object, bytes] = (None, b"")
        self._present: frozenset[int] = frozenset()
        self.track()

    @property
    def optimizer(self) -> Any:
        """The optimizer whose parameters these are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def busy(self) -> bool:
        """True from the first gradient of a step to its ``synchronize()`` or ``step()``."""
        return self.fired and self.counts_passes

    @property
    def scaler_now(self) -> Optional[Any]:
        """The GradScaler of this step's gradients; a rank without any goes by the last step that had some."""
        return None if self.fired and not self.scaled else self.scaler

    def entries(self) -> Iterator[ParamEntry]:
        """Yield all parameters in the optimizer's order, also those without a gradient."""
        for index, group in enumerate(self.optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter not in self.names:
                    self._name(parameter, index, position)
                yield ParamEntry(parameter, self.names[parameter], index)

    def _name(self, parameter: Parameter, group: int, position: int) -> None:
        """Name a parameter that a script has put into a group by hand, or that no name was given for."""
        name, taken = f"allreduce.noname.{group}.{position}", set(self.names.values())
        arguments = (name, *(f"{name}.{k}" for k in range(1, len(taken) + 2)))
        self.names[parameter] = next(candidate for candidate in arguments if candidate not in taken)

    def tracked_entries(self) -> Iterator[ParamEntry]:
        """Yield the tracked parameters in the optimizer's order."""
        return (entry for entry in self.entries() if entry.parameter in self._passes_left)

    def track(self) -> bool:
        """Register hooks on parameters that require a gradient and have none yet; return whether there were any."""
        if not self._comm.member:
            return False
        found = False
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter not in self._passes_left:
                    found = True
                    self._passes_left[parameter] = self.passes
                    self.tracked.append(parameter)
                    parameter.register_post_accumulate_grad_hook(weak_hook(self._on_gradient))
        if found:
            self.trainer.register(self.tracked)
        return found

    def description(self) -> bytes:
        """Return bytes that differ if the parameters, their groups, or which of them are frozen, differ."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        known = [id(p) for group in groups for p in group], [len(group) for group in groups]
        if known != self._described[0]:
            items = [
                (entry.name, tuple(p.shape), str(p.dtype), p.stride(), entry.group)
                for entry in self.entries()
                if (p := entry.parameter) is not None
            ]
            self._present = frozenset(known[0])
            self._described = known, hashlib.blake2b(repr(items).encode(), digest_size=8).digest()
        return self._described[1] + bytes(p.requires_grad for group in groups for p in group)

    def inactive(self, parameters: Sequence[Parameter]) -> frozenset[int]:
        """Return which of a bucket's parameters are frozen, or have been taken out of the optimizer."""
        present = self._present
        return frozenset(
            i for i, p in enumerate(parameters) if not (p.requires_grad or p.grad is not None) or id(p) not in present
        )

    def notice_scaler(self) -> None:
        """Find the GradScaler of gradients that no hook has seen."""
        if not self.fired:
            self.scaler = grad_scaler.used_since(self._scalers_used) or self.scaler

    def reset(self) -> None:
        """Count backward passes anew: a step is complete, or given up."""
        self.fired = False
        self._scalers_used = grad_scaler.times_used()
        for parameter in self._passes_left:
            self._passes_left[parameter] = self.passes

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._optimizer() is None:
            return  # dropped, and not yet collected: the model has been given to another optimizer
        p = cast(Parameter, parameter)
        if self.trainer.shares(p):
            return  # the gradient is taken in step(), by the optimizer that steps
        if not self.fired:
            self.fired = True
            self.scaled = grad_scaler.running_scaler() is not None
            self.on_first(p)
        if self.scaled:
            self.scaler = grad_scaler.running_scaler()
        if not self.counts_passes:
            return
        self._count_pass(p)
        # Under loss scaling nothing may leave before all ranks know that none of them has overflowed.
        if self._passes_left[p] == 0 and not self.scaled:
            self.on_ready(p)

    def _count_pass(self, p: Parameter) -> None:
        if self._passes_left[p] <= 0:
            raise too_many_passes(self.names[p], self._comm.rank, self.passes)
        self._passes_left[p] -= 1
        if cast(Tensor, p.grad).requires_grad:
            raise graph_wanted(self.names[p], self._comm.rank)
