"""The script that Horovod's elastic tests train with, with the algorithm under test as the default compression."""

from __future__ import annotations

import os
import runpy

from tests.conformance.substitute import substitute

substitute()
runpy.run_path(f"{os.environ['HOROVOD_TESTS']}/integration/data/elastic_torch_main.py", run_name="__main__")
