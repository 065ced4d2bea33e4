"""A coverage-guided fuzzer of one target: ``python -m tests.fuzz.harness TARGET CORPUS -max_total_time=60``.

What follows the directory of the corpus are libFuzzer's options. It needs ``pip install hvd_compress[fuzz]``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Fuzz until the time is over; the exit code is not 0 if an input breaks a rule, and the input is printed."""
    import atheris

    with atheris.instrument_imports(include=["hvd_compress", "json"]):
        from tests.fuzz import targets
    name, corpus, *options = sys.argv[1:]
    directory = Path(corpus)
    directory.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(targets.seeds(name)):
        (directory / f"seed{number}").write_bytes(content)
    atheris.Setup([sys.argv[0], str(directory), *options], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
