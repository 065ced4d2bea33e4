"""Top-k sparsifier: the k elements of largest absolute value, with their indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Codec, Compressor, Payload
from hvd_compress.compressors.layout import Layout
from hvd_compress.compressors.selection import sent_count
from hvd_compress.compressors.topk_places import first_misplaced, misplaced
from hvd_compress.compressors.topk_search import HostSearch, bits_of, sampled_on_device, scan_start


@dataclass(frozen=True)
class TopK(Compressor):
    """Sparsifier that sends the k elements of largest absolute value.

    ``k = max(1, floor(n * density))`` of the n elements of a tensor are sent, or of a whole bucket where tensors
    are exchanged in buckets: there large tensors may take the share of small ones. They are sent unscaled, so
    that ``||v - C(v)||_2^2 <= (1 - k/n) ||v||_2^2`` (Stich et al. 2018, "Sparsified SGD with memory"). nan counts
    as larger than any number, so that it becomes visible. If several elements have the k-th largest magnitude,
    the first of them are sent (on devices other than the CPU those that ``torch.topk`` takes).

    A payload takes ``k * (itemsize + 4)`` bytes: k values in the dtype of the vector, then their k int32
    indices, ascending.

    With ``sampled`` the k-th largest magnitude is estimated from every 97th element (from at least 4096
    elements, or all). Of the non-zero elements that reach it the first k are sent, beginning at an index that
    changes with the step; if there are fewer, the rest of the payload is zeros with index 0. With m elements
    in the sample, the number that reach it has a mean near k and a relative standard deviation near
    ``1 / sqrt(m * density)`` if the elements are in no order: 2 % for n = 25 million and 16 % for n = 400 000
    at density 1/100. On average about 0.4 times this share of the payload then remains empty, and the bound
    above holds only approximately.

    Args:
        density: fraction of elements sent, 0 < density <= 1.
        sampled: estimate the smallest magnitude sent from a sample; one pass less on devices where an exact
            selection is slow.

    Raises:
        ValueError: if an argument is out of range, or a vector has 2**31 elements or more.
    """

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
        """Return the bytes of the values, then those of their indices, as torch.uint8, without padding."""
        flat = tensor.detach().reshape(-1).contiguous()
        selector = _Selector(self, flat.numel(), flat.device)
        values, indices = flat.new_empty(selector.k), flat.new_empty(selector.k, dtype=torch.int32)
        selector.select(flat, step, values, indices)
        return Payload(torch.cat((values.view(torch.uint8), indices.view(torch.uint8))), tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Return the values at their indices, and zeros elsewhere.

        Raises:
            ValueError: if the payload is not one of a tensor of this shape and dtype. (On an accelerator only its size
                is checked here; whether its indices are in range, the device checks.)
        """
        out = payload.values.new_zeros(payload.shape.numel(), dtype=payload.dtype)
        k, found = sent_count(out.numel(), self.density), payload.values
        validation.payload_size("TopK", found.shape, found.dtype, k * (out.element_size() + 4), torch.uint8)
        # A view in another dtype must be aligned, which clones are.
        parts = [part.clone() for part in found.tensor_split((k * out.element_size(),))]
        values, indices = parts[0].view(payload.dtype), parts[1].view(torch.int32)
        if found.device.type == "cpu" and (text := flaw(values, indices, out.numel(), self.sampled)) is not None:
            raise ValueError(text)
        out.index_add_(0, indices, values)
        return out.view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> TopKCodec:
        return TopKCodec(self, layout, dtype, device)


def flaw(values: Tensor, indices: Tensor, numel: int, sampled: bool) -> Optional[str]:
    """Return what is wrong with the indices of a payload in the host's memory, or None."""
    bits, mask = bits_of(values)  # numpy has no bfloat16
    slot = first_misplaced(bits.numpy(), mask, indices.numpy(), numel, 1 + sampled)
    if slot is None:
        return None
    return (
        f"TopK: index {int(indices[slot])} in slot {slot} of {len(indices)}; indices must ascend within [0, {numel}), "
        "and none may occur twice"
    )


class _Selector:
    """Selection of ``k`` elements of vectors with ``numel`` elements."""

    def __init__(self, config: TopK, numel: int, device: torch.device) -> None:
        if numel >= 2**31:
            raise ValueError(f"TopK: a vector of {numel} elements is not allowed; it must have fewer than 2**31")
        self.k = sent_count(numel, config.density)
        self._sampled, self._numel = config.sampled, numel
        self._host: Optional[HostSearch] = HostSearch(numel) if device.type == "cpu" else None
        self._slots = torch.arange(1, self.k + 1, dtype=torch.int32, device=device)

    def select(self, flat: Tensor, step: int, values: Tensor, indices: Tensor) -> None:
        """Write the elements sent of ``flat`` into ``values`` (its dtype) and ``indices`` (int32), ``k`` of each."""
        if self.k == 0:
            return
        start = scan_start(step, self._numel) if self._sampled else 0
        if self._host is not None:
            found = self._host.sampled(flat, self.k, start) if self._sampled else self._host.largest(flat, self.k)
            index, used = torch.from_numpy(found), len(found)
            torch.index_select(flat, 0, index, out=values[:used])
            indices[:used].copy_(index)
            values[used:].zero_()
            indices[used:].zero_()
        elif self._sampled:
            index, selected = sampled_on_device(flat, self.k, start, self._slots)
            indices.copy_(index)
            values.copy_(selected)
        else:
            bits, mask = bits_of(flat)
            index = torch.topk(bits.bitwise_and(mask), self.k, sorted=False).indices.sort().values
            torch.index_select(flat, 0, index, out=values)
            indices.copy_(index)


class TopKCodec(Codec):
    """Codec of a bucket: values, their indices in the flat vector, and zeros up to a multiple of 8 bytes.

    Attributes:
        k: number of values sent.
    """

    is_sparsifier = True
    dtype = torch.uint8

    def __init__(self, config: TopK, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._selector = _Selector(config, layout.total, device)
        self.k = self._selector.k
        self._sampled = config.sampled
        self._dtype, self._step, self._total = dtype, 0, layout.total
        self._indices_at = self.k * dtype.itemsize
        self._end = self._indices_at + self.k * 4
        self.numel = -(-self._end // 8) * 8

    def set_step(self, step: int) -> None:
        self._step = step

    def unpack(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of a payload, or a row of them: k values in the bucket's dtype, and their int32 indices."""
        values, indices = payload[..., : self._indices_at], payload[..., self._indices_at : self._end]
        return values.view(self._dtype), indices.view(torch.int32)

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        payload[self._end :].zero_()
        self._selector.select(flat, self._step, *self.unpack(payload))

    def flaw(self, payload: Tensor) -> Optional[str]:
        return flaw(*self.unpack(payload), self._total, self._sampled) if self.k else None

    def disarm(self, payloads: Tensor) -> Optional[Tensor]:
        if not self.k:
            return None
        values, indices = self.unpack(payloads)
        flawed = misplaced(values, indices, self._total, 1 + self._sampled)
        payloads.masked_fill_(flawed.unsqueeze(1), 0)
        return flawed

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        # The order of the additions does not matter: only unused slots of a sampled payload share an index (0), and
        # their value is 0.
        values, indices = self.unpack(payload)
        flat.index_add_(0, indices, values, alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        self.clear(payload, flat)  # equal for finite values, and a nan that was sent does not remain

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        values, indices = self.unpack(payload)
        if self._sampled:
            # Unused slots have index 0, which may not have been sent, so they must clear nothing.
            sent = torch.where(values != 0, flat.index_select(0, indices), 0)
            flat.index_add_(0, indices, sent, alpha=-1)
        else:
            flat.index_fill_(0, indices.long(), 0.0)
