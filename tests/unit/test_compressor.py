"""Interface of compressors: properties that follow from the codec, and encode and decode of a single tensor."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hvd_compress.compressors import (
    BlockSign,
    Cast,
    Codec,
    Combine,
    Compressor,
    CountSketch,
    Identity,
    JointCodec,
    Layout,
    LowRank,
    RandomBlock,
    RandomK,
    SelectionCodec,
    SummableCodec,
    TopK,
    Warmup,
)

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Doubled(Compressor):
    """A compressor that sends twice the tensor; it defines nothing but its codec."""

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> Codec:
        return DoubledCodec(layout, dtype)


class DoubledCodec(Codec):
    """Codec whose payload must be gathered, in the dtype of the flat vector."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.layout, self.numel, self.dtype, self.step = layout, layout.total, dtype, -1

    def set_step(self, step: int) -> None:
        self.step = step

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        assert flat.is_contiguous()
        assert not flat.requires_grad
        assert (self.step, self.layout.names) == (7, ("w",))
        torch.mul(flat, 2, out=payload)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        assert (self.step, self.layout.names) == (7, ("w",))
        flat.add_(payload, alpha=alpha / 2)


@dataclass(frozen=True)
class Together(Compressor):
    """A compressor with a JointCodec and no encode of its own."""

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> JointCodec:
        return LowRank(1).codec(layout, dtype, device)


PROPERTIES = [
    (Identity(), Combine.SUM, SummableCodec, False),
    (Cast(), Combine.SUM, SummableCodec, False),
    (RandomBlock(), Combine.SUM, SelectionCodec, True),
    (RandomK(), Combine.SUM, SummableCodec, True),
    (TopK(), Combine.GATHER, Codec, True),
    (BlockSign(), Combine.GATHER, Codec, False),
    (CountSketch(), Combine.SKETCH, Codec, False),
    (LowRank(), Combine.JOINT, JointCodec, False),
    (Doubled(), Combine.GATHER, DoubledCodec, False),
    (Together(), Combine.JOINT, JointCodec, False),
]


@pytest.mark.parametrize(("compressor", "combine", "kind", "is_sparsifier"), PROPERTIES, ids=str)
def test_properties_follow_from_the_codec(
    compressor: Compressor, combine: Combine, kind: type, is_sparsifier: bool
) -> None:
    codec = compressor.codec(Layout(("a", "b"), (40, 5)), torch.float32, CPU)
    assert isinstance(codec, kind)
    assert compressor.combine is combine is codec.combine
    assert compressor.is_sparsifier is is_sparsifier
    assert isinstance(codec, SummableCodec) == (combine is Combine.SUM)
    assert isinstance(codec, JointCodec) == (combine is Combine.JOINT)


@pytest.mark.parametrize("compressor", [TopK(), RandomK(), RandomBlock()], ids=str)
def test_a_warm_up_has_its_compressors_properties(compressor: Compressor) -> None:
    warm = Warmup(compressor, (1.0, 0.5))
    assert (warm.combine, warm.is_sparsifier) == (compressor.combine, compressor.is_sparsifier)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (), (0, 3), (1,)], ids=str)
def test_a_compressor_needs_a_codec_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v = torch.arange(float(torch.Size(shape).numel())).to(dtype).reshape(shape)
    payload = Doubled().encode(v.t() if v.dim() == 2 else v, "w", 7)
    assert (payload.values.dtype, payload.dtype, payload.nbytes) == (dtype, dtype, v.numel() * dtype.itemsize)
    decoded = Doubled().decode(payload)
    assert (decoded.dtype, decoded.shape) == (dtype, payload.shape)
    assert torch.equal(decoded, v.t() if v.dim() == 2 else v)
    assert not Doubled().encode(v.requires_grad_(), "w", 7).values.requires_grad


def test_a_joint_codec_needs_an_encode_of_its_own() -> None:
    with pytest.raises(NotImplementedError, match=r"Together: .*encode and a decode"):
        Together().encode(torch.zeros(3, 3), "w", 0)
