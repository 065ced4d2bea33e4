"""ResNet-50 itself (He et al. 2016), for measurements that need a real backward pass."""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Three convolutions with batch norm around a shortcut."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *_convolution(into, width, 1, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, out, 1, 1),
        )
        project = into != out or stride != 1
        self.shortcut = nn.Sequential(*_convolution(into, out, 1, stride)) if project else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output, (N, 4 * width, H / stride, W / stride)."""
        total: Tensor = self.body(images) + self.shortcut(images)
        return total.relu_()


def _convolution(into: int, out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)


def resnet50(classes: int = 1000) -> nn.Sequential:
    """Return the network; its input is (N, 3, 224, 224), float32."""
    layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
