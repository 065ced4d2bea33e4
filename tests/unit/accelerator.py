"""A GPU for unit tests, without one: fake CUDA tensors, and a mode that refuses what would make the host wait.

Fake tensors (torch's FakeTensorMode) have a device, shape and dtype but no data: asking for a value is an error, and
the branches that are not for the CPU are taken. ``Accelerator`` sees every operation besides, and refuses what fake
tensors let pass: tensors of several devices in one ``_foreach`` operation, copies between devices.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    from torch._subclasses.fake_tensor import unset_fake_temporarily
except ImportError:
    pytest.skip("fake CUDA tensors that hide real ones need torch >= 2.2", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Slicing and copying ask for a guard of the device, which a torch without CUDA does not have: this one does nothing.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
"""


def _register_guard() -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "guard.cpp"), Path(directory, "guard.so")
        source.write_text(GUARD)
        options = [f"-I{path}" for path in cpp_extension.include_paths()]
        options += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10"]
        command = [cpp_extension.get_cxx_compiler(), "-shared", "-fPIC", "-O0", "-std=c++20", str(source), *options]
        subprocess.run([*command, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


if not torch.cuda.is_available():
    _register_guard()


class HostWaits(AssertionError):
    """An accelerator would have made the host wait, or refused the operation."""


class Accelerator(TorchDispatchMode):
    """Sees every torch operation; ``operations`` counts those on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a fake tensor is asked where it is: no work
            return func(*args)
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.operations += DEVICE in devices
        if func is torch.ops.aten.copy_.default and args[0].device.type == "cpu" and args[2:] == (True,):
            return args[0]  # what a device sends without being waited for has not arrived yet
        if len(devices) > 1:
            raise HostWaits(f"{func} works on tensors of devices {sorted(map(str, devices))}")
        if DEVICE in devices and WAITING & set(func.tags):
            raise HostWaits(f"{func} needs values of device {DEVICE} on the host")
        result = self.run(func, args, kwargs)
        there = {leaf.device for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if devices and there - devices:
            raise HostWaits(f"{func} moves a tensor from device {devices} to {there}")
        return result

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Host tensors stay real ones, with values."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kwargs.get("device") == DEVICE or any(tensor.device == DEVICE for tensor in tensors):
            if func is torch.ops.aten.split.Tensor and not args[0].numel():
                return [args[0].detach()]  # as real tensors do; fake ones of some releases (2.11) fail
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


class Uploading(Accelerator):
    """Lets host memory be copied to the device without waiting: what is drawn on the host must get there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs and kwargs.get("non_blocking"):
            return self.run(func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """No operation of the test may make the host wait; some must run on the device."""
    yield from _running(Accelerator(), monkeypatch)


@pytest.fixture
def uploading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploading]:
    """The same, but copies to the device that nothing waits for are allowed."""
    yield from _running(Uploading(), monkeypatch)  # type: ignore[misc]


def _running(mode: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    real_address: Callable[[Tensor], int] = Tensor.data_ptr

    def address(tensor: Tensor) -> int:  # fake tensors have none, and yet views of one memory must be recognised
        if tensor.device != DEVICE:
            return real_address(tensor)
        return int(tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size())

    monkeypatch.setattr(Tensor, "data_ptr", address)
    with FakeTensorMode(allow_non_fake_inputs=True), mode:
        yield mode
    assert mode.operations, "nothing ran on the device: the test proves nothing"
