"""Two small image data sets: scikit-learn's digits (in its wheel) and Fashion-MNIST (four .gz files)."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
# The directory that Debian's and Ubuntu's package `dataset-fashion-mnist` installs them to.
FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
IDX_UINT8 = 0x08


class Data(NamedTuple):
    """The training and the test half of a data set."""

    train: TensorDataset
    test: TensorDataset
    image_size: int
    classes: int = 10


def load(name: str, directory: Path | None = None, train_samples: int | None = None) -> Data:
    """Load the data set ``name``, standardised; if given, only the first ``train_samples`` of its training half."""
    images, labels, test_images, test_labels = _digits() if name == "digits" else _fashion_mnist(directory)
    images, labels = images[:train_samples], labels[:train_samples]
    mean, std = float(images.mean()), float(images.std())

    def dataset(pixels: NDArray[Any], classes: NDArray[Any]) -> TensorDataset:
        standardised = torch.from_numpy((pixels - mean) / std).float().unsqueeze(1)
        return TensorDataset(standardised, torch.from_numpy(classes.astype(np.int64)))

    return Data(dataset(images, labels), dataset(test_images, test_labels), images.shape[-1])


def _digits() -> tuple[NDArray[Any], ...]:
    """Load 1797 images of 8x8, always split into the same 1437 to train and 360 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order] / 16.0, digits.target[order]
    cut = len(labels) * 4 // 5
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def _fashion_mnist(directory: Path | None) -> tuple[NDArray[Any], ...]:
    """Load 60000 + 10000 images of 28x28 from ``directory``, the distribution's package or a download."""
    if directory is None and all((FASHION_PACKAGE / name).exists() for name in FASHION_MD5):
        directory = FASHION_PACKAGE
    if directory is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        directory = cache / "hvd_compress" / "fashion-mnist"
    _download_missing(directory)
    arrays = [read_idx(directory / name) for name in FASHION_MD5]
    return arrays[0] / np.float32(255), arrays[1], arrays[2] / np.float32(255), arrays[3]


def _download_missing(directory: Path) -> None:
    """Download missing files on the first rank of each host; on failure every rank exits. Collective."""
    problem = ""
    if hvd.local_rank() == 0:
        try:
            for name, md5 in FASHION_MD5.items():
                if not (directory / name).exists():
                    _download(FASHION_URL + name, directory / name, md5)
        except (OSError, ValueError) as error:
            problem = (
                f"Fashion-MNIST: {error}. Fetch {', '.join(FASHION_MD5)} from {FASHION_URL} and give their "
                "directory with --data-dir, or on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
            )
    # This is also the barrier at which the other ranks wait for the download.
    problems = [text for text in hvd.allgather_object(problem, name="data.fashion_mnist") if text]
    if problems:
        raise SystemExit(problems[0])


def _download(url: str, target: Path, md5: str) -> None:
    print(f"fetching {url}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=60) as response:
        content = response.read()
    if hashlib.md5(content).hexdigest() != md5:
        raise ValueError(f"{url} did not arrive whole (wrong MD5)")
    part = target.with_name(f"{target.name}.{hvd.rank()}.part")
    part.write_bytes(content)
    os.replace(part, target)


def read_idx(path: Path) -> NDArray[Any]:
    """Read a gzipped IDX file of bytes: two zeros, the type, the number of dimensions, the sizes, the data."""
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != bytes([0, 0, IDX_UINT8]):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = content[3]
    shape = tuple(int(size) for size in np.frombuffer(content, ">i4", dimensions, offset=4))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
