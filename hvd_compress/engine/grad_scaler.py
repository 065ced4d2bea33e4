"""Automatic mixed precision: the GradScaler that has scaled these gradients, and overflows on any rank.

``GradScaler`` tells an optimizer nothing before ``scaler.step``, but a residual must meet the gradients, in
unscaled units, in ``synchronize()``. So ``GradScaler.scale`` is observed: a hook on the scaled loss notes
the scaler for as long as that backward pass runs, and the hooks of the parameters read it. Where gradients did not
come by way of these hooks (torch.autograd.grad, or made by hand), the last scaler counts whose scaled loss was
differentiated, or whose scale was asked for, since the optimizer's last step.
"""

from __future__ import annotations

import functools
from typing import Any, Iterable, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

if hasattr(torch.amp, "GradScaler"):
    _GradScaler: Any = torch.amp.GradScaler
else:  # torch < 2.3
    _GradScaler = torch.cuda.amp.GradScaler

_running: Optional[Any] = None
_noticed: tuple[int, Optional[Any]] = (0, None)  # how often a scaler was used, and the last one


def _leave() -> None:
    global _running
    _running = None


def _enter(scaler: Any) -> None:
    global _running
    _running = scaler
    _notice(scaler)
    torch.autograd.Variable._execution_engine.queue_callback(_leave)


def _notice(scaler: Any) -> None:
    global _noticed
    _noticed = (_noticed[0] + 1, scaler)


def times_used() -> int:
    """Return how often any scaler has been used so far."""
    return _noticed[0]


def used_since(times: int) -> Optional[Any]:
    """Return the last scaler that was used since ``times_used`` returned ``times``, or None."""
    return _noticed[1] if _noticed[0] > times else None


def watch() -> None:
    """Start to observe ``GradScaler.scale`` and ``get_scale`` (once per process)."""
    if getattr(_GradScaler.scale, "_hvd_compress", False):
        return
    original, original_get_scale = _GradScaler.scale, _GradScaler.get_scale

    @functools.wraps(original)
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if self.is_enabled():
            for tensor in scaled if isinstance(scaled, (list, tuple)) else (scaled,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda grad: _enter(self))
        return scaled

    @functools.wraps(original_get_scale)
    def get_scale(self: Any) -> Any:
        if self.is_enabled():
            _notice(self)
        return original_get_scale(self)

    scale._hvd_compress, get_scale.original = True, original_get_scale  # type: ignore[attr-defined]
    _GradScaler.scale, _GradScaler.get_scale = scale, get_scale


def running_scaler() -> Optional[Any]:
    """Return the scaler whose scaled loss is being differentiated right now, or None."""
    return _running


def loss_scale(scaler: Any, optimizer: torch.optim.Optimizer) -> float:
    """Return the present scale of the optimizer's gradients: 1 once ``scaler.unscale_`` has run."""
    state = scaler._per_optimizer_states[id(optimizer)]
    unscaled = getattr(state["stage"], "name", "READY") != "READY"
    return 1.0 if unscaled else float(_GradScaler.get_scale.original(scaler))


def mark_overflow(scaler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Tell ``scaler`` that this step overflowed, so that its update is the same on every rank."""
    for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
        found.fill_(1.0)


def overflowed(parameters: Iterable[Parameter]) -> bool:
    """Return whether any gradient holds an infinity or nan (one host synchronisation per device)."""
    per_device: dict[torch.device, Tensor] = {}
    for gradient in (p.grad for p in parameters if p.grad is not None):
        values = gradient._values() if gradient.is_sparse else gradient
        # An infinity or nan times zero is nan, and a sum with a nan is nan.
        probe = (values * 0).sum(dtype=torch.float32)
        known = per_device.get(values.device)
        per_device[values.device] = probe if known is None else known + probe
    return any(bool(torch.isnan(probe)) for probe in per_device.values())


def poison(parameters: Sequence[Parameter]) -> None:
    """Put an infinity into the first gradient, for this rank's GradScaler to find."""
    for parameter in parameters[:1]:
        if parameter.grad is None or parameter.grad.is_sparse:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.fill_(float("inf"))
