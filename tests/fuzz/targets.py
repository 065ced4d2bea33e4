"""The readers that are fuzzed, by name: each takes arbitrary bytes, and fails only if a rule is broken.

Rules: bytes that are not sound are an error of a kind that is expected, and bytes that pass the checks can be used.
Another reader is one more line in ``TARGETS``.
"""

from __future__ import annotations

import functools
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from hvd_compress.comm import plain_values
from hvd_compress.compressors import BlockSign, Codec, Compressor, CountSketch, Layout, Payload, TopK
from hvd_compress.compressors.topk import TopKCodec
from hvd_compress.exchange.topk_tree import merge_messages, sender_of_mark

LAYOUT = Layout(("a", "b"), (30, 10))
CPU = torch.device("cpu")


def filled(data: bytes, numel: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return ``data`` as a vector of ``numel`` elements, cut off or with zeros at its end."""
    size = numel * dtype.itemsize
    array = np.frombuffer(data[:size].ljust(size, b"\0"), dtype=np.uint8)
    return torch.from_numpy(array.copy()).view(dtype) if size else torch.zeros(0, dtype=dtype)


@functools.lru_cache(None)
def codec_of(compressor: Compressor) -> Codec:
    codec = compressor.codec(LAYOUT, torch.float32, CPU)
    assert isinstance(codec, Codec)
    codec.set_step(3)
    return codec


def gathered(compressor: Compressor, data: bytes) -> None:
    """A payload that another rank has sent: refused by host and accelerator alike, or used."""
    codec = codec_of(compressor)
    payload, flat = filled(data, codec.numel, codec.dtype), torch.zeros(LAYOUT.total)
    flaw = codec.flaw(payload)
    rows = payload.clone().unsqueeze(0)
    flawed = codec.disarm(rows)
    assert (flaw is not None) == (flawed is not None and bool(flawed[0]))
    codec.accumulate(rows[0], flat, 0.5)
    if flaw is None:
        assert torch.equal(rows[0].view(torch.uint8), payload.view(torch.uint8))
        codec.subtract_sent(payload, flat)


def decoded(compressor: Compressor, data: bytes) -> None:
    """A payload of one tensor, of any size."""
    values = filled(data, len(data))
    if compressor.encode(torch.zeros(40)).values.dtype == torch.float32:
        values = filled(data, -(-len(data) // 4), torch.float32)
    try:
        compressor.decode(Payload(values, torch.Size([40]), torch.float32, {"name": "w", "step": 3}))
    except ValueError:
        return


def merged(data: bytes) -> None:
    """Two messages in a tree."""
    codec = codec_of(TopK(0.1))
    assert isinstance(codec, TopKCodec)
    messages = filled(data, 2 * codec.numel).split(codec.numel)
    if any(codec.flaw(message) is not None for message in messages):
        return
    assert all(sender_of_mark(codec, message) is None for message in messages)
    message, places, _ = merge_messages(codec, *(message.numpy() for message in messages))
    assert codec.flaw(torch.from_numpy(message)) is None
    assert all(0 <= place < LAYOUT.total for place in places)


def plain(data: bytes) -> None:
    """A value that another rank has sent with ``gather_objects``."""
    try:
        value = plain_values.decode(data)
    except ValueError:
        return
    again = plain_values.decode(plain_values.encode(value))
    assert repr(again) == repr(value)


GATHERED = (TopK(0.1), TopK(0.1, sampled=True), TopK(1.0), BlockSign(), BlockSign(7), CountSketch(0.5))
TARGETS: dict[str, Callable[[bytes], None]] = {
    **{f"gathered {compressor}": functools.partial(gathered, compressor) for compressor in GATHERED},
    **{f"decoded {compressor}": functools.partial(decoded, compressor) for compressor in GATHERED},
    "merged": merged,
    "plain": plain,
}


def seeds(name: str) -> list[bytes]:
    """Return sound inputs of a target to begin with."""
    if name == "plain":
        return [plain_values.encode([("what", (1, 2.5, None, True)), {"a": b"\1"}])]
    found = []
    for compressor in (TopK(0.1) if name == "merged" else c for c in GATHERED if name == "merged" or str(c) in name):
        codec, vector = codec_of(compressor), torch.linspace(-1.0, 2.0, LAYOUT.total)
        payload = torch.zeros(codec.numel, dtype=codec.dtype)
        codec.encode(vector, payload)
        whole = payload.view(torch.uint8).numpy().tobytes()
        found += [whole * 2, compressor.encode(vector, "w", 3).values.view(torch.uint8).numpy().tobytes(), whole]
    return found
