"""Parameter shapes of the networks that the benchmarks imitate."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """Return the 161 parameter shapes of ResNet-50 (25 557 032 elements) in the order of its modules."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            wide = 4 * width
            shapes += [*_convolution(width, channels, 1), *_convolution(width, width, 3), *_convolution(wide, width, 1)]
            if block == 0:
                shapes += _convolution(wide, channels, 1)
            channels = wide
    return [*shapes, (1000, channels), (1000,)]


def numel(shapes: list[Shape]) -> int:
    """Return the number of elements of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


def _convolution(out: int, into: int, kernel: int) -> list[Shape]:
    """Return the shapes of a convolution's weight and of the weight and bias of the batch norm after it."""
    return [(out, into, kernel, kernel), (out,), (out,)]
