"""Top-k sparsifier: the k elements of largest absolute value, with their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Codec, Combine, Compressor, Layout, Payload
from hvd_compress.compressors.counter_rng import kept
from hvd_compress.compressors.topk_search import HostSearch, bits_of, sampled_on_device, scan_start


@dataclass(frozen=True)
class TopK(Compressor):
    """Send the k elements of largest absolute value.

    ``k = max(1, floor(n * density))`` of the n elements of a tensor, or of a whole bucket where tensors travel
    in buckets: large tensors may then take the share of small ones. They are sent unscaled, so that
    ``||v - C(v)||_2^2 <= (1 - k/n) ||v||_2^2`` (Stich et al. 2018, "Sparsified SGD with memory"). nan counts
    as larger than anything, so that it is seen. Of equal magnitudes at the border the first are taken (on
    devices other than the CPU those that ``torch.topk`` takes).

    A payload takes ``k * (itemsize + 4)`` bytes: k values in the dtype of the vector, then k int32 places,
    ascending.

    With ``sampled`` the k-th largest magnitude is estimated instead: it is the one of every 97th element (of
    at least 4096, or all). Of the non-zero elements that reach it the first k are sent, beginning at a place
    that changes with the step; if there are fewer, the rest of the payload is zeros at place 0. With m elements
    in the sample, the number that reach it has a mean near k and a relative standard deviation near
    ``1 / sqrt(m * density)`` if the elements are in no order: 2 % for n = 25 million and 16 % for n = 400 000
    at density 1/100. On average about 0.4 times this share of the payload then stays empty, and the bound
    above holds only nearly.

    Args:
        density: fraction of elements sent, 0 < density <= 1.
        sampled: estimate the smallest magnitude sent from a sample; one pass less on devices where an exact
            selection is slow.

    Raises:
        ValueError: if an argument is out of range, or a vector has 2**31 elements or more.
    """

    combine = Combine.GATHER
    is_sparsifier: ClassVar[bool] = True
    density: float = 1 / 100
    sampled: bool = False

    def __post_init__(self) -> None:
        validation.density("TopK", self.density)
        validation.boolean("TopK", "sampled", self.sampled)
        object.__setattr__(self, "density", float(self.density))  # one repr: ranks compare it

    @property
    def payload_ratio(self) -> float:
        return 2 * self.density

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """The values' bytes, then the bytes of their places, as torch.uint8."""
        flat = tensor.detach().reshape(-1).contiguous()
        picker = _Picker(self, flat.numel(), flat.device)
        values, places = flat.new_empty(picker.k), flat.new_empty(picker.k, dtype=torch.int32)
        picker.pick(flat, step, values, places)
        return Payload(torch.cat((values.view(torch.uint8), places.view(torch.uint8))), tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Zeros, and the values in their places."""
        out = payload.values.new_zeros(payload.shape.numel(), dtype=payload.dtype)
        values, places = payload.values.tensor_split((kept(out.numel(), self.density) * out.element_size(),))
        # Clones, as a view in another dtype must be aligned.
        out.index_add_(0, places.clone().view(torch.int32), values.clone().view(payload.dtype))
        return out.view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> TopKCodec:
        return TopKCodec(self, layout, dtype, device)


class _Picker:
    """Picks ``k`` elements of vectors with ``numel`` elements."""

    def __init__(self, config: TopK, numel: int, device: torch.device) -> None:
        if numel >= 2**31:
            raise ValueError(f"TopK: a vector of {numel} elements is not allowed; it must have fewer than 2**31")
        self.k = kept(numel, config.density)
        self._sampled, self._numel = config.sampled, numel
        self._host: Optional[HostSearch] = HostSearch(numel) if device.type == "cpu" else None
        self._slots = torch.arange(1, self.k + 1, dtype=torch.int32, device=device)

    def pick(self, flat: Tensor, step: int, values: Tensor, places: Tensor) -> None:
        """Write what is sent of ``flat`` into ``values`` (its dtype) and ``places`` (int32), ``k`` of each."""
        if self.k == 0:
            return
        start = scan_start(step, self._numel) if self._sampled else 0
        if self._host is not None:
            found = self._host.sampled(flat, self.k, start) if self._sampled else self._host.largest(flat, self.k)
            index, used = torch.from_numpy(found), len(found)
            torch.index_select(flat, 0, index, out=values[:used])
            places[:used].copy_(index)
            values[used:].zero_()
            places[used:].zero_()
        elif self._sampled:
            index, picked = sampled_on_device(flat, self.k, start, self._slots)
            places.copy_(index)
            values.copy_(picked)
        else:
            bits, mask = bits_of(flat)
            index = torch.topk(bits.bitwise_and(mask), self.k, sorted=False).indices.sort().values
            torch.index_select(flat, 0, index, out=values)
            places.copy_(index)


class TopKCodec(Codec):
    """The values of a bucket, their places, and zeros up to a multiple of 8 bytes.

    Attributes:
        k: how many values.
    """

    dtype = torch.uint8

    def __init__(self, config: TopK, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._picker = _Picker(config, layout.total, device)
        self.k = self._picker.k
        self._sampled = config.sampled
        self._dtype, self._step = dtype, 0
        self._places_at = self._picker.k * dtype.itemsize
        self._end = self._places_at + self._picker.k * 4
        self.numel = -(-self._end // 8) * 8

    def set_step(self, step: int) -> None:
        self._step = step

    def unpack(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a payload: k values in the bucket's dtype, their int32 places in ascending order."""
        return payload[: self._places_at].view(self._dtype), payload[self._places_at : self._end].view(torch.int32)

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        payload[self._end :].zero_()
        self._picker.pick(flat, self._step, *self.unpack(payload))

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        # Only the empty slots of a sampled payload share a place, and they add nothing: any order is the same.
        values, places = self.unpack(payload)
        flat.index_add_(0, places, values, alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        self.clear(payload, flat)  # the same for numbers, and a nan that was sent leaves with the payload

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        values, places = self.unpack(payload)
        if self._sampled:
            # Empty slots point at place 0, which may not have been sent: they take nothing away.
            found = torch.where(values != 0, flat.index_select(0, places), 0)
            flat.index_add_(0, places, found, alpha=-1)
        else:
            flat.index_fill_(0, places.long(), 0.0)
