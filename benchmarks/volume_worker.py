"""One rank of volume.py: train a few steps with each method and print the bytes counted by the host's interface."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import horovod.torch as hvd
import torch

import hvd_compress
from benchmarks.cases import Case, make_gradients
from benchmarks.formulas import METHODS
from benchmarks.models import Shape, resnet50
from benchmarks.step_time import bytes_sent, timed_step

WARM_UP = 2  # names are negotiated once


def make(name: str, shapes: list[Shape], gradients: list[torch.Tensor]) -> Case:
    """Build a method's own parameters, and SGD with momentum wrapped by the method."""
    parameters = [torch.nn.Parameter(torch.full(shape, 0.01)) for shape in shapes]
    named = [(f"{name}.{index}", parameter) for index, parameter in enumerate(parameters)]
    sgd = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    build = METHODS[name].build
    if build is None:
        return Case(name, parameters, hvd.DistributedOptimizer(sgd, named_parameters=named), gradients)
    return Case(name, parameters, hvd_compress.DistributedOptimizer(sgd, named, build()), gradients)


def main() -> None:
    """Measure every method named on the command line."""
    torch.set_num_threads(1)
    hvd.init()
    shapes = resnet50()
    gradients = make_gradients(shapes, hvd.rank())
    for name in sys.argv[1:]:
        case, steps = make(name, shapes, gradients), METHODS[name].steps
        for _ in range(WARM_UP):
            timed_step(case, None)
        earlier, before = case.stats(), bytes_sent()
        for _ in range(steps):
            timed_step(case, None)  # ends with a barrier: everything of the step is counted
        counted, stats = bytes_sent() - before, case.stats()
        record = {"method": name, "counted": counted / steps, "stats": 0.0}
        if stats is not None:
            record["stats"] = (stats.total_bytes_sent - earlier.total_bytes_sent) / steps
        hvd.barrier()
        print("VOLUME " + json.dumps(record), flush=True)
        del case  # eight ranks of two methods at once would not fit into a small machine's memory
        gc.collect()
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main()
