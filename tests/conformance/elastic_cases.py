"""Horovod's elastic tests, with a training script that wraps our optimizer; run by test_horovod_elastic.py."""

from __future__ import annotations

import os
import sys
import unittest
from pathlib import Path
from typing import Any

from tests.conformance.substitute import provide_mock

provide_mock()
sys.path[:0] = [f"{os.environ['HOROVOD_TESTS']}/{folder}" for folder in ("integration", "utils")]

from elastic_common import BaseElasticTests  # noqa: E402


class ElasticTests(BaseElasticTests, unittest.TestCase):  # type: ignore[misc]
    """Tests in which hosts come and go and ranks fail or are killed; they compare the log of each epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(str(Path(__file__).with_name("elastic_script.py")), *args, **kwargs)
