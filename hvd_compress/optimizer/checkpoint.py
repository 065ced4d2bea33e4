"""Residuals in checkpoints: each rank saves its own, and never takes another rank's for its own.

Everything is stored by parameter name, so that a checkpoint does not depend on how parameters were put in
buckets. Never checkpointed: payloads, gradients, timings.
"""

from __future__ import annotations

import uuid
import warnings
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import RESIDUAL_KINDS, State, UpdateState
from hvd_compress.bucket import FlatBuffer, ParamEntry
from hvd_compress.engine.reducer import Reducer

KEY = "hvd_compress"
FORMAT = 2


def collect(states: Sequence[State], outside: Mapping[int, list[Tensor]]) -> dict[str, Any]:
    """All by parameter name: buffers by kind (live tensors, as torch's own state_dict gives), scalars of the bucket.

    Of "server" only this rank's shard is here, so "begins" says at which element of the parameter it begins.

    Args:
        outside: this rank's own points by the id of the state, where the parameters stand at a consensus point now.
    """
    buffers: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    begins: dict[str, int] = {}
    for state in states:
        names = state.bucket.layout.names
        for kind, mirror in state.buffers().items():
            views = outside.get(id(state), mirror.views) if kind == "local" else mirror.views
            buffers.setdefault(kind, {}).update(zip(names, views))
            if kind == "server":
                begins.update(zip(names, mirror.begins))
        if own := state.scalars():
            scalars.update(dict.fromkeys(names, own))
    return {"buffers": buffers, "scalars": scalars, "begins": begins}


def scalars_of(state: State, saved: Mapping[str, Any]) -> Optional[Mapping[str, Any]]:
    """The saved scalars for a bucket: those of its first parameter that has some of a state like this one."""
    names = state.bucket.layout.names
    return next((saved[name] for name in names if name in saved and state.accepts(saved[name])), None)


def may_restore_residual(saved: Mapping[str, Any], owner: str, rank: int, size: int) -> bool:
    """Whether the saved residual is this rank's own; warns with the remedy if not, and there is one."""
    if saved["owner"] == owner or (saved["rank"], saved["size"]) == (rank, size):
        return True
    if not any(bool(v.any()) for kind in RESIDUAL_KINDS for v in saved["buffers"].get(kind, {}).values()):
        return False
    warnings.warn(
        f"hvd_compress: the optimizer state holds the residual of rank {saved['rank']} of {saved['size']}, and this "
        f"is rank {rank} of {size}; it is not loaded, and what that rank held back is lost. Save each rank's own "
        "state_dict(), or call optimizer.flush() on all ranks before saving",
        stacklevel=4,
    )
    return False


def restore(states: Sequence[State], saved: Mapping[str, Any], own: bool) -> list[State]:
    """Copy saved buffers and scalars back; returns the states whose shared model was found.

    Buffers that are not in ``saved`` (a parameter added since) are left as they are. With ``own`` False the
    caller is to empty what was held back afterwards. From a state of another algorithm comes what means the same
    in this one; what is lost is warned of.
    """
    restored: list[State] = []
    taken: set[tuple[str, str]] = set()
    for state in states:
        names, scalars = state.bucket.layout.names, saved["scalars"]
        alike = [name not in scalars or state.accepts(scalars[name]) for name in names]
        if (common := scalars_of(state, scalars)) is not None:
            state.load_scalars(common)
        state.expect(saved["buffers"] if any(alike) else ())
        for kind, mirror in state.buffers().items():
            stored: Mapping[str, Tensor] = saved["buffers"].get(kind, {})
            for index, (name, view) in enumerate(zip(names, mirror.views)):
                if not alike[index] and kind != "shared":
                    if kind in RESIDUAL_KINDS:
                        view.zero_()
                    continue
                taken.add((kind, name))
                source = stored.get(name)
                # Another rank's residual still tells its point from a model of the user's.
                if source is None or (not own and kind in ("local", "server")):
                    continue
                factor = state.conversion(scalars[name]) if kind in RESIDUAL_KINDS and name in scalars else 1.0
                if kind == "server":
                    _restore_shard(state, index, mirror, source, saved["begins"][name], factor)
                    continue
                if source.shape != view.shape:
                    if kind not in RESIDUAL_KINDS and kind not in ("shared", "local"):
                        continue  # a start for the next step, by a compressor of other arguments
                    raise ValueError(
                        f"load_state_dict: {kind} of parameter {name!r} has shape {tuple(source.shape)} in the saved "
                        f"state and {tuple(view.shape)} here; load a state of the same model"
                    )
                with torch.no_grad():
                    view.copy_(source)
                    if factor != 1.0:
                        view.mul_(factor)
            if kind == "shared" and all(name in stored for name in names):
                restored.append(state)
    if own:
        _warn_of_losses(saved, taken)
    return restored


def _warn_of_losses(saved: Mapping[str, Any], taken: set[tuple[str, str]]) -> None:
    """Warn if something was held back that nothing here could take."""
    lost = sorted(
        name
        for kind in RESIDUAL_KINDS
        for name, values in saved["buffers"].get(kind, {}).items()
        if (kind, name) not in taken and bool(values.any())
    )
    if lost:
        warnings.warn(
            f"hvd_compress: the optimizer state holds back updates of {len(set(lost))} parameter(s), the first "
            f"{lost[0]!r}, for which there is no place here (rank {saved['rank']}): they have another algorithm now, "
            "or are not trained; what was held back is lost. Call optimizer.flush() on all ranks before saving a state "
            "that is to be loaded so",
            stacklevel=5,
        )


def _restore_shard(state: State, index: int, mirror: FlatBuffer, source: Tensor, begin: int, factor: float) -> None:
    """A server's part of a parameter; where shards are cut otherwise now, this rank holds it as a worker."""
    view = mirror.views[index]
    values = source.to(view.device, view.dtype) * factor
    if (values.numel(), begin) == (view.numel(), mirror.begins[index]):
        view.copy_(values)
        return
    view.zero_()
    state.take_back(index, begin, values)


def _with_own_momentum(reducer: Reducer, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters of which each rank's wrapped optimizer sees gradients, or directions, of its own."""
    entries = (
        ParamEntry(p, reducer.names[p], index)
        for index, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if p in reducer.names
    )
    chosen = ((entry.name, reducer.algorithm.choose(entry)) for entry in entries)
    return [name for name, algorithm in chosen if algorithm.exchanges_updates or algorithm.local_models]


def _forget(state: State) -> None:
    """Hold nothing back any more."""
    for kind, mirror in state.buffers().items():
        if kind in RESIDUAL_KINDS:
            mirror.flat.zero_()


def _empty(state: State) -> None:
    """Forget what is held back; a rank's own point is then the shared model."""
    _forget(state)
    if isinstance(state, UpdateState):
        state.underway = False
        state.place()


def _start_anew(state: State) -> None:
    """Nothing of ours was saved: hold nothing back; a model that was loaded before is the shared one."""
    if isinstance(state, UpdateState):
        state.bucket.ensure_params_in(state.local)
        if state.underway:
            # Loaded, or stepped locally? All ranks together will see at the next exchange: each has its own otherwise.
            state.underway = False
            return _forget(state)
        state.resume(state.local.flat.clone(), True, {})
    _empty(state)


class OptimizerCheckpoint:
    """What an optimizer adds to its ``state_dict`` and takes out of one.

    Three places: under "hvd_compress" this rank's buffers; in the first parameter group what all ranks
    share (step count, units), which ``hvd.broadcast_optimizer_state`` and elastic ``sync`` then carry to
    new ranks; and for optimizers without any state one entry, as the broadcast does nothing otherwise.
    """

    def __init__(self, reducer: Reducer, outside: Mapping[int, list[Tensor]]) -> None:
        self._reducer, self._outside = reducer, outside
        self._owner = uuid.uuid4().hex
        self._unclaimed: Optional[Mapping[str, Any]] = None
        reducer.on_build = self._claim
        reducer.on_settle = self.accumulate_grad

    def extend(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add to torch's ``state`` what is ours."""
        reducer = self._reducer
        if not reducer.comm.member or not state["param_groups"]:
            return state
        if self._unclaimed is not None:
            mine = dict(self._unclaimed)  # loaded, and no step since
        else:
            mine = {
                "format": FORMAT,
                "owner": self._owner,
                "rank": reducer.comm.rank,
                "size": reducer.comm.size,
                "step": reducer.step,
                "local_steps_done": reducer.local_steps_done,
                "own_momentum": self._own_momentum(),
                **collect(reducer.states, self._outside),
            }
        # What a broadcast has brought is already true, although it is taken over only at the next step.
        if (brought := self._reducer.optimizer.param_groups[0].get(KEY)) is not None:
            mine.update(brought, own_momentum=[])
        state[KEY] = mine
        shared = {k: mine[k] for k in ("step", "local_steps_done", "scalars")}
        groups = [dict(group) for group in state["param_groups"]]
        groups[0][KEY] = shared
        state["param_groups"] = groups
        if self._stateless() and groups[0]["params"]:
            state["state"] = {**state["state"], groups[0]["params"][0]: {KEY: torch.tensor(mine["step"])}}
        return state

    def _stateless(self) -> bool:
        optimizer = self._reducer.optimizer
        return isinstance(optimizer, torch.optim.SGD) and all(g["momentum"] == 0 for g in optimizer.param_groups)

    def _own_momentum(self) -> list[str]:
        """Names of the parameters whose momentum is this rank's own; of one rank, or without momentum, none."""
        alone = self._reducer.comm.size == 1 or self._stateless()
        return [] if alone else _with_own_momentum(self._reducer, self._reducer.optimizer)

    def strip(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` as the wrapped optimizer knows it."""
        plain = {k: v for k, v in state.items() if k != KEY}
        plain["param_groups"] = [{k: v for k, v in g.items() if k != KEY} for g in state["param_groups"]]
        plain["state"] = {
            pid: {k: v for k, v in entry.items() if k != KEY} if isinstance(entry, dict) else entry
            for pid, entry in state["state"].items()
            if not (isinstance(entry, dict) and set(entry) == {KEY})
        }
        return plain

    def load(self, saved: Optional[Mapping[str, Any]]) -> None:
        """Take ``saved`` (what ``extend`` put under "hvd_compress"); None empties all residuals."""
        reducer = self._reducer
        if not reducer.comm.member:
            return
        if saved is not None and saved["format"] != FORMAT:
            raise ValueError(
                f"load_state_dict: the state has format {saved['format']!r} of hvd_compress, this version reads "
                f"{FORMAT}; save it again with a version that reads it"
            )
        self._unclaimed = None
        if saved is None:
            reducer.local_steps_done = 0
            for state in reducer.states:
                _start_anew(state)
            return
        if apart := set(saved.get("own_momentum", ())) - set(self._own_momentum()):
            warnings.warn(
                f"hvd_compress: in the optimizer state {len(apart)} parameter(s), the first {min(apart)!r}, have a "
                f"momentum of this rank's own (rank {reducer.comm.rank}), and their algorithm here needs the same on "
                "all; call hvd.broadcast_optimizer_state(optimizer, root_rank=0) after load_state_dict()",
                stacklevel=3,
            )
        reducer.step, reducer.local_steps_done = saved["step"], saved["local_steps_done"]
        if reducer.algorithm.exchanges_updates or reducer.algorithm.local_models:
            reducer.track()
            reducer.build()  # needs no other rank here, and the next forward pass starts from the right point
        if reducer.states:
            self._restore(reducer.states, saved)
            reducer.stand()
        else:
            self._unclaimed = saved

    def _claim(self, states: Sequence[State]) -> None:
        """Buckets have been cut: give them what was loaded before."""
        if self._unclaimed is not None:
            saved, self._unclaimed = self._unclaimed, None
            self._restore(states, saved)

    def _restore(self, states: Sequence[State], saved: Mapping[str, Any]) -> None:
        comm = self._reducer.comm
        own = may_restore_residual(saved, self._owner, comm.rank, comm.size)
        before = {id(s): s.local.flat.clone() for s in states if isinstance(s, UpdateState)}
        complete = restore(states, saved, own)
        for state in states:
            if isinstance(state, UpdateState):
                known = any(state is s for s in complete)
                state.resume(before[id(state)], known, saved["scalars"])
            if not own:
                _empty(state)

    def accumulate_grad(self) -> None:
        """Take over what a broadcast of the optimizer state has left in the parameter groups."""
        groups = self._reducer.optimizer.param_groups
        shared = groups[0].pop(KEY, None) if groups else None
        if self._stateless():
            for entry in list(self._reducer.optimizer.state.values()):
                entry.pop(KEY, None)
        if shared is None:
            return
        reducer = self._reducer
        reducer.step, reducer.local_steps_done = shared["step"], shared["local_steps_done"]
        for state in reducer.states:
            if (scalars := scalars_of(state, shared["scalars"])) is not None:
                state.load_scalars(scalars)
