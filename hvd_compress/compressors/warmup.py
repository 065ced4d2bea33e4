"""Warm-up: a compressor per stage of training, for example with a density that falls geometrically."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import AnyCodec, Combine, Compressor, Payload
from hvd_compress.compressors.cast import Identity
from hvd_compress.compressors.layout import Layout


@dataclass(frozen=True)
class Warmup(Compressor):
    """A compressor whose density changes with the step, as in the warm-up of Deep Gradient Compression.

    Stage i lasts ``steps`` steps (exchanges), from step ``i * steps`` on, and has density ``densities[i]``. The
    compressor's own density follows. ``densities=(1.0,)`` means "dense first steps". For a warm-up by epochs
    set ``steps`` to the number of steps per epoch.

    Args:
        compressor: a compressor that has a density.
        densities: densities of the stages before the compressor's own, each 0 < density <= 1.
        steps: steps per stage, >= 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    compressor: Compressor
    densities: Sequence[float] = (0.25, 0.0625, 0.015625, 0.004)
    steps: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor) or not hasattr(self.compressor, "density"):
            raise ValueError(
                f"Warmup: compressor={self.compressor!r} is not allowed; it must be a compressor with a density, such "
                "as TopK(density=1/1000)"
            )
        if isinstance(self.densities, str) or not isinstance(self.densities, Sequence):
            raise ValueError(
                f"Warmup: densities={self.densities!r} is not allowed; it must be a sequence of densities, such as "
                "(1.0, 0.25)"
            )
        for i, density in enumerate(self.densities):
            validation.density("Warmup", density, f"densities[{i}]")
        validation.integer("Warmup", "steps", self.steps, 1)
        object.__setattr__(self, "densities", tuple(float(d) for d in self.densities))

    @classmethod
    def geometric(cls, compressor: Compressor, start: float, stages: int, steps: int) -> Warmup:
        """Return a warm-up whose ``stages`` densities fall from ``start`` towards the compressor's own by one factor.

        Raises:
            ValueError: if an argument is out of range.
        """
        validation.density("Warmup.geometric", start, "start")
        validation.integer("Warmup.geometric", "stages", stages, 1)
        end = float(getattr(compressor, "density", start))
        return cls(compressor, tuple(start * (end / start) ** (i / stages) for i in range(stages)), steps)

    @property
    def combine(self) -> Combine:
        return self.compressor.combine

    @property
    def is_sparsifier(self) -> bool:
        return self.compressor.is_sparsifier

    @property
    def payload_ratio(self) -> float:
        return self.compressor.payload_ratio

    @property
    def stages(self) -> tuple[Compressor, ...]:
        """Return the compressor of each stage."""
        return tuple(self.at(stage * self.steps) for stage in range(len(self.densities) + 1))

    def stage(self, step: int) -> int:
        """Return the index of the stage of a step; ``len(densities)`` is the compressor itself."""
        return min(step // self.steps, len(self.densities))

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step: ``Identity``, which sends no indices and is summed, if its density is 1."""
        stage = self.stage(step)
        if stage == len(self.densities):
            return self.compressor
        if self.densities[stage] == 1.0:
            return Identity()
        compressor: Any = self.compressor
        changed: Compressor = dataclasses.replace(compressor, density=self.densities[stage])
        return changed

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Return the payload of the compressor ``at(step)``."""
        payload = self.at(step).encode(tensor, name, step)
        return dataclasses.replace(payload, context={**payload.context, "step": step})

    def decode(self, payload: Payload) -> Tensor:
        """Decode with the compressor that made the payload."""
        return self.at(payload.context["step"]).decode(payload)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> AnyCodec:
        """Raise ValueError: a codec has one payload size, so each stage needs a codec of its own."""
        raise ValueError(f"{self!r} changes the size of its payload; take it stage by stage, by at(step)")
