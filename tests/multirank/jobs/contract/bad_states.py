"""States that cannot be loaded: an error that says what is wrong with them, on every rank, and training goes on."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn

from hvd_compress import DEF, EF, DistEF, RandomBlock
from tests.multirank.support.cases import cases
from tests.multirank.support.internals import bucket_of, section_of, set_format
from tests.multirank.support.networks import network
from tests.multirank.support.refusals import Bad, refused
from tests.multirank.support.training import make, sgd, take_step, wrap

RANKS = (2,)
Change = Callable[[Any], Any]
DAMAGED = ("'hvd_compress'", "damaged", "(rank {rank})", "empty residuals")


def ours(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return what changes our part of a state."""

    def run(state: Any) -> Any:
        change(section_of(state))
        return state

    return run


def bucket(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return what changes the first bucket of a state."""
    return ours(lambda section: change(bucket_of(section)))


def buffers(change: Callable[[list[Any]], Any]) -> Change:
    """Return what changes the residuals of the first bucket of a state."""
    return bucket(lambda found: change(found["state"]["buffers"]["residual"]))


def of_format(number: int) -> Change:
    """Return what makes a state one of another format."""

    def run(state: Any) -> Any:
        set_format(state, number)
        return state

    return run


def without_group(state: Any) -> Any:
    """Return the state of an optimizer without groups."""
    return {**state, "param_groups": []}


def with_group_of_other_length(state: Any) -> Any:
    """Return the state of an optimizer of one parameter less."""
    (group,) = state["param_groups"]
    return {**state, "param_groups": [{**group, "params": group["params"][1:]}]}


# What is made of a state, and fragments of the error.
ANY_STATE: dict[str, tuple[Change, tuple[str, ...]]] = {
    "None": (lambda state: None, ("state_dict=None", "(rank {rank})", "param_groups")),
    "empty": (lambda state: {}, ("state_dict={}", "param_groups")),
    "list": (lambda state: [state], ("state_dict=[", "param_groups")),
    "path": (lambda state: "checkpoint.pt", ("state_dict='checkpoint.pt'",)),
    "of a model": (lambda state: network().state_dict(), ("param_groups",)),
    "without param_groups": (lambda state: {"state": state["state"]}, ("param_groups",)),
    "without state": (lambda state: {"param_groups": state["param_groups"]}, ("'state'",)),
    "without groups": (without_group, ("different number of parameter groups",)),
    "group of other length": (with_group_of_other_length, ("size of optimizer's group",)),
    "ours is a number": (lambda state: {**state, "hvd_compress": 3}, (*DAMAGED, "it is 3")),
    "ours is empty": (lambda state: {**state, "hvd_compress": {}}, (*DAMAGED, "'owner' is missing")),
    "ours is a list": (lambda state: {**state, "hvd_compress": []}, (*DAMAGED, "it is []")),
    **{
        f"no {key}": (ours(lambda section, key=key: section.pop(key)), (*DAMAGED, f"'{key}' is missing"))  # type: ignore[misc]
        for key in ("format", "owner", "rank", "size", "step", "local_steps_done", "buckets")
    },
    "older format": (of_format(2), ("format 2", "reads 3", "(rank {rank})", "flush()")),
    "newer format": (of_format(9), ("format 9", "(rank {rank})")),
    "step is text": (ours(lambda section: section.update(step="12")), (*DAMAGED, "'step' is '12'")),
    "buckets is a number": (ours(lambda section: section.update(buckets=2)), (*DAMAGED, "'buckets' is 2")),
    "a bucket is None": (ours(lambda section: section.update(buckets=[None])), (*DAMAGED, "buckets[0] is missing")),
    "no algorithm": (bucket(lambda found: found.pop("algorithm")), (*DAMAGED, "buckets[0]['algorithm'] is missing")),
    "no names": (bucket(lambda found: found.pop("names")), (*DAMAGED, "buckets[0]['names'] is missing")),
    "no state of a bucket": (bucket(lambda found: found.pop("state")), (*DAMAGED, "buckets[0]['state'] is missing")),
    "no buffers": (bucket(lambda found: found["state"].pop("buffers")), (*DAMAGED, "buckets[0]['buffers'] is missing")),
    "unknown buffers": (
        bucket(lambda found: found["state"]["buffers"].update(extra=found["state"]["buffers"]["residual"])),
        ("unknown buffers 'extra'",),
    ),
    "truncated": (buffers(lambda views: views.pop()), (*DAMAGED, "buckets[0]['residual'] has 3 tensors for 4")),
    "residual is None": (buffers(lambda views: views.__setitem__(0, None)), (*DAMAGED, "residual of parameter")),
    "residual is a list": (buffers(lambda views: views.__setitem__(0, [0.0])), (*DAMAGED, "residual of parameter")),
    "residual of integers": (
        buffers(lambda views: views.__setitem__(0, views[0].long())),
        (*DAMAGED, "residual of parameter", "int64"),
    ),
    "residual of half length": (
        buffers(lambda views: views.__setitem__(0, views[0].reshape(-1)[:1])),
        ("residual of parameter", "(1,)"),
    ),
    "residual transposed": (
        buffers(lambda views: views.__setitem__(1, views[1].t())),
        ("residual of parameter '2.weight'", "(7, 3)", "(3, 7)"),
    ),
}


@cases(compression=(EF(RandomBlock(0.25)), DEF(RandomBlock(0.25))), state=ANY_STATE)
def check_state(compression: Any, state: tuple[Change, tuple[str, ...]]) -> None:
    change, fragments = state
    model, optimizer = make(compression)
    take_step(model, optimizer, 0)
    found = change(optimizer.state_dict())
    refused(Bad(lambda: optimizer.load_state_dict(found), fragments))
    take_step(model, optimizer, 1)


@cases({"server": DistEF(RandomBlock(0.5)), "shared": DEF(RandomBlock(0.5)), "local": DEF(RandomBlock(0.5))})
def check_truncated_buffers(compression: Any) -> None:
    kind = "server" if isinstance(compression, DistEF) else "shared"
    model, optimizer = make(compression)
    take_step(model, optimizer, 0)
    state = optimizer.state_dict()
    views = bucket_of(section_of(state))["state"]["buffers"][kind]
    index = next(i for i, view in enumerate(views) if view.numel() > 1)
    views[index] = views[index].reshape(-1)[1:]
    refused(Bad(lambda: optimizer.load_state_dict(state), (f"{kind} of parameter", "shape")))
    take_step(model, optimizer, 1)


@cases({"numbers of DEF": (DEF(RandomBlock(0.5)), "lr"), "numbers of EF": (EF(RandomBlock(0.5)), "residual_lr")})
def check_missing_numbers(case: tuple[Any, str]) -> None:
    compression, key = case
    model, optimizer = make(compression)
    take_step(model, optimizer, 0)
    state = optimizer.state_dict()
    del bucket_of(section_of(state))["state"][key]
    refused(Bad(lambda: optimizer.load_state_dict(state), (f"has no {key!r}",)))
    take_step(model, optimizer, 1)


@cases(EF(RandomBlock(0.25)), DEF(RandomBlock(0.25)))
def check_state_of_another_model(compression: Any) -> None:
    """Of the same names and numbers of groups, with other shapes."""
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    theirs = wrap(other, sgd(other), compression)
    other(torch.ones(1, 4)).sum().backward()
    theirs.step()
    model, optimizer = make(compression)
    take_step(model, optimizer, 0)
    refused(Bad(lambda: optimizer.load_state_dict(theirs.state_dict()), ("of parameter", "shape", "same model")))
    take_step(model, optimizer, 1)
