"""Copies of a distributed optimizer, by ``copy.deepcopy`` or ``pickle``: its state, which can be read and loaded."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional

import torch

from hvd_compress.optimizer.saved_state import KEY


class CopiedOptimizer(torch.optim.Optimizer):
    """A copy of a distributed optimizer, for schedulers' and trainers' checkpoints, which copy what they refer to.

    It has the parameters, groups and states of the original at that moment, and gives them by ``state_dict()``. It does
    not step: collectives have names that only one optimizer may use, and hooks on parameters are not copied.
    """

    _ours: Mapping[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the original when it was copied, with learning rates as they are set here."""
        state: dict[str, Any] = super().state_dict()
        groups = [dict(group) for group in state["param_groups"]]
        if self._ours.get("group") is not None:
            groups[0][KEY] = self._ours["group"]
        entries = {**self._ours.get("entries", {}), **state["state"]}
        section = {KEY: self._ours["section"]} if self._ours.get("section") is not None else {}
        return {**state, "state": entries, "param_groups": groups, **section}

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Raise RuntimeError: a copy cannot train."""
        raise RuntimeError(
            "this optimizer is a copy of a distributed one (made by copy.deepcopy or pickle), which has its state but "
            "cannot step. Build a DistributedOptimizer of the copied model's parameters, and load the copy's "
            "state_dict() into it"
        )


def copied(state: Mapping[str, Any], ours: Mapping[str, Any]) -> CopiedOptimizer:
    """Return a copy with torch's part of the original's content, and what ``ours_of`` gives."""
    found = CopiedOptimizer.__new__(CopiedOptimizer)
    found.__setstate__(dict(state))
    found._ours = ours
    return found


def ours_of(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a distributed optimizer's ``state_dict()`` torch does not know."""
    entries = {k: v for k, v in full["state"].items() if isinstance(v, dict) and set(v) == {KEY}}
    group = full["param_groups"][0].get(KEY) if full["param_groups"] else None
    return {"section": full.get(KEY), "group": group, "entries": entries}
