"""Files of checkpoints: any state comes back bit for bit, and what cannot be saved is named."""

from __future__ import annotations

import math
import struct
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.checkpoint import files
from tests.unit.saving import DTYPES, PLACE, flat


def through_a_file(state: Any, copied: bool = False) -> Any:
    with tempfile.TemporaryDirectory() as name:
        divided = files.copy_to_host(flat(state)) if copied else flat(state)
        record = files.write_state(Path(name), PLACE, divided)
        return files.read_state(Path(name), PLACE, record)


def content(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def require_same(actual: Any, expected: Any, path: str = "state") -> None:
    """Fail unless two states have the same types, bits and strides, and dicts the same order."""
    if isinstance(expected, Tensor):
        wanted = torch.empty_like(expected.detach(), device="meta")  # dense strides in the same order of memory
        assert (actual.dtype, actual.shape, actual.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), path
        assert content(actual) == content(expected), path
        return
    assert type(actual) is type(expected), path
    if isinstance(expected, dict):
        require_same(list(actual.items()), list(expected.items()), path)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), path
        for index, (one, other) in enumerate(zip(actual, expected)):
            require_same(one, other, f"{path}/{index}")
    elif isinstance(expected, float):
        assert struct.pack(">d", actual) == struct.pack(">d", expected), path
    else:
        assert actual == expected, path


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return a view or copy of ``tensor`` with another order of memory."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.permute(*reversed(range(tensor.dim())))
    if layout == "sliced" and tensor.dim():
        return tensor[::2]
    if layout == "expanded":
        return tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    numel = math.prod(shape)
    nbytes = numel * torch.empty(0, dtype=dtype).element_size()
    highest = 1 if dtype == torch.bool else 255  # a bool of another bit pattern is none
    raw = torch.tensor(draw(st.lists(st.integers(0, highest), min_size=nbytes, max_size=nbytes)), dtype=torch.uint8)
    layouts = ("plain", "channels_last", "transposed", "sliced", "expanded")
    return laid_out(raw.view(dtype).reshape(shape), draw(st.sampled_from(layouts)))


any_float = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", bits.to_bytes(8, "big"))[0])
# Of all strings, also such as UTF-8 cannot encode.
any_text = st.text(st.characters(), max_size=5)
keys = st.one_of(any_text, st.integers(), st.tuples(st.integers(), any_text), st.sampled_from(["__metadata__"]))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(2**62, 2**80), any_float, any_text, tensors())
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    ),
    max_leaves=8,
)


@given(states, st.booleans())
def test_a_state_comes_back_bit_for_bit(state: Any, copied: bool) -> None:
    require_same(through_a_file(state, copied), state)


def test_every_dtype_of_the_library_comes_back() -> None:
    state = {str(dtype): torch.arange(5.0).to(dtype) for dtype in DTYPES}
    require_same(through_a_file(state), state)


def test_an_optimizers_state_has_its_keys() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2, 1, 1).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([parameter], amsgrad=True)
    parameter.square().sum().backward()
    optimizer.step()
    require_same(through_a_file(optimizer.state_dict()), optimizer.state_dict())


def test_strides_of_dimensions_of_one_element_come_back() -> None:
    """Contiguous either way, and still another convolution to the backend."""
    weight = torch.ones(8, 4, 1, 1).to(memory_format=torch.channels_last)
    assert weight.is_contiguous()
    assert through_a_file([weight])[0].stride() == (4, 1, 4, 4)


def test_entries_that_are_one_tensor_are_one_again() -> None:
    tied, other = torch.ones(2), torch.ones(2)
    a, b, c = through_a_file([tied, tied[:], other])
    assert a is b
    assert a is not c


def test_parts_of_one_storage_come_back() -> None:
    storage = torch.arange(6.0)
    state = [storage[:4], storage[2:], torch.nn.Parameter(storage), storage.view(torch.int32)]
    require_same([t.detach() for t in through_a_file(state)], [t.detach() for t in state])


def test_views_that_are_conjugate_or_negative_come_back() -> None:
    if torch.complex64 not in DTYPES:
        pytest.skip("this version of safetensors knows no complex numbers")
    z = torch.tensor([1 + 2j, 3 - 4j])
    for copied in (False, True):
        actual = through_a_file([z.conj(), z.conj().imag], copied)
        require_same(actual, [z.conj().resolve_conj(), z.conj().imag.resolve_neg().contiguous()])


def test_schedulers_states_come_back() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    kinds = torch.optim.lr_scheduler
    for scheduler in (
        kinds.MultiStepLR(optimizer, [2, 3]),
        kinds.ReduceLROnPlateau(optimizer),
        kinds.CosineAnnealingLR(optimizer, 5),
        kinds.OneCycleLR(optimizer, 0.1, 10),
        kinds.SequentialLR(optimizer, [kinds.ConstantLR(optimizer), kinds.LinearLR(optimizer)], [3]),
    ):
        require_same(through_a_file(scheduler.state_dict()), scheduler.state_dict())


def test_a_copy_does_not_see_later_changes() -> None:
    tensor = torch.zeros(3)
    copied = files.copy_to_host(flat([tensor]))
    tensor.add_(1)
    assert not copied.tensors["0"].any()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "extra/0/there"),
        ({1, 2}, "extra/0/there"),
        (b"bytes", "extra/0/there"),
        (torch.zeros(2).numpy()[0], "extra/0/there"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        ({"deeper": lambda: 0}, "extra/0/there/deeper"),
        ({(1, object()): 0}, "extra/0/there/a key/1"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, path: str) -> None:
    with pytest.raises(TypeError, match=path):
        flat({"extra": [{"there": value}]})


def test_a_state_within_itself_is_refused() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(TypeError, match="contains itself"):
        flat(state)
