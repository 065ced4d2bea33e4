"""Metadata and build of hvd_compress; see the Makefile for an environment with everything in it."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
examples = ["scikit-learn>=1.0", "matplotlib>=3.5", "tqdm>=4.60"]
kernels = {"kernels": ["kernels"], "signs": ["signs"], "sketch": ["sketch", "sketch_largest"]}
headers = sorted(path.relative_to(here).as_posix() for path in (here / "hvd_compress" / "native").glob("*.h"))
flags = ["-O3", "-std=c11", "-ffp-contract=off"]
checkpoint = ["safetensors>=0.4"]
test = ["pytest>=7.0", "hypothesis>=6.50", *checkpoint, *examples]


def read_version() -> str:
    """Return ``__version__`` of the package by reading its source: importing it would need torch and Horovod."""
    source = (here / "hvd_compress" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('hvd_compress/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="hvd_compress",
    version=read_version(),
    description="Gradient and update compression for Horovod: one line replaced, same model, less waiting",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    ext_modules=[
        # Optional: where it cannot be compiled, the package works without it, only slower.
        Extension(
            f"hvd_compress.native._{name}",
            [f"hvd_compress/native/{source}.c" for source in sources],
            depends=headers,
            extra_compile_args=flags,
            optional=True,
        )
        for name, sources in kernels.items()
    ],
    python_requires=">=3.9",
    packages=find_packages(include=["hvd_compress", "hvd_compress.*"]),
    package_data={"hvd_compress": ["py.typed"]},
    install_requires=["torch>=2.1", "horovod>=0.28.1", "numpy>=1.22", "mpi4py>=3.1"],
    extras_require={
        "checkpoint": checkpoint,
        "examples": examples,
        "test": test,
        # Not a part of "test": it has no wheel for every Python.
        "fuzz": ["atheris>=2.3"],
        # Releases of ruff format differently: this is the one that formatted the sources.
        "dev": [*test, "ruff>=0.17,<0.18", "mypy>=1.10"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
