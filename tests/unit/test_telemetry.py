"""Figures of the last step and in total."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Literal

import pytest

from hvd_compress import telemetry
from hvd_compress.telemetry import Recorder


class Clock:
    """A communicator's counts, and a clock that only the test moves."""

    def __init__(self) -> None:
        self.bytes_sent = self.seconds_waited = self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(telemetry, "time", made)
    return made


def record(recorder: Recorder, clock: Clock, encode: float, decode: float, wait: float) -> None:
    """Spend so many seconds, half of the waiting while encoding and half while decoding."""
    figures: tuple[tuple[Literal["encode_seconds", "decode_seconds"], float], ...]
    figures = (("encode_seconds", encode), ("decode_seconds", decode))
    for figure, seconds in figures:
        with recorder.timing(figure):
            clock.now += seconds + wait / 2
            clock.seconds_waited += wait / 2


def test_nothing_yet(clock: Clock) -> None:
    stats = Recorder(clock).snapshot(0.0, 0.0, math.nan)
    assert math.isnan(stats.coefficient)
    assert dataclasses.replace(stats, coefficient=0.0) == Recorder(clock).snapshot(0.0, 0.0, 0.0)
    assert (stats.steps, stats.bytes_sent, stats.total_bytes_sent, stats.ratio) == (0, 0.0, 0.0, 1.0)


def test_last_step_and_totals(clock: Clock) -> None:
    recorder = Recorder(clock)
    # Two buckets in the first step, one in the second.
    record(recorder, clock, 0.5, 0.25, 1.0)
    record(recorder, clock, 0.5, 0.25, 2.0)
    clock.bytes_sent = 128.0
    recorder.close_step()
    first = recorder.snapshot(1024.0, 2.5, 0.3)
    record(recorder, clock, 0.125, 0.0, 0.5)
    clock.bytes_sent = 192.0
    recorder.close_step()
    second = recorder.snapshot(1024.0, 3.5, 0.4)

    assert (first.steps, second.steps) == (1, 2)
    assert (first.bytes_sent, first.total_bytes_sent) == (128.0, 128.0)
    assert (second.bytes_sent, second.total_bytes_sent) == (64.0, 192.0)
    assert (first.ratio, second.ratio) == (8.0, 16.0)
    assert (first.encode_seconds, first.decode_seconds, first.wait_seconds) == (1.0, 0.5, 3.0)
    assert (second.encode_seconds, second.decode_seconds, second.wait_seconds) == (0.125, 0.0, 0.5)
    assert (second.total_encode_seconds, second.total_decode_seconds, second.total_wait_seconds) == (1.125, 0.5, 3.5)
    assert (second.dense_bytes, second.residual_norm, second.coefficient) == (1024.0, 3.5, 0.4)


def test_time_before_a_failure_counts(clock: Clock) -> None:
    recorder = Recorder(clock)

    def fail() -> None:
        with recorder.timing("encode_seconds"):
            clock.now += 2.0
            raise RuntimeError("peer")

    with pytest.raises(RuntimeError, match="peer"):
        fail()
    recorder.close_step()
    assert recorder.last.encode_seconds == 2.0


def test_the_real_clock_is_in_seconds() -> None:
    recorder = Recorder(Clock())
    with recorder.timing("decode_seconds"):
        time.sleep(0.02)
    recorder.close_step()
    assert 0.02 <= recorder.last.decode_seconds < 5.0


def test_what_is_sent_between_steps_counts_in_the_totals_only(clock: Clock) -> None:
    recorder = Recorder(clock)
    clock.bytes_sent = 8.0
    recorder.close_step()
    clock.bytes_sent = 108.0
    recorder.exclude_bytes()
    stats = recorder.snapshot(16.0, 0.0, math.nan)
    assert (stats.steps, stats.bytes_sent, stats.ratio, stats.total_bytes_sent) == (1, 8.0, 2.0, 108.0)
    clock.bytes_sent = 118.0
    recorder.close_step()
    assert recorder.snapshot(16.0, 0.0, math.nan).bytes_sent == 10.0


def test_some_of_a_steps_bytes_may_be_for_something_else(clock: Clock) -> None:
    recorder = Recorder(clock)
    clock.bytes_sent = 5.0
    clock.bytes_sent = 12.0
    recorder.exclude_bytes(since=5.0)
    clock.bytes_sent = 20.0
    recorder.close_step()
    assert recorder.snapshot(16.0, 0.0, math.nan).bytes_sent == 13.0


def test_one_rank_sends_nothing(clock: Clock) -> None:
    recorder = Recorder(clock)
    recorder.close_step()
    assert recorder.snapshot(0.0, 1.0, math.nan).ratio == 1.0


def test_a_snapshot_does_not_change_any_more(clock: Clock) -> None:
    recorder = Recorder(clock)
    record(recorder, clock, 1.0, 1.0, 1.0)
    clock.bytes_sent = 8.0
    recorder.close_step()
    stats = recorder.snapshot(16.0, 0.0, 0.0)
    before = dataclasses.astuple(stats)
    record(recorder, clock, 2.0, 2.0, 2.0)
    clock.bytes_sent = 17.0
    recorder.close_step()
    assert dataclasses.astuple(stats) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.steps = 5  # type: ignore[misc]


def test_recorders_share_nothing(clock: Clock) -> None:
    one, other = Recorder(clock), Recorder(clock)
    record(one, clock, 1.0, 1.0, 1.0)
    one.close_step()
    assert other == Recorder(clock)
    assert one != other
