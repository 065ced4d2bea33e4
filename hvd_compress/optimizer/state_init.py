"""A ``step()`` that makes an optimizer's state and leaves its parameters alone.

``hvd.broadcast_optimizer_state`` makes the state of an optimizer that has none by a step with zero gradients, by way of
``super(optimizer.__class__, optimizer).step()``. Weight decay moves parameters all the same: on the ranks without a
state, not on one that has restored its own, so that an earlier broadcast of the parameters would be undone.
"""

from __future__ import annotations

from typing import Any, Callable, Optional


def with_stateless_step(base: Any) -> Any:
    """Return the class to derive a distributed optimizer from: ``base``, but for the effect of ``super().step()``."""

    def step(self: Any, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Run ``step()`` of the wrapped optimizer's class for its state alone."""
        parameters = [p.data for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in parameters]
        result = base.step(self) if closure is None else base.step(self, closure)
        for parameter, value in zip(parameters, before):
            parameter.copy_(value)
        return result

    return type(base.__name__, (base,), {"step": step, "__module__": base.__module__, "__doc__": base.__doc__})
