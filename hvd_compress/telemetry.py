"""Figures of the last step and in total: what was sent, what it cost, how large the residual is."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Iterator, Literal, Optional, Protocol


@dataclass(frozen=True)
class Stats:
    """The result of ``optimizer.stats()``; all figures are this rank's own.

    Attributes:
        steps: exchanges done so far.
        bytes_sent: bytes put on the wire by the last exchange, by the formula of the collective (ring
            allreduce: ``2 (P-1)/P`` times the payload), without the headers of the network.
        total_bytes_sent: everything sent since the optimizer was built, ``consensus`` and ``flush`` included.
        dense_bytes: what the last exchange would have sent uncompressed, in the parameters' dtype.
        ratio: ``dense_bytes / bytes_sent`` (1.0 when nothing is sent, at one rank).
        residual_norm: l2 norm of this rank's residual, as worker and as server: in update units where
            updates are exchanged (DEF, DistEF, GlobalSketch, GlobalTopK), in gradient units for EF and LIEC; 0.0
            where there is none.
        encode_seconds: time of the last step spent compensating and encoding, on the host.
        decode_seconds: time of the last step spent decoding and placing.
        wait_seconds: time of the last step spent waiting for collectives.
        total_encode_seconds, total_decode_seconds, total_wait_seconds: the same since the beginning.
        skipped_steps: steps left out on all ranks for an infinity or nan in a gradient (``nonfinite="skip"``).
        coefficient: DEF's detachment coefficient in force (measured if "auto"; 0.0 with ``GlobalSketch``, whose
            vectors are exchanged by DEF undetached), else nan.
    """

    steps: int
    bytes_sent: float
    total_bytes_sent: float
    dense_bytes: float
    ratio: float
    residual_norm: float
    encode_seconds: float
    decode_seconds: float
    wait_seconds: float
    total_encode_seconds: float
    total_decode_seconds: float
    total_wait_seconds: float
    coefficient: float
    skipped_steps: int = 0


@dataclass
class Figures:
    """Running sums of one step or of all."""

    bytes_sent: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0


class Meter(Protocol):
    """Running counts of a communicator."""

    bytes_sent: float
    seconds_waited: float


@dataclass
class Recorder:
    """Figures of one optimizer, collected while a step goes on; ``close_step`` makes them the last step's.

    Attributes:
        meter: the communicator, which counts bytes and waiting.
        steps: exchanges done so far.
        skipped: steps left out on all ranks.
    """

    meter: Meter
    steps: int = 0
    skipped: int = 0
    _counted: float = 0.0
    _current: Figures = field(default_factory=Figures)
    last: Figures = field(default_factory=Figures)
    total: Figures = field(default_factory=Figures)

    @contextlib.contextmanager
    def timing(self, figure: Literal["encode_seconds", "decode_seconds"]) -> Iterator[None]:
        """Count the time spent inside in ``figure``, but what is spent waiting for other ranks as waiting."""
        begin, waited = time.perf_counter(), self.meter.seconds_waited
        try:
            yield
        finally:
            waiting = self.meter.seconds_waited - waited
            self._current.wait_seconds += waiting
            spent = getattr(self._current, figure) + time.perf_counter() - begin - waiting
            setattr(self._current, figure, spent)

    def close_step(self) -> None:
        """Make the current figures those of the last step: its exchange is complete."""
        self.steps += 1
        self.last, self._current = self._current, Figures()
        self.last.bytes_sent, self._counted = self.meter.bytes_sent - self._counted, self.meter.bytes_sent
        for name, value in vars(self.last).items():
            setattr(self.total, name, getattr(self.total, name) + value)

    def exclude_bytes(self, since: Optional[float] = None) -> None:
        """Leave bytes out of the next step's figure: they were sent for something else.

        Args:
            since: ``meter.bytes_sent`` before they were sent; None: all that was sent since the last step.
        """
        self._counted = self.meter.bytes_sent if since is None else self._counted + self.meter.bytes_sent - since

    def snapshot(self, dense_bytes: float, residual_norm: float, coefficient: float) -> Stats:
        """Return the figures as a frozen record."""
        last, total = self.last, self.total
        return Stats(
            steps=self.steps,
            bytes_sent=last.bytes_sent,
            total_bytes_sent=self.meter.bytes_sent,
            dense_bytes=dense_bytes,
            ratio=dense_bytes / last.bytes_sent if last.bytes_sent else 1.0,
            residual_norm=residual_norm,
            encode_seconds=last.encode_seconds,
            decode_seconds=last.decode_seconds,
            wait_seconds=last.wait_seconds,
            total_encode_seconds=total.encode_seconds,
            total_decode_seconds=total.decode_seconds,
            total_wait_seconds=total.wait_seconds,
            coefficient=coefficient,
            skipped_steps=self.skipped,
        )
