"""Which algorithm a policy chooses for a parameter, and what it tells the rest of the package about its rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvd_compress import DEF, EF, LIEC, Algorithm, Cast, Dense, GlobalSketch, Policy, RandomBlock, TopK
from hvd_compress.bucket import ParamEntry

BLOCK = RandomBlock(density=0.25)


def chosen(policy: Algorithm, *shape: int, name: str = "weight", group: int = 0) -> Algorithm:
    return policy.choose(ParamEntry(nn.Parameter(torch.zeros(shape)), name, group))


def test_the_first_rule_that_applies_wins() -> None:
    default, head, other = EF(BLOCK), EF(TopK(0.5)), EF(TopK(0.25))
    policy = Policy(default, dense_below=10, dense_dims=1, patterns={"head.*": head}, groups={1: other})
    assert chosen(policy, 20, name="head.bias", group=1) is head
    assert chosen(policy, 3, 3, group=1) == Dense()
    assert chosen(policy, 20, group=1) == Dense()
    assert chosen(policy, 4, 4, group=1) is other
    assert chosen(policy, 4, 4) is default


def test_patterns_are_tried_in_order_and_told_apart_by_case() -> None:
    first, second = EF(TopK(0.5)), EF(TopK(0.25))
    policy = Policy(Dense(), patterns=[("*.Weight", first), ("*.w*", second)])
    assert chosen(policy, 4, name="a.Weight") is first
    assert chosen(policy, 4, name="a.weight") is second


def test_dense_among_updates_keeps_the_cast() -> None:
    policy = Policy(DEF(BLOCK, local_steps=3), patterns={"cast": Dense(Cast(torch.float16))}, dense_dims=1)
    half = chosen(policy, 4, 4, name="cast")
    assert half == DEF(Cast(torch.float16), coefficient=0.0, local_steps=3)
    assert chosen(policy, 4).exchanges_updates


def test_an_algorithm_that_leaves_parameters_to_another_is_asked_too() -> None:
    policy = Policy(DEF(BLOCK), groups={1: GlobalSketch()})
    assert isinstance(chosen(policy, 4, group=1), DEF)  # vectors
    assert isinstance(chosen(policy, 4, 4, group=1), GlobalSketch)
    by_name = Policy(DEF(BLOCK), patterns={"*": GlobalSketch(), "never": GlobalSketch(dense_vectors=False)})
    assert isinstance(chosen(by_name, 4), DEF)
    assert isinstance(chosen(by_name, 4, 4), GlobalSketch)


@pytest.mark.parametrize(
    ("rules", "argument"),
    [
        ({"default": 3}, "default=3"),
        ({"patterns": {"*.bias": "dense"}}, "patterns['*.bias']='dense'"),
        ({"groups": {1: BLOCK}}, "groups[1]=RandomBlock"),
        ({"groups": {1: DEF(BLOCK)}}, "groups[1]=DEF"),
        ({"default": DEF(BLOCK), "patterns": {"a": DEF(BLOCK, local_steps=2)}}, "patterns['a']=DEF"),
        ({"default": DEF(BLOCK), "patterns": {"a": DEF(BLOCK, clip_norm=2.0)}}, "patterns['a']=DEF"),
    ],
)
def test_a_wrong_rule_is_named(rules: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match="Policy") as refusal:
        Policy(**{"default": EF(BLOCK), **rules})
    assert argument in str(refusal.value)


def test_what_one_rule_needs_the_policy_needs() -> None:
    plain = Policy(EF(BLOCK), patterns={"*": Dense()})
    assert not plain.local_models and plain.allreduce_only
    assert Policy(EF(BLOCK), patterns={"*": LIEC()}).local_models
    assert Policy(LIEC(), dense_dims=1).local_models
    assert not Policy(EF(BLOCK), groups={0: EF(TopK())}).allreduce_only
    assert Policy(DEF(TopK(), clip_norm=5.0), groups={0: DEF(BLOCK)}).clip_norm == 5.0
