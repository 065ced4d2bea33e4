"""One rank of a job: run the checks of a job file and note how each of their cases ended.

``horovodrun -np 2 python -m tests.multirank.support.rank contract/stepping`` runs a file by hand; a second argument
restricts it to the cases whose names contain that text.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import horovod.torch as hvd
import torch

from tests.multirank.support.cases import FULL, Job, calls


def main(file: str, wanted: str = "") -> None:
    """Run the checks of ``file``; after a failure the next case runs all the same.

    With HVD_COMPRESS_NOTES, a directory, this rank writes a line of JSON there per case: its name and "ok" or a
    traceback.
    """
    torch.set_num_threads(1)
    hvd.init()
    job = Job(file, hvd.size(), "mpi" if hvd.mpi_enabled() else "gloo", FULL)
    directory = os.environ.get("HVD_COMPRESS_NOTES")
    with open(f"{directory}/notes.{hvd.rank()}.jsonl" if directory else os.devnull, "w") as notes:
        for name, call in calls(job.module(), job).items():
            if wanted not in name:
                continue
            print(f"{name} ...", flush=True)
            try:
                call()
                story = "ok"
            except BaseException:
                story = traceback.format_exc()
                print(story, flush=True)
            notes.write(json.dumps([name, story]) + "\n")
            notes.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
