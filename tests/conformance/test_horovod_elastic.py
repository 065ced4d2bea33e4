"""Horovod's own elastic tests (test/integration/test_elastic_torch.py), with our optimizer in their script."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Optional

import pytest

from tests.conformance.substitute import ALGORITHMS, BY_MPI
from tests.conformance.test_horovod import CHECKOUT, HOW
from tests.multirank.support.harness import ROOT, environment, supervise

pytestmark = pytest.mark.full

# Two are left out: test_min_hosts_timeout calls its helper with an argument that this has not, and
# test_resurrecting_blacklisted_hosts_exponential_backoff must have trained five epochs before a host comes back, which
# takes one to two seconds: Horovod's own class fails it every other time on two cores.
TESTS = (
    "test_all_hosts_blacklisted",
    "test_all_ranks_failure",
    "test_fault_tolerance_without_scaling",
    "test_hosts_added_and_removed",
    "test_reset_limit",
    "test_single_rank_failure",
)
TIMEOUT = 300.0
NOT_BEGUN = (2, 3, 4, 5)  # exit codes of pytest: interrupted (an import has failed), its own error, no such test


@functools.cache
def failure(algorithm: Optional[str], test: str) -> Optional[str]:
    """Return the output of a failing test, or None; ``None`` as the algorithm is Horovod's own class.

    Raises:
        AssertionError: if the test could not begin, which is no failure of Horovod's own class.
    """
    env = environment(**({} if algorithm is None else {"HVD_COMPRESS_ALGORITHM": algorithm}))
    cases = Path(__file__).with_name("elastic_cases.py")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{cases}::ElasticTests::{test}"]
    returncode, output = supervise(line, env, TIMEOUT, ROOT)
    assert returncode not in NOT_BEGUN, output[-20000:]
    return None if returncode == 0 else output


@pytest.mark.skipif(CHECKOUT is None, reason=HOW)
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in BY_MPI])
def test_elastic(algorithm: str, test: str) -> None:
    ours = failure(algorithm, test)
    if ours is not None and failure(None, test) is not None:
        pytest.skip(f"Horovod's own optimizer does not pass this test here: {ours[-2000:]}")
    assert ours is None, ours[-20000:]
