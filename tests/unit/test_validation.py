"""Wrong arguments are refused when an object is built, by name and value; right ones make frozen values."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch

import hvd_compress
from hvd_compress import DEF, EF, BlockSign, Cast, Compression, Dense, Identity, RandomBlock, RandomK, TopK
from hvd_compress.algorithms.base import require_combining
from hvd_compress.compressors import Combine

BLOCK = RandomBlock()
NUMBERS = [math.nan, math.inf, -math.inf, -1, "x", "0.5", None, True, False, 1j, [0.5], torch.tensor(0.5)]
NOT_INTEGERS = [1.5, math.nan, "1", None, True, False]
NOT_COMPRESSORS = [None, 0.01, "RandomBlock", RandomBlock, Compression.fp16, Dense(), EF(BLOCK)]

WRONG: list[tuple[Any, str, Any]] = [
    *((RandomBlock, "density", v) for v in (*NUMBERS, 0, 0.0, -0.5, 2, 1.0000001, 100)),
    *((RandomBlock, "seed", v) for v in (*NOT_INTEGERS, -1)),
    *((kind, "density", v) for kind in (RandomK, TopK) for v in (*NUMBERS, 0, -0.5, 1.0000001)),
    *((RandomK, "seed", v) for v in (*NOT_INTEGERS, -1)),
    *((TopK, "sampled", v) for v in (0, 1, None, "yes")),
    *((BlockSign, "block_size", v) for v in (1.5, math.nan, "1", True, False, 0, -3)),
    *((Cast, "dtype", v) for v in (torch.bfloat16, torch.float64, torch.int8, "float16", None, 16)),
    *((EF, "compressor", v) for v in NOT_COMPRESSORS),
    *((DEF, "compressor", v) for v in NOT_COMPRESSORS),
    *((DEF, "coefficient", v) for v in (*NUMBERS, -0.1, 1.5, 1.0000001, "often", "AUTO", "")),
    *((DEF, "local_steps", v) for v in (*NOT_INTEGERS, 0, -3)),
    *((EF, "rescale_residual", v) for v in (0, 1, None, "yes")),
    *((DEF, "rescale_residual", v) for v in (0, 1, None, "yes")),
    *((Dense, "compressor", v) for v in (BLOCK, None, torch.float16, "fp16", Compression.fp16)),
]

RIGHT: list[tuple[Any, dict[str, Any]]] = [
    (RandomBlock, {}),
    (RandomBlock, {"density": 1, "seed": 2**100}),
    (RandomBlock, {"density": 1e-9}),
    (RandomBlock, {"density": Fraction(1, 64)}),
    (RandomK, {}),
    (RandomK, {"density": Fraction(1, 128), "seed": 2**100}),
    (TopK, {}),
    (TopK, {"density": 1, "sampled": True}),
    (BlockSign, {}),
    (BlockSign, {"block_size": 1}),
    (BlockSign, {"block_size": 2**40}),
    (Identity, {}),
    (Cast, {}),
    (Cast, {"dtype": torch.float32}),
    (Dense, {}),
    (Dense, {"compressor": Cast()}),
    (EF, {"compressor": BLOCK}),
    (EF, {"compressor": Identity(), "rescale_residual": False}),
    (DEF, {"compressor": BLOCK}),
    (DEF, {"compressor": Cast(), "coefficient": "auto", "local_steps": 4}),
    (DEF, {"compressor": BLOCK, "coefficient": 0}),
    (DEF, {"compressor": BLOCK, "coefficient": 1.0, "rescale_residual": False}),
]


def describe(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("kind", "argument", "value"), WRONG, ids=describe)
def test_wrong_values_are_refused_by_name(kind: Any, argument: str, value: Any) -> None:
    arguments = {"compressor": BLOCK} if kind in (EF, DEF) else {}
    with pytest.raises(ValueError, match=kind.__name__) as refusal:
        kind(**{**arguments, argument: value})
    message = str(refusal.value)
    assert argument in message
    assert repr(value) in message
    assert "must be" in message or "cannot be" in message, "what is allowed must be said"


@pytest.mark.parametrize(("kind", "arguments"), RIGHT, ids=describe)
def test_right_values_are_kept(kind: Any, arguments: dict[str, Any]) -> None:
    built = kind(**arguments)
    assert {name: getattr(built, name) for name in arguments} == arguments


@pytest.mark.parametrize(("kind", "arguments"), RIGHT, ids=describe)
def test_they_are_frozen_values(kind: Any, arguments: dict[str, Any]) -> None:
    one, other = kind(**arguments), kind(**arguments)
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1
    for field in dataclasses.fields(one):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, getattr(one, field.name))


@pytest.mark.parametrize(("kind", "arguments"), RIGHT, ids=describe)
def test_repr_builds_the_same_value(kind: Any, arguments: dict[str, Any]) -> None:
    """Ranks compare what they were given by its repr, and logs should be enough to run a job again."""
    built = kind(**arguments)
    public = {name: getattr(hvd_compress, name) for name in hvd_compress.__all__}
    rebuilt = eval(repr(built), {**public, "torch": torch, "Fraction": Fraction})
    assert rebuilt == built
    assert repr(rebuilt) == repr(built)


def test_different_values_are_not_equal() -> None:
    different = [
        RandomBlock(),
        RandomBlock(density=0.5),
        RandomBlock(seed=1),
        Identity(),
        Cast(),
        Cast(torch.float32),
        RandomK(),
        RandomK(density=0.5),
        RandomK(seed=1),
        TopK(),
        TopK(density=0.5),
        TopK(sampled=True),
        BlockSign(),
        BlockSign(64),
        BlockSign(1),
        Dense(),
        Dense(Cast()),
        EF(BLOCK),
        EF(Identity()),
        EF(BLOCK, rescale_residual=False),
        DEF(BLOCK),
        DEF(BLOCK, coefficient=0.2),
        DEF(BLOCK, coefficient="auto"),
        DEF(BLOCK, local_steps=2),
        DEF(BLOCK, rescale_residual=False),
        DEF(RandomBlock(seed=1)),
    ]
    for i, one in enumerate(different):
        assert [one == other for other in different] == [i == j for j in range(len(different))]
    assert len(set(different)) == len(different)
    assert len({repr(one) for one in different}) == len(different)


def test_defaults_are_the_documented_ones() -> None:
    assert RandomBlock() == RandomBlock(density=1 / 64, seed=0)
    assert RandomK() == RandomK(density=1 / 100, seed=0)
    assert TopK() == TopK(density=1 / 100, sampled=False)
    assert BlockSign() == BlockSign(block_size=None)
    assert Cast() == Cast(dtype=torch.float16)
    assert EF(BLOCK) == EF(BLOCK, rescale_residual=True)
    assert DEF(BLOCK) == DEF(BLOCK, coefficient=0.3, local_steps=1, rescale_residual=True)
    assert Dense() == Dense(Identity())


class Sketched(Identity):
    combine = Combine.SKETCH


class Joint(Identity):
    combine = Combine.JOINT


def test_compressors_that_an_algorithm_cannot_use_are_refused_with_the_reason() -> None:
    for kind in (EF, DEF):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: compressor=.*Sketched.*use GlobalSketch"):
            kind(Sketched())
    with pytest.raises(ValueError, match=r"X: server=.*Joint.*use EF\(\.\.\.\) or DEF"):
        require_combining("X", "server", Joint(), (Combine.SUM, Combine.GATHER))
    with pytest.raises(ValueError, match=r"DEF: coefficient='auto' is not allowed with compressor=.*Joint"):
        DEF(Joint(), "auto")
    assert require_combining("EF", "compressor", BLOCK, (Combine.SUM,)) is BLOCK


def test_the_former_name_of_denses_compressor_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"Dense\(compressor=\.\.\.\)"):
        former = Dense(wire=Cast())
    assert former == Dense(compressor=Cast())
    with pytest.warns(DeprecationWarning, match=r"Dense\.compressor"):
        assert former.wire == Cast()
    with pytest.warns(DeprecationWarning, match="now"), pytest.raises(ValueError, match="compressor=RandomBlock"):
        Dense(wire=BLOCK)
