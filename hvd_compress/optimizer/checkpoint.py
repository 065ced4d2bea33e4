"""The optimizer's state in checkpoints: each rank saves its own residual, and never takes another rank's for its own.

Two rules say what is restored. A state of the same algorithm, bucket, rank and number of ranks is restored to the bit.
Of any other (another algorithm, buckets cut otherwise, all ranks' states merged) the pending update counts: what this
rank had not sent yet, parameter by parameter, joins its residual. Never saved: payloads, gradients, timings.
"""

from __future__ import annotations

import copy
import uuid
import warnings
from typing import Any, Mapping, Optional, Sequence

import torch

from hvd_compress.algorithms.base import State
from hvd_compress.algorithms.bucket_state import RESIDUAL_KINDS, SavedParameter
from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.engine.learning_rate import scale_free
from hvd_compress.engine.reducer import Reducer
from hvd_compress.optimizer.saved_state import (
    FORMAT,
    KEY,
    find_bucket,
    numbers_of,
    parts_of,
    with_numbers,
)
from hvd_compress.optimizer.state_checks import require_fitting, require_readable, require_same_kinds


class OptimizerCheckpoint:
    """The part of an optimizer's ``state_dict`` that is ours.

    It is in three places: under "hvd_compress" this rank's buffers; in the first parameter group the numbers that all
    ranks share (step count, learning rates), which ``hvd.broadcast_optimizer_state`` and elastic ``sync`` then carry to
    new ranks; and for optimizers without any state one entry, as the broadcast does nothing otherwise.
    """

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._owner = uuid.uuid4().hex  # tells this rank's states from others' also when its rank number has changed
        self._pending_state: Optional[Mapping[str, Any]] = None  # loaded before there are buckets
        reducer.on_build = self.restore_new_buckets
        reducer.on_sync = self.apply_broadcast

    # -- saving ------------------------------------------------------------------------------------------

    def add_to_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add what is ours to torch's ``state``."""
        reducer = self._reducer
        if not reducer.comm.member or not state["param_groups"]:
            return state
        ours = self.save_buffers() if self._pending_state is None else dict(self._pending_state)
        # A broadcast counts at once, although it is taken over only at the next step.
        if (brought := reducer.optimizer.param_groups[0].get(KEY)) is not None:
            ours.update(step=brought["step"], local_steps_done=brought["local_steps_done"])
            ours["buckets"] = [with_numbers(bucket, brought["buckets"]) for bucket in ours["buckets"]]
        shared = {
            "step": ours["step"],
            "local_steps_done": ours["local_steps_done"],
            "buckets": [{**bucket, "state": numbers_of(bucket["state"])} for bucket in ours["buckets"]],
        }
        groups = [dict(group) for group in state["param_groups"]]
        groups[0][KEY] = shared
        state.update({KEY: ours, "param_groups": groups})
        if self._has_no_state() and groups[0]["params"]:
            state["state"] = {**state["state"], groups[0]["params"][0]: {KEY: torch.tensor(ours["step"], device="cpu")}}
        return state

    def save_buffers(self) -> dict[str, Any]:
        """Return this rank's buffers (live tensors, as torch's own ``state_dict`` gives) and numbers, by bucket."""
        reducer = self._reducer
        return {
            "format": FORMAT,
            "owner": self._owner,
            "rank": reducer.comm.rank,
            "size": reducer.comm.size,
            "step": reducer.step,
            "local_steps_done": reducer.local_steps_done,
            "buckets": [{**self._identity(state), "state": state.state_dict()} for state in reducer.states],
        }

    def _identity(self, state: State) -> dict[str, Any]:
        """Return what makes a saved state of a bucket one of the same algorithm and bucket."""
        entry = state.bucket.entries[0]
        return {"algorithm": repr(self._reducer.algorithm.choose(entry)), "names": list(state.bucket.layout.names)}

    def _has_no_state(self) -> bool:
        optimizer = self._reducer.optimizer
        return isinstance(optimizer, torch.optim.SGD) and all(g["momentum"] == 0 for g in optimizer.param_groups)

    # -- loading -----------------------------------------------------------------------------------------

    def require_readable(self, state: Any) -> None:
        """Raise ValueError, before anything changes, unless ``state`` can be loaded here."""
        comm, states = self._reducer.comm, self._reducer.states
        require_readable(state, comm.member, comm.rank if comm.member else -1)
        if comm.member and (saved := state.get(KEY)) is not None:
            require_fitting(states, saved["buckets"])
            for found in states if self._is_of_this_place(saved) else ():
                if (same := find_bucket(self._identity(found), saved["buckets"])) is not None:
                    require_same_kinds(found, same["state"])

    def to_torch_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``state`` as the wrapped optimizer knows it, without what is ours."""
        plain = {k: v for k, v in state.items() if k != KEY}
        plain["param_groups"] = [{k: v for k, v in g.items() if k != KEY} for g in state["param_groups"]]
        plain["state"] = {
            pid: {k: v for k, v in entry.items() if k != KEY} if isinstance(entry, dict) else entry
            for pid, entry in state["state"].items()
            if not (isinstance(entry, dict) and set(entry) == {KEY})
        }
        return plain

    def load(self, saved: Optional[Mapping[str, Any]]) -> None:
        """Restore ``saved`` (what ``add_to_state`` put under "hvd_compress"); None empties all residuals.

        Raises:
            ValueError: if a bucket of the same algorithm has other buffers here.
        """
        reducer = self._reducer
        if not reducer.comm.member:
            return
        self._pending_state = None
        if saved is not None and self._is_live(saved):
            saved = copy.deepcopy(saved)
        reducer.reset_to_model()
        if saved is None:
            return
        reducer.step, reducer.local_steps_done = saved["step"], saved["local_steps_done"]
        if reducer.algorithm.exchanges_updates or reducer.algorithm.local_models:
            reducer.track()
            reducer.build()  # needs no other rank here, and the next forward pass starts from the right point
        if reducer.states:
            self._restore(reducer.states, saved)
            reducer.record_parameters()
        else:
            self._pending_state = saved

    def _is_live(self, saved: Mapping[str, Any]) -> bool:
        """Return whether ``saved`` holds this optimizer's own buffers, as ``state_dict`` gives them."""
        own = {v.data_ptr() for state in self._reducer.states for b in state.buffers().values() for v in b.views}
        views = (v for bucket in saved["buckets"] for part in bucket["state"]["buffers"].values() for v in part)
        return any(view.data_ptr() in own for view in views if view.numel())

    def restore_new_buckets(self, states: Sequence[State]) -> None:
        """Give buckets that have just been cut the state that was loaded before."""
        if self._pending_state is not None:
            saved, self._pending_state = self._pending_state, None
            self._restore(states, saved)

    def apply_broadcast(self) -> None:
        """Take over what a broadcast of the optimizer's state has left in the parameter groups."""
        reducer = self._reducer
        groups = reducer.optimizer.param_groups
        shared = groups[0].pop(KEY, None) if groups else None
        if self._has_no_state():
            for entry in list(reducer.optimizer.state.values()):
                entry.pop(KEY, None)
        if shared is None:
            return
        reducer.step, reducer.local_steps_done = shared["step"], shared["local_steps_done"]
        for state in reducer.states:
            bucket = find_bucket(self._identity(state), shared["buckets"])
            if bucket is not None:
                state.load_state_dict(bucket["state"])

    # -- the two rules -----------------------------------------------------------------------------------

    def _restore(self, states: Sequence[State], saved: Mapping[str, Any]) -> None:
        comm = self._reducer.comm
        require_fitting(states, saved["buckets"])
        own, same_place = self._is_own(saved), self._is_of_this_place(saved)
        others, remaining = list(saved["buckets"]), []
        for state in states:
            same = find_bucket(self._identity(state), others)
            if same is not None and own and same_place:
                require_same_kinds(state, same["state"])
                state.load_state_dict(same["state"])
                others = [bucket for bucket in others if bucket is not same]
                continue
            if same is not None:
                state.load_common(same["state"])
            remaining.append(state)
        parts = {name: part for bucket in others for name, part in parts_of(bucket, comm.size).items()}
        taken: set[str] = set()
        for state in remaining:
            taken |= state.restore(self._usable_by(state, parts), own)
        if own:
            self._warn_of_losses(parts, taken)

    def _usable_by(self, state: State, parts: Mapping[str, SavedParameter]) -> Mapping[str, SavedParameter]:
        """Return ``parts``, without pending updates that cannot be gradients again (of Adam and its kin)."""
        if not isinstance(state, GradientState) or not scale_free(self._reducer.optimizer):
            return parts
        return {name: part if part.lr is None else part._replace(pending=None) for name, part in parts.items()}

    def _is_of_this_place(self, saved: Mapping[str, Any]) -> bool:
        """Return whether this rank, of as many, has saved a state."""
        comm = self._reducer.comm
        return bool((saved["rank"], saved["size"]) == (comm.rank, comm.size))

    def _is_own(self, saved: Mapping[str, Any]) -> bool:
        """Return whether the saved residual is this rank's own; warn with the remedy if not, and there is one."""
        comm = self._reducer.comm
        if saved["rank"] is None:  # all ranks' states, merged
            return True
        if saved["owner"] == self._owner or self._is_of_this_place(saved):
            return True
        kinds = [bucket["state"]["buffers"].get(kind, ()) for bucket in saved["buckets"] for kind in RESIDUAL_KINDS]
        if any(bool(view.any()) for views in kinds for view in views):
            warnings.warn(
                f"hvd_compress: the optimizer state holds the residual of rank {saved['rank']} of {saved['size']}, and "
                f"this is rank {comm.rank} of {comm.size}; it is not loaded, and what that rank has not sent is lost. "
                "Save each rank's own state_dict() and merge them (hvd_compress.merge_states), or call "
                "optimizer.flush() on all ranks before saving",
                stacklevel=5,
            )
        return False

    def _warn_of_losses(self, parts: Mapping[str, SavedParameter], taken: set[str]) -> None:
        """Warn if a pending update was saved that no residual here has taken."""
        lost = sorted(n for n, p in parts.items() if n not in taken and p.pending is not None and bool(p.pending.any()))
        if lost:
            warnings.warn(
                f"hvd_compress: the optimizer state holds pending updates of {len(lost)} parameter(s), the first "
                f"{lost[0]!r}, that cannot be restored here (rank {self._reducer.comm.rank}): they have another "
                "algorithm now, or are not trained; these updates are lost. Call optimizer.flush() on all ranks before "
                "saving a state that is to be loaded so",
                stacklevel=5,
            )
