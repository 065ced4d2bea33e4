"""Checks of what arrives from other ranks, before it is used: the length of payloads, and the places they name.

All ranks raise the same error, or none does. What an allgather brings is the same everywhere. What only one rank
sees, as the server of a shard does, it tells the others by a next message of a wrong length.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors.base import Codec


def require_length(
    comm: Communicator, name: str, received: Tensor, wanted: Sequence[int], sent: int, problem: str = ""
) -> None:
    """Raise RuntimeError, the same on every rank, unless an allgather has brought as much as was expected.

    Only then is it a collective, in which each rank says what it has sent. All ranks see the same length.

    Args:
        name: start of the name of that collective.
        received: what the allgather has brought.
        wanted: for each rank, how many elements were expected from it.
        sent: how many elements this rank has sent.
        problem: why this rank has sent a wrong number, if it did so on purpose.
    """
    if received.numel() == sum(wanted):
        return
    accounts: list[tuple[int, str]] = comm.gather_objects((sent, problem), f"{name}.problem")
    found = [text for _, text in accounts if text]
    for rank, ((numel, _), expected) in enumerate(zip(accounts, wanted)):
        if numel != expected and not found:
            found.append(f"rank {rank} has sent {numel} elements where {expected} are expected")
    raise corruption(comm, name, "; ".join(found) or f"{received.numel()} elements where {sum(wanted)} are expected")


def corruption(comm: Communicator, name: str, problem: str) -> RuntimeError:
    """Return the error for a payload that cannot be used."""
    return RuntimeError(f"corrupted payload of {name}: {problem} (seen by rank {comm.rank}). Nothing of it was applied")


class Inspection:
    """The checks of the payloads that one exchange receives.

    On the host a flaw is found before anything is used. An accelerator would make the host wait for that: there a
    flawed payload is replaced by zeros, so that no place out of range is ever used, and the flaw is found at the next
    exchange.

    Args:
        device: device of the payloads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_host = device, device.type == "cpu"
        self._late: Optional[_Sent] = None  # what the device has found at the last exchange

    def flaw(self, codecs: Sequence[Codec], payloads: Sequence[Tensor]) -> str:
        """Return what is wrong with payload k, which rank k has sent for ``codecs[k]``; an empty text if nothing is."""
        if self._on_host:
            for rank, (codec, payload) in enumerate(zip(codecs, payloads)):
                if payload.numel() and (text := codec.flaw(payload)) is not None:
                    return f"from rank {rank}: {text}"
            return ""
        rows = [payload.unsqueeze(0) for payload in payloads]
        return self._exchange_flags([codec.disarm(row) if row.numel() else None for codec, row in zip(codecs, rows)])

    def flaw_in_rows(self, codec: Codec, payloads: Tensor) -> str:
        """Return the same of ``payloads`` (ranks, ``codec.numel``), all of one codec."""
        if self._on_host:
            return self.flaw([codec] * len(payloads), payloads.unbind())
        flawed = codec.disarm(payloads) if payloads.numel() else None
        return self._exchange_flags([None] * len(payloads) if flawed is None else list(flawed.split(1)))

    def _exchange_flags(self, flawed: Sequence[Optional[Tensor]]) -> str:
        """Return what was found at the exchange before, and let the device send what it has found at this one.

        The host reads flags that the device has sent before it began with the payload of this exchange, which is over.
        """
        late, self._late = self._late, None
        found = [flag for flag in flawed if flag is not None]
        if found:
            clear = torch.zeros(1, dtype=torch.bool, device=self._device)
            flags = torch.cat([clear if flag is None else flag for flag in flawed])
            self._late = _Sent(flags)
        ranks = late.ranks() if late is not None else []
        if not ranks:
            return ""
        return f"from rank(s) {ranks}, at the exchange before this one, where zeros were applied instead"


class _Sent:
    """Flags of ranks that a device sends to the host, which need not wait for them."""

    def __init__(self, flags: Tensor) -> None:
        self._flags = flags
        self._known = torch.zeros(len(flags), dtype=torch.bool, device="cpu")
        self._arrived: Optional[torch.cuda.Event] = None
        cuda = flags.device.type == "cuda" and torch.cuda.is_available()
        if cuda:
            self._known = self._known.pin_memory()  # a device copies to pinned memory without the host
        self._known.copy_(flags, non_blocking=True)
        if cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(flags.device))

    def ranks(self) -> list[int]:
        """Return the ranks whose flag is set."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[int] = self._known.nonzero().flatten().tolist()
        return found
