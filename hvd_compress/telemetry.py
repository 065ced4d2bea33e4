"""Figures of the last step and in total: what was sent, what it cost, what is held back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stats:
    """What ``optimizer.stats()`` returns; all figures are this rank's own.

    Attributes:
        steps: exchanges done so far.
        bytes_sent: bytes put on the payload by the last exchange, by the formula of the collective (ring
            allreduce: ``2 (P-1)/P`` times the payload), without the headers of the network.
        total_bytes_sent: everything sent since the optimizer was built, ``consensus`` and ``flush`` included.
        dense_bytes: what the last exchange would have sent uncompressed, in the parameters' dtype.
        ratio: ``dense_bytes / bytes_sent`` (1.0 when nothing is sent, at one rank).
        residual_norm: l2 norm of what this rank holds back, as worker and as server: in update units where
            updates are exchanged (DEF, DistEF, GlobalSketch, GlobalTopK), in gradient units for EF and LIEC; 0.0
            where nothing is held back.
        encode_seconds: time of the last step spent compensating and encoding, on the host.
        decode_seconds: time of the last step spent decoding and placing.
        wait_seconds: time of the last step spent waiting for collectives.
        total_encode_seconds, total_decode_seconds, total_wait_seconds: the same since the beginning.
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


@dataclass
class Figures:
    """Running sums of one step or of all."""

    bytes_sent: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass
class Recorder:
    """Collects figures while a step goes on; ``close_step`` makes them the last step's."""

    steps: int = 0
    counted: float = 0.0
    current: Figures = field(default_factory=Figures)
    last: Figures = field(default_factory=Figures)
    total: Figures = field(default_factory=Figures)

    def encode_seconds(self, seconds: float) -> None:
        self.current.encode_seconds += seconds

    def decode_seconds(self, seconds: float) -> None:
        self.current.decode_seconds += seconds

    def wait_seconds(self, seconds: float) -> None:
        self.current.wait_seconds += seconds

    def close_step(self, sent: float) -> None:
        """The exchange is complete; the comm has sent ``sent`` bytes since the beginning."""
        self.steps += 1
        self.last, self.current = self.current, Figures()
        self.last.bytes_sent, self.counted = sent - self.counted, sent
        for name, value in vars(self.last).items():
            setattr(self.total, name, getattr(self.total, name) + value)

    def between_steps(self, sent: float) -> None:
        """What the comm has sent since the last step was not for an exchange (consensus, flush)."""
        self.counted = sent

    def aside(self, sent: float) -> None:
        """So many bytes of this step were for no exchange."""
        self.counted += sent

    def snapshot(self, sent: float, dense_bytes: float, residual_norm: float, coefficient: float) -> Stats:
        """The figures as a frozen record."""
        last, total = self.last, self.total
        return Stats(
            steps=self.steps,
            bytes_sent=last.bytes_sent,
            total_bytes_sent=sent,
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
        )
