"""One rank of a launch: run the checks of job files and note how each of their cases ended.

``horovodrun -np 2 python -m tests.multirank.support.rank contract/stepping`` runs a file by hand; ``--only TEXT``
restricts it to the cases whose names contain that text.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from typing import Callable, TextIO

import horovod.torch as hvd
import torch

from tests.multirank.support.cases import FULL, Job, calls
from tests.multirank.support.waiting import wait_without_spinning, yield_to_other_ranks


def main() -> None:
    """Run the checks of the files on the command line, in order.

    With HVD_COMPRESS_NOTES, a directory, this rank writes a line of JSON there per case: file and case, and "ok" or a
    traceback. With HVD_COMPRESS_TEST_DEVICE, such as "cuda:0", models and tensors are there.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="job files below jobs/, such as contract/stepping")
    parser.add_argument("--only", default="", help="run only the cases whose names contain this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wait_without_spinning()
    hvd.init()
    yield_to_other_ranks()
    if "HVD_COMPRESS_TEST_DEVICE" in os.environ:
        torch.set_default_device(os.environ["HVD_COMPRESS_TEST_DEVICE"])
    directory = os.environ.get("HVD_COMPRESS_NOTES")
    with open(f"{directory}/notes.{hvd.rank()}.jsonl" if directory else os.devnull, "w") as notes:
        for file in args.files:
            job = Job(file, hvd.size(), "mpi" if hvd.mpi_enabled() else "gloo", FULL)
            for name, call in calls(job.module(), job).items():
                if args.only in name:
                    run(f"{file}: {name}", call, notes)


def run(name: str, call: Callable[[], None], notes: TextIO) -> None:
    """Run one case and note how it ended; after a failure the next case runs all the same."""
    print(f"{name} ...", flush=True)
    started = time.perf_counter()
    try:
        call()
        story = "ok"
    except BaseException:
        story = traceback.format_exc()
    print(f"{story} after {time.perf_counter() - started:.1f} s", flush=True)
    notes.write(json.dumps([name, story]) + "\n")
    notes.flush()


if __name__ == "__main__":
    main()
