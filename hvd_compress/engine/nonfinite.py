"""Infinities and nan in what one rank exchanges: all ranks learn of them, and act by the algorithm's ``nonfinite``."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.base import State
from hvd_compress.comm.communicator import Communicator, Handle, Sum
from hvd_compress.finite import nonfinite_flags
from hvd_compress.telemetry import Recorder


class Flags(NamedTuple):
    """Names of parameters, and for each 1.0 if this rank has found an infinity or nan in it, else 0.0 (float32)."""

    names: Sequence[str]
    values: Tensor


class NonfiniteCheck:
    """One small allreduce per step and device, which travels with the payloads: a number per parameter."""

    def __init__(self, comm: Communicator, recorder: Recorder) -> None:
        self._comm, self._recorder = comm, recorder
        self._own: Sequence[Flags] = ()
        self._sums: list[Tensor] = []
        self._handles: list[Handle] = []

    def launch(self, flags: Sequence[Flags]) -> None:
        """Start to add up the ranks' flags (collective)."""
        before, self._own, self._handles = self._comm.bytes_sent, flags, []
        parts: dict[int, Tensor] = {}
        for number, device in enumerate(dict.fromkeys(f.values.device for f in flags)):
            here = [index for index, f in enumerate(flags) if f.values.device == device]
            together = torch.cat([flags[index].values for index in here])
            self._handles.append(self._comm.allreduce_async(together, f"nonfinite.{number}", Sum))
            parts.update(zip(here, torch.split(together, [flags[index].values.numel() for index in here])))
        self._sums = [parts[index] for index in range(len(flags))]
        self._recorder.exclude_bytes(before)

    def finish(self) -> list[Tensor]:
        """Wait for what ``launch`` has started.

        Returns:
            For each of its ``flags`` how many ranks have set them (float32, on their device).
        """
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.wait()
        return self._sums

    def error(self, step: int, what: str) -> FloatingPointError:
        """Return the error that every rank raises (collective).

        Args:
            what: "gradient" or "update".
        """
        own = [name for flags in self._own for name, flag in zip(flags.names, flags.values.tolist()) if flag]
        found = {r: mine for r, mine in enumerate(self._comm.gather_objects(own, "nonfinite.names")) if mine}
        first = min(found)
        listed = "; ".join(f"rank {r}: {', '.join(map(repr, mine[:3]))}" for r, mine in found.items())
        return FloatingPointError(
            f"the {what} of parameter {found[first][0]!r} on rank {first} holds an infinity or nan at step {step} "
            f"({listed}; this is rank {self._comm.rank}). Residuals hold none. Look at the loss and the data of that "
            "rank; nonfinite='skip' leaves steps with such gradients out on all ranks"
        )


def look_at(gradients: Sequence[Optional[Tensor]], device: torch.device) -> Tensor:
    """Return for each gradient, dense, sparse or missing, 1.0 if it holds an infinity or nan, else 0.0."""
    nothing = torch.zeros(0, device=device)
    return nonfinite_flags([nothing if g is None else g._values() if g.is_sparse else g for g in gradients])


def any_set(counts: Sequence[Tensor]) -> bool:
    """Return whether a rank has set one of the flags (the host waits for them)."""
    return any(bool(flags.any()) for flags in counts)


def flags_of(state: State) -> Flags:
    """Return the flags of a bucket; zeros if it does not look for infinities."""
    if state.nonfinite is not None:
        return Flags(state.bucket.layout.names, state.nonfinite)
    zeros = torch.zeros(len(state.bucket.parameters), dtype=torch.float32, device=state.bucket.device)
    return Flags(state.bucket.layout.names, zeros)
