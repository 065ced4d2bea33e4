"""The living part of an algorithm for one bucket: what it must be able to do while training goes on."""

from __future__ import annotations

import abc
from typing import Any, Container, Mapping, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Communicator

# Kinds of buffers that hold what this rank owes. "local" is its own point; others ("shared", "warm") are the same on
# every rank.
RESIDUAL_KINDS = frozenset({"residual", "server", "carried"})


class Rate(NamedTuple):
    """What turns a gradient into an update at this step.

    Attributes:
        lr: learning rate of the bucket's parameter group.
        scale_free: True if the wrapped optimizer's update does not grow with the gradient (Adam): then a
            residual in gradient units needs no rescaling when ``lr`` changes.
        loss_scale: what the gradients have been multiplied with (GradScaler), else 1.
    """

    lr: float
    scale_free: bool = False
    loss_scale: float = 1.0


class BucketState(abc.ABC):
    """The living part of an algorithm for one bucket.

    Attributes:
        replicated: whether the shared model is at hand on every rank, with the same bits.
    """

    bucket: Bucket
    replicated: bool = True

    @abc.abstractmethod
    def buffers(self) -> dict[str, FlatBuffer]:
        """Vectors that must survive a checkpoint, by kind: "shared", "local", those of RESIDUAL_KINDS, or others."""

    def expect(self, kinds: Container[str]) -> None:  # noqa: B027
        """Buffers of these kinds are about to be restored: ``buffers`` must have those that it has not always."""

    def scalars(self) -> dict[str, Any]:
        """Numbers that must survive a checkpoint."""
        return {}

    def accepts(self, saved: Mapping[str, Any]) -> bool:
        """Whether ``saved`` are scalars, and what is held back beside them is in units, of a state like this one."""
        return set(self.scalars()) <= set(saved)

    def load_scalars(self, saved: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what ``scalars`` gave (of the bucket in which the first of these parameters was)."""

    def conversion(self, saved: Mapping[str, Any]) -> float:
        """What a residual that was saved beside the scalars ``saved`` is multiplied with to be held here."""
        return 1.0

    def take_back(self, index: int, begin: int, values: Tensor) -> None:
        """Hold what this rank, as a server, has held of parameter ``index`` from its element ``begin`` on.

        Shards have been cut anew: this is no longer (all) in its own one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no server")

    def residual(self) -> Optional[Tensor]:
        """What this rank holds back (flat), or None; in the algorithm's own units."""
        return None

    def owed(self, lr: float) -> Optional[Tensor]:
        """Flat vector whose mean over ranks is the update they still owe (new tensor), or None."""
        return None

    @abc.abstractmethod
    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        """The model that ranks share, flat; None if it is what the parameters hold (collective)."""

    @abc.abstractmethod
    def restart(self, point: Tensor) -> None:
        """The shared model is ``point`` (flat, the same on every rank), and nothing is held back any more."""

    def next_round(self) -> None:  # noqa: B027
        """All buckets have started: answer what has arrived, where an exchange takes several rounds."""

    def parameters_now(self) -> Tensor:
        """The parameters as a new flat vector of ``state_dtype``."""
        mirror = self.bucket.flat_buffer(self.bucket.state_dtype)
        torch._foreach_copy_(mirror.views, [p.data for p in self.bucket.parameters])
        return mirror.flat

    def put_parameters(self, flat: Tensor) -> None:
        """Write a flat vector into the parameters."""
        mirror = self.bucket.flat_buffer(flat.dtype)
        mirror.flat.copy_(flat)
        torch._foreach_copy_([p.data for p in self.bucket.parameters], mirror.views)


class GradientState(BucketState):
    """Exchanges gradients: ``absorb`` and ``start`` may run during backward, ``finish`` in ``synchronize()``.

    Attributes:
        has_residual: whether a gradient may count at later steps: then also a parameter without one has a result.
        owed_at: the learning rate at which what is held back counts; None: whatever rate comes.
    """

    has_residual: bool = True
    owed_at: Optional[float] = None
    _lr: float = 0.0  # of the last step with a rate above 0: what is held back at a rate of 0 is owed at the one before

    def accumulate_grad(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        """Take in the final gradient of the bucket's parameter ``index`` while it is still in the cache.

        Returns:
            None if this state waits for ``start``; else what becomes ``p.grad``, of undefined content until
            ``finish``.
        """
        return None

    @abc.abstractmethod
    def discard_step(self) -> None:
        """The step will not be finished: what was absorbed counts for the next one, if for any."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Wait for what ``start`` has launched, on all ranks, and make no use of it."""

    @abc.abstractmethod
    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        """Compensate, encode, launch; a gradient that is missing counts as zeros."""

    @abc.abstractmethod
    def finish(self) -> list[Tensor]:
        """Wait; returns what ``p.grad`` shall be, for each parameter of the bucket."""

    def turn(self, rate: Rate, rescale: bool) -> float:
        """Go on to the rate of this step; returns the one at which what is held back has counted.

        Args:
            rescale: whether a change of rate leaves the debt as it is. If it does not, or a rate does not count, the
                rate of this step is returned: there is nothing to make up for.
        """
        counts = rescale and not rate.scale_free and self._lr > 0 and rate.lr > 0
        before = self._lr if counts else rate.lr
        if rate.lr > 0:
            self._lr = rate.lr
        if not rescale or rate.scale_free:
            self.owed_at = None
        elif rate.lr > 0:
            self.owed_at = rate.lr
        return before

    def debt(self) -> Optional[Tensor]:
        """Flat vector whose mean over ranks is what the aggregates still lack, in ``p.grad``'s units (new), or None."""
        return None

    def owed(self, lr: float) -> Optional[Tensor]:
        debt = self.debt()
        return None if debt is None else debt.mul_(lr if self.owed_at is None else self.owed_at)

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        return None

    def restart(self, point: Tensor) -> None:
        self.put_parameters(point)
        self.forgive()

    def forgive(self) -> None:
        """Forget what is held back (it has been applied by other means)."""


class UpdateState(BucketState):
    """Exchanges updates: the parameters hold this rank's own point, ``shared`` the common model.

    Attributes:
        underway: the wrapped optimizer has stepped since the last exchange (several local steps per exchange).
    """

    shared: FlatBuffer
    local: FlatBuffer
    underway: bool = False

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        return self.shared.flat

    def restart(self, point: Tensor) -> None:
        self.shared.flat.copy_(point)
        self.underway = False
        for kind, mirror in self.buffers().items():
            if kind in RESIDUAL_KINDS:
                mirror.flat.zero_()
        self.place()

    @abc.abstractmethod
    def anchor(self) -> None:
        """Take the parameters as they are for the shared model."""

    @abc.abstractmethod
    def start(self, step: int, lr: float) -> None:
        """The wrapped optimizer has stepped: compensate, encode, launch."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Wait, move the shared model, place the parameters for the next forward pass."""

    @abc.abstractmethod
    def place(self) -> None:
        """Write this rank's own point, as it was last chosen, into the parameters."""

    def heed(self, rewritten: Sequence[bool], alone: bool) -> None:
        """Parameters were rewritten, with the same values on all ranks: there they are the shared model now.

        Args:
            rewritten: whether that is so, for each parameter of the bucket (an empty one never is).
            alone: there is one rank only. Then it may as well have clipped its weights, so the shared
                model moves by as much as the parameters, and what is held back stays in its place.
        """
        if not any(rewritten):
            return
        if alone:
            written = self.local.flat.to(self.shared.flat.dtype, copy=True)
            self.place()
            self.shared.flat.add_(written - self.local.flat.to(written.dtype))
            self.local.flat.copy_(written)
        elif all(new or not p.numel() for new, p in zip(rewritten, self.bucket.parameters)):
            self.anchor()
        else:
            # One coefficient says where a bucket stands: what was rewritten goes to the rank's own point about the
            # new model, where nothing counts as an update, and the others keep what their rank has changed.
            before = self.bucket.flat_buffer(self.bucket.dtype, self.local.flat.clone())
            taken, kept = ([i for i, new in enumerate(rewritten) if new is wanted] for wanted in (True, False))
            torch._foreach_copy_([self.shared.views[i] for i in taken], [self.local.views[i] for i in taken])
            self.place()
            torch._foreach_copy_([self.local.views[i] for i in kept], [before.views[i] for i in kept])

    @abc.abstractmethod
    def stood(self, saved: Mapping[str, Mapping[str, Any]]) -> Tensor:
        """This rank's own point (flat, new) by the restored buffers and the saved scalars of each parameter."""

    def resume(self, parameters: Tensor, known: bool, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """The buffers have been restored; decide where the model stands.

        Args:
            parameters: the flat parameters as the user left them.
            known: whether ``shared`` was restored too. Parameters that are neither the restored shared
                model nor this rank's own point are a model of the user's choice, and become the shared one.
            saved: the saved scalars by name; buckets may have been cut otherwise, and stand elsewhere now.
        """
        if not self.bucket.layout.total:
            return
        if known:
            stood = self.stood(saved)
            own = self.local.flat.clone() if self.underway else stood
            self.place()
            if self.underway:
                same = torch.equal(self.local.flat, stood)
                self.local.flat.copy_(own if same else self.local.flat + (own - stood))
            # Another build or device may round the last bit of a rank's own point differently.
            slack = 8 * torch.finfo(parameters.dtype).eps * self.shared.flat.abs().max()
            if any(bool((parameters - point).abs().max() <= slack) for point in (own, self.shared.flat)):
                return
            self.local.flat.copy_(parameters)
        self.anchor()


State = Union[GradientState, UpdateState]
