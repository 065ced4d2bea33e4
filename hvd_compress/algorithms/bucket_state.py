"""The state of an algorithm for one bucket: what both kinds, of gradients and of updates, have in common."""

from __future__ import annotations

import abc
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Communicator

# Kinds of buffers that hold what this rank has not sent yet. "local" is its own point; others ("shared", "warm") are
# the same on every rank.
RESIDUAL_KINDS = frozenset({"residual", "server", "carried"})


class Rate(NamedTuple):
    """The factors between a gradient and its update at one step.

    Attributes:
        lr: learning rate of the bucket's parameter group.
        scale_free: True if the wrapped optimizer's update does not grow with the gradient (Adam): then a
            residual in gradient units needs no rescaling when ``lr`` changes.
        loss_scale: factor that the gradients have been multiplied with (GradScaler), else 1.
        momentum: True if the wrapped optimizer keeps a sum of gradients, which later rates multiply again.
    """

    lr: float
    scale_free: bool = False
    loss_scale: float = 1.0
    momentum: bool = False


class SavedParameter(NamedTuple):
    """One parameter of a saved state, whatever algorithm and buckets it was saved from.

    Attributes:
        pending: what had not been sent yet, worker and server together; None if nothing can be pending.
        lr: factor that makes an update of ``pending``: 1 for updates, the learning rate for gradients; None if the
            rate is not known (gradients of Adam, residuals that are not rescaled).
        shared: the shared model, or None if the parameters held it.
        local: this rank's own point, or None if the parameters held it.
        coefficient: where that point was: local = shared - coefficient * residual.
        largest_lr: the largest learning rate so far (gradients).
        known: digests of the points of all ranks, if it was merged of their states.
    """

    pending: Optional[Tensor] = None
    lr: Optional[float] = None
    shared: Optional[Tensor] = None
    local: Optional[Tensor] = None
    coefficient: float = 0.0
    largest_lr: float = 0.0
    known: tuple[int, ...] = ()


class BucketState(abc.ABC):
    """The state of an algorithm for one bucket.

    Attributes:
        training_parameters: this rank's own parameters while ``consensus()`` has another point in their place.
        inactive: indices of the parameters that rest.
        nonfinite: for each parameter 1.0 if an infinity or nan was taken out of what this rank exchanges at this step,
            else 0.0 (on the bucket's device); None if that is not looked at.
    """

    bucket: Bucket
    training_parameters: Optional[list[Tensor]] = None
    inactive: frozenset[int] = frozenset()
    nonfinite: Optional[Tensor] = None

    def set_inactive(self, inactive: frozenset[int]) -> None:
        """Let the parameters with these indices rest: they are frozen, or have been taken out of the optimizer.

        They keep their values to the bit, and what is pending for them waits until they are trained again.
        """
        self.inactive = inactive

    @abc.abstractmethod
    def buffers(self) -> dict[str, FlatBuffer]:
        """Return the vectors that a checkpoint needs, by kind: "shared", "local", RESIDUAL_KINDS or others."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a checkpoint: ``buffers`` as live views per parameter, and numbers.

        The numbers are the same on every rank. Of "server" only this rank's shard is here, so "begins" says at which
        element of each parameter it begins.
        """
        found = self.buffers()
        saved: dict[str, Any] = {"buffers": {kind: list(buffer.views) for kind, buffer in found.items()}}
        if "local" in found and self.training_parameters is not None:
            saved["buffers"]["local"] = self.training_parameters
        if "server" in found:
            saved["begins"] = found["server"].begins
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore a ``state_dict()`` of the same algorithm, bucket, rank and number of ranks, to the bit.

        Args:
            saved: without "buffers" only the numbers are restored, as a broadcast brings them.
        """
        with torch.no_grad():
            for kind, views in saved.get("buffers", {}).items():
                torch._foreach_copy_(self.buffers()[kind].views, views)

    def load_common(self, saved: Mapping[str, Any]) -> None:
        """Restore what is the same on every rank, but for the model, of any rank's ``state_dict()`` of this bucket."""
        self.load_state_dict({k: v for k, v in saved.items() if k not in ("buffers", "begins", "known")})
        common = {k: v for k, v in saved.get("buffers", {}).items() if k not in RESIDUAL_KINDS | {"shared", "local"}}
        with torch.no_grad():
            for kind, views in common.items():
                torch._foreach_copy_(self.buffers()[kind].views, views)

    @abc.abstractmethod
    def restore(self, parts: Mapping[str, SavedParameter], own: bool) -> set[str]:
        """Take over what other states have saved of these parameters; nothing is pending yet.

        Args:
            parts: saved parameters by name; some of the bucket's may be missing.
            own: whether this rank saved them. If not, its residual is empty.

        Returns:
            Names of the parameters whose pending update is in the residual now.
        """

    @abc.abstractmethod
    def residual_vector(self) -> Optional[Tensor]:
        """Return this rank's residual, as worker and as server (flat), or None; in the algorithm's own units."""

    @abc.abstractmethod
    def pending_update(self, lr: float) -> Optional[Tensor]:
        """Return a new flat vector whose mean over ranks is the update that they have not sent yet, or None."""

    @abc.abstractmethod
    def clear_residual(self) -> None:
        """Set the residual to zero, but for parameters that rest (it has been applied by other means)."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget everything but the shared model: be as a new state is."""

    @abc.abstractmethod
    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        """Return the model that ranks share, flat; None if the parameters hold it (collective)."""

    @abc.abstractmethod
    def replica(self) -> list[Tensor]:
        """Return this rank's copy of the shared model, a vector per parameter; [] if ranks have models of their own."""

    @abc.abstractmethod
    def reset_to(self, point: Tensor) -> None:
        """Make ``point`` (flat, the same on every rank) the shared model, with an empty residual."""

    @abc.abstractmethod
    def take_over(self, point: Optional[Tensor], pending: Optional[Tensor]) -> None:
        """Go on from the state that other ranks have agreed on; nothing else is pending any more.

        Args:
            point: the shared model, flat; None: the parameters hold it.
            pending: what this rank has not sent, flat, in the algorithm's own units.
        """

    def next_round(self) -> None:  # noqa: B027
        """Continue an exchange of several rounds; called once all buckets have started."""


def add_to_views(buffer: FlatBuffer, names: Sequence[str], pending: Mapping[str, tuple[Tensor, float]]) -> set[str]:
    """Add ``factor * value`` to the views of the parameters that are in ``pending``; return their names."""
    found = [(name, view) for name, view in zip(names, buffer.views) if name in pending]
    for name, view in found:
        value, factor = pending[name]
        view.add_(value.to(view.device, view.dtype), alpha=factor)
    return {name for name, _ in found}
