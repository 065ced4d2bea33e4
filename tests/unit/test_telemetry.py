"""Figures of the last step and in total."""

from __future__ import annotations

import dataclasses
import math

import pytest

from hvd_compress.telemetry import Figures, Recorder


def record(recorder: Recorder, encode: float, decode: float, wait: float) -> None:
    recorder.encode_seconds(encode)
    recorder.decode_seconds(decode)
    recorder.wait_seconds(wait)


def test_nothing_yet() -> None:
    stats = Recorder().snapshot(0.0, 0.0, 0.0, math.nan)
    assert math.isnan(stats.coefficient)
    assert dataclasses.replace(stats, coefficient=0.0) == dataclasses.replace(Recorder().snapshot(0.0, 0.0, 0.0, 0.0))
    assert (stats.steps, stats.bytes_sent, stats.total_bytes_sent, stats.ratio) == (0, 0.0, 0.0, 1.0)


def test_last_step_and_totals() -> None:
    recorder = Recorder()
    # Two buckets in the first step, one in the second.
    record(recorder, 0.5, 0.25, 1.0)
    record(recorder, 0.5, 0.25, 2.0)
    recorder.close_step(128.0)
    first = recorder.snapshot(128.0, 1024.0, 2.5, 0.3)
    record(recorder, 0.125, 0.0, 0.5)
    recorder.close_step(192.0)
    second = recorder.snapshot(192.0, 1024.0, 3.5, 0.4)

    assert (first.steps, second.steps) == (1, 2)
    assert (first.bytes_sent, first.total_bytes_sent) == (128.0, 128.0)
    assert (second.bytes_sent, second.total_bytes_sent) == (64.0, 192.0)
    assert (first.ratio, second.ratio) == (8.0, 16.0)
    assert (first.encode_seconds, first.decode_seconds, first.wait_seconds) == (1.0, 0.5, 3.0)
    assert (second.encode_seconds, second.decode_seconds, second.wait_seconds) == (0.125, 0.0, 0.5)
    assert (second.total_encode_seconds, second.total_decode_seconds, second.total_wait_seconds) == (1.125, 0.5, 3.5)
    assert (second.dense_bytes, second.residual_norm, second.coefficient) == (1024.0, 3.5, 0.4)


def test_what_is_sent_between_steps_counts_in_the_totals_only() -> None:
    recorder = Recorder()
    recorder.close_step(8.0)
    recorder.between_steps(108.0)
    stats = recorder.snapshot(108.0, 16.0, 0.0, math.nan)
    assert (stats.steps, stats.bytes_sent, stats.ratio, stats.total_bytes_sent) == (1, 8.0, 2.0, 108.0)
    recorder.close_step(118.0)
    assert recorder.snapshot(118.0, 16.0, 0.0, math.nan).bytes_sent == 10.0


def test_one_rank_sends_nothing() -> None:
    recorder = Recorder()
    recorder.close_step(0.0)
    assert recorder.snapshot(0.0, 0.0, 1.0, math.nan).ratio == 1.0


def test_a_snapshot_does_not_change_any_more() -> None:
    recorder = Recorder()
    record(recorder, 1.0, 1.0, 1.0)
    recorder.close_step(8.0)
    stats = recorder.snapshot(8.0, 16.0, 0.0, 0.0)
    before = dataclasses.astuple(stats)
    record(recorder, 2.0, 2.0, 2.0)
    recorder.close_step(17.0)
    assert dataclasses.astuple(stats) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.steps = 5  # type: ignore[misc]


def test_recorders_share_nothing() -> None:
    one, other = Recorder(), Recorder()
    record(one, 1.0, 1.0, 1.0)
    one.close_step(8.0)
    assert other == Recorder(0, 0.0, Figures(), Figures(), Figures())
