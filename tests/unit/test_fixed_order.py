"""Linear algebra in a fixed order: right, and the same bits with compiled loops, without, and by plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress import native
from hvd_compress.compressors import fixed_order

SCALES = st.sampled_from([1e-30, 1.0, 1e30])
SIZES = [(1, 1, 1), (7, 1100, 3), (70_000, 3, 2), (0, 3, 1), (3, 0, 1), (300, 513, 4)]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99), st.sampled_from([1e-30, 1.0, 1e30])
)
def test_columns_become_orthonormal(
    dtype: torch.dtype, number: int, rows: int, columns: int, seed: int, scale: float
) -> None:
    columns = min(rows, columns)
    batch = values(number, rows, columns, seed=seed, dtype=dtype) * scale
    before = batch.double().clone()
    fixed_order.orthonormalise(batch)
    gram = batch.double().transpose(1, 2) @ batch.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gram, torch.eye(columns).double().expand_as(gram), rtol=0, atol=1e3 * eps)
    # The same span: projecting on it changes nothing.
    projected = batch.double() @ (batch.double().transpose(1, 2) @ before)
    torch.testing.assert_close(projected / scale, before / scale, rtol=0, atol=1e4 * eps)


def test_columns_that_others_span_become_zero() -> None:
    a = values(1, 30, 2)
    batch = torch.cat((a[:, :, :1], a[:, :, :1] * 3, torch.zeros(1, 30, 1), a[:, :, 1:], a.sum(2, keepdim=True)), dim=2)
    fixed_order.orthonormalise(batch)
    norms = batch[0].norm(dim=0)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]))


def test_what_is_not_finite_stays_visible() -> None:
    batch = values(2, 5, 2)
    batch[0, 3, 1] = torch.inf
    fixed_order.orthonormalise(batch)
    assert not torch.isfinite(batch[0, :, 1]).any()
    assert torch.isfinite(batch[1]).all()


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.3])
@pytest.mark.parametrize(
    ("n", "m", "r"), [(1, 1, 1), (7, 1100, 3), (70_000, 3, 2), (0, 3, 1), (3, 0, 1), (300, 513, 4)]
)
def test_products_have_the_same_bits(n: int, m: int, r: int, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, start = values(n, r), values(m, r, seed=1), values(n, m, seed=2)
    expected = np.zeros((n, m), dtype=np.float32)
    for c in range(r):
        term = p.numpy()[:, c : c + 1] * q.numpy()[:, c]
        expected = term if c == 0 else expected + term
    expected = start.numpy() + np.float32(alpha) * expected
    for kernels in (native._kernels, None):
        monkeypatch.setattr(native, "_kernels", kernels)
        target = start.clone()
        fixed_order.add_product(target, p, q, alpha)
        np.testing.assert_array_equal(target.numpy(), expected)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "GRAIN", 1000)
    p, q = values(50, 3), values(600, 3, seed=1)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(torch.zeros(50, 600))
            fixed_order.add_product(results[-1], p, q, 1.0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
