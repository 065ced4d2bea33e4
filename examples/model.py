"""A small ResNet for small grey images: a stem and three stages of one basic block each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them (1x1 where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """ResNet of about 78,000 parameters at width 16; its stem halves images of 16 pixels or more."""

    def __init__(self, image_size: int, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = _conv(1, width, 2 if image_size >= 16 else 1)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm(self.stem(x)))
        logits: Tensor = self.head(torch.mean(self.stages(out), dim=(2, 3)))
        return logits
