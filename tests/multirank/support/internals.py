"""Everything that tests read or change behind the public interface: saved states, buckets and exchanges.

A change of the package's private names, or of the layout of ``state_dict()["hvd_compress"]``, is followed here.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from hvd_compress import native
from hvd_compress.comm import communicator
from hvd_compress.compressors.topk import TopKCodec
from hvd_compress.exchange import ShardedServerExchange, TopKTreeExchange
from tests.multirank.support import reference

# -- residuals and shared models, from a saved state ----------------------------------------------------


def _section(optimizer: Any) -> dict[str, Any]:
    """Return our part of ``state_dict()``; its tensors are the optimizer's own."""
    section: dict[str, Any] = optimizer.state_dict()["hvd_compress"]
    return section


def _by_name(optimizer: Any, kind: str) -> dict[str, Tensor]:
    """Return the buffers of one kind by parameters' names; empty if the algorithm has none."""
    found: dict[str, Tensor] = {}
    for bucket in _section(optimizer)["buckets"]:
        found.update(zip(bucket["names"], bucket["state"]["buffers"].get(kind, ())))
    return found


def _vector(buffers: dict[str, Tensor]) -> Tensor:
    """Return a copy of the reference network's buffers as one vector in the model's order."""
    return torch.cat([buffers[name].detach().reshape(-1) for name in reference.SHAPES]).clone()


def residual_by_name(optimizer: Any) -> dict[str, Tensor]:
    """Return this rank's residual as a worker, by parameters' names; empty if the algorithm has none."""
    return _by_name(optimizer, "residual")


def residual(optimizer: Any) -> Tensor:
    """Return this rank's residual as a worker as one vector, in the state's units."""
    return _vector(residual_by_name(optimizer))


def residuals(optimizer: Any) -> Tensor:
    """Return all that this rank has not sent yet, as a worker and as a server, as one vector."""
    kinds = [_by_name(optimizer, kind) for kind in ("residual", "server")]
    found = [kind[name] for kind in kinds for name in reference.SHAPES if name in kind]
    return torch.cat([tensor.detach().reshape(-1) for tensor in found]).clone()


def pending_update_share(model: nn.Module, optimizer: Any, ranks: int) -> Tensor:
    """Return this rank's share of the pending update, as worker and server; the sum over ranks is all of it.

    In units of updates or gradients, whichever the algorithm exchanges.
    """
    worker, server = _by_name(optimizer, "residual"), _by_name(optimizer, "server")
    begins = {
        name: begin
        for bucket in _section(optimizer)["buckets"]
        for name, begin in zip(bucket["names"], bucket["state"].get("begins", ()))
    }
    parts = []
    for name, p in model.named_parameters():
        part = torch.zeros(p.numel())
        if name in worker:
            part += worker[name].reshape(-1) / ranks
        if name in server:
            values = server[name].reshape(-1)
            part[begins[name] : begins[name] + values.numel()] += values
        parts.append(part)
    return torch.cat(parts)


def shared_copy(optimizer: Any) -> Tensor:
    """Return the optimizer's copy of the shared model as one vector."""
    return _vector(_by_name(optimizer, "shared"))


def shared_parameter(optimizer: Any, name: str) -> Tensor:
    """Return the optimizer's own tensor with the shared value of one parameter; a test may spoil it."""
    return _by_name(optimizer, "shared")[name]


def step_count(optimizer: Any) -> int:
    """Return the number of exchanges so far."""
    count: int = _section(optimizer)["step"]
    return count


def local_steps_done(optimizer: Any) -> int:
    """Return the number of local steps since the last exchange."""
    count: int = _section(optimizer)["local_steps_done"]
    return count


# -- changes of a saved state ------------------------------------------------------------------------------


def section_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return our part of a state."""
    section: dict[str, Any] = state["hvd_compress"]
    return section


def bucket_of(section: dict[str, Any]) -> dict[str, Any]:
    """Return the first bucket of our part of a state."""
    bucket: dict[str, Any] = section["buckets"][0]
    return bucket


def set_step_count(state: dict[str, Any], count: int) -> None:
    """Let a state be of another step."""
    state["hvd_compress"]["step"] = count


def set_format(state: dict[str, Any], number: int) -> None:
    """Let a state be of another format."""
    state["hvd_compress"]["format"] = number


def add_a_rank(state: dict[str, Any]) -> None:
    """Let a state be of a job with one rank more."""
    state["hvd_compress"]["size"] += 1


def set_residual(state: dict[str, Any], name: str, value: Tensor) -> None:
    """Let a state have another residual of one parameter."""
    for bucket in state["hvd_compress"]["buckets"]:
        if name in bucket["names"]:
            bucket["state"]["buffers"]["residual"][bucket["names"].index(name)] = value


# -- buckets and exchanges ---------------------------------------------------------------------------------


def optimizers_so_far() -> int:
    """Return how many optimizers this rank has built, of which the names of collectives depend."""
    return sum(communicator._opened.values())


def first_bucket_state(optimizer: Any) -> Any:
    """Return the algorithm's state of the first bucket."""
    return optimizer._reducer.states[0]


def first_exchange(optimizer: Any) -> Any:
    """Return the exchange of the first bucket."""
    state = first_bucket_state(optimizer)
    return state.exchange if hasattr(state, "exchange") else state._exchange


def corrupt(optimizer: Any, change: Callable[[Tensor], Any]) -> None:
    """Let ``change`` work on the indices (int32) of what this rank sends of top-k payloads from now on."""
    exchange, comm = first_exchange(optimizer), optimizer._reducer.comm
    if isinstance(exchange, TopKTreeExchange):
        encode = exchange.encode
        exchange.encode = lambda flat: (encode(flat), change(exchange._codec.unpack(exchange._payload)[1]))  # type: ignore
        return
    allgather_async, alltoall_async = comm.allgather_async, comm.alltoall_async

    def changed(tensor: Tensor, codecs: list[Any], lengths: list[int]) -> Tensor:
        tensor = tensor.clone()
        for codec, message in zip(codecs, torch.split(tensor, lengths)):
            if isinstance(codec, TopKCodec):
                change(codec.unpack(message)[1])
        return tensor

    def allgather(tensor: Tensor, name: str) -> Any:
        if name.endswith((".gather", ".down")):
            codec = exchange._codec if name.endswith(".gather") else exchange._down.codecs[comm.rank]
            tensor = changed(tensor, [codec], [len(tensor)])
        return allgather_async(tensor, name)

    def alltoall(tensor: Tensor, splits: Tensor, name: str) -> Any:
        return alltoall_async(changed(tensor, exchange._up.codecs, splits.tolist()), splits, name)

    comm.allgather_async, comm.alltoall_async = allgather, alltoall


def corrupt_length(optimizer: Any) -> None:
    """Let this rank leave out the first eight elements of what it sends (DistEF, LIEC: to rank 0) from now on."""
    exchange, comm = first_exchange(optimizer), optimizer._reducer.comm
    alltoall_async = comm.alltoall_async

    def alltoall(tensor: Tensor, splits: Tensor, name: str) -> Any:
        splits = splits.clone()
        splits[0] -= 8
        return alltoall_async(tensor[8:].clone(), splits, name)

    comm.alltoall_async = alltoall
    if isinstance(exchange, ShardedServerExchange):
        return
    owner, attribute = (exchange, "_payload") if hasattr(exchange, "_payload") else (exchange._sum, "table")
    launch = owner.launch

    def launch_shorter() -> None:
        whole = getattr(owner, attribute)
        setattr(owner, attribute, whole[8:].clone())
        launch()
        setattr(owner, attribute, whole)

    owner.launch = launch_shorter


def buckets(optimizer: Any) -> list[set[str]]:
    """Return the names of the parameters in each bucket."""
    return [set(state.bucket.layout.names) for state in optimizer._reducer.states]


def message_lengths(optimizer: Any) -> tuple[list[int], list[int]]:
    """Return DistEF's bytes per message to each rank's shard, and from it."""
    exchange = first_exchange(optimizer)
    return exchange._sent.lengths, exchange._answers.lengths


def before_next_round(optimizer: Any, act: Callable[[], None]) -> None:
    """Let ``act`` be called in every exchange, once all of its buckets have been launched."""
    state = first_bucket_state(optimizer)
    original = state.next_round

    def acts() -> None:
        act()
        original()

    state.next_round = acts


@contextmanager
def failing_exchange(optimizer: Any, error: Exception) -> Iterator[None]:
    """Let the exchange of the first bucket raise ``error`` as soon as it is complete."""
    exchange = first_exchange(optimizer)
    wait = exchange.wait

    def fails() -> None:
        wait()
        raise error

    exchange.wait = fails
    try:
        yield
    finally:
        del exchange.wait


def compiled_loops_apply(vector: Tensor) -> bool:
    """Return True if updates of such a vector are computed by the compiled loops."""
    return native.applies(vector, vector, vector)
