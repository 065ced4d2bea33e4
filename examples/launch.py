"""Start a script under horovodrun on this host, show the output of its rank 0 and keep that of all ranks."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

PREFIX = re.compile(r"\[(?:\d+,)?(\d+)\]<std(out|err)>:")
TAIL = 25
PATIENCE = 600


class LaunchError(RuntimeError):
    """Failure of a run; the message has the end of its output."""


def command(script: Path, arguments: list[str], ranks: int) -> list[str]:
    """Return the command line that runs ``script`` on ``ranks`` local ranks, over Gloo: no MPI, no ssh.

    The ranks talk over the loopback interface. They wait long for each other, because a busy or sleeping machine
    may keep one from running for more than Gloo's default of 30 seconds.
    """
    beside = Path(sys.executable).parent / "horovodrun"
    launcher = str(beside) if beside.exists() else shutil.which("horovodrun")
    if launcher is None:
        raise LaunchError(f"horovodrun is neither beside {sys.executable} nor on PATH: is Horovod installed?")
    horovodrun = [launcher, "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}"]
    horovodrun += ["--gloo-timeout-seconds", str(PATIENCE)]
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        horovodrun += ["--network-interfaces", loopback[0]]
    return [*horovodrun, sys.executable, str(script), *arguments]


def launch(script: Path, arguments: list[str], ranks: int, log: Path, show: bool = True) -> None:
    """Run the script to its end and write its whole output to ``log``; raise LaunchError if it fails."""
    line = command(script, arguments, ranks)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout is not None
    with log.open("wb") as file:
        _copy(process.stdout, file, show)
    if process.wait() != 0:
        raise LaunchError(
            f"exit code {process.returncode} from: {' '.join(line)}\n{_reason(log)}\nThe whole output is in {log}"
        )


def _reason(log: Path) -> str:
    """Return the last lines that ranks printed or, if there are none, that horovodrun itself printed."""
    lines = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if not is_bar(line)]
    return "\n".join(([line for line in lines if PREFIX.match(line)] or lines)[-TAIL:])


def is_bar(text: str) -> bool:
    """Return whether a line is a progress bar of tqdm."""
    return "it/s]" in text or "step/s]" in text or "s/step]" in text or "?step/s" in text


def rank_zero(text: str) -> tuple[bool, str]:
    """Return whether a line of horovodrun's output is from rank 0, and the line without its prefixes."""
    ranks = PREFIX.findall(text)
    return bool(ranks) and ranks[-1][0] == "0", PREFIX.sub("", text)


def _copy(source: IO[bytes], file: IO[bytes], show: bool) -> None:
    """Copy output to ``file`` and show rank 0's lines; progress bars, on a terminal only, overwrite each other."""
    terminal = sys.stdout.isatty()
    rest = b""
    while chunk := os.read(source.fileno(), 65536):
        file.write(chunk)
        file.flush()
        *pieces, rest = re.split(rb"[\r\n]", rest + chunk)
        for piece in pieces if show else []:
            mine, text = rank_zero(piece.decode(errors="replace"))
            if not mine or not text.strip():
                continue
            if not is_bar(text):
                print(("\r\x1b[K" if terminal else "") + "  " + text, flush=True)
            elif terminal:
                print("\r\x1b[K  " + text, end="", flush=True)
    if terminal and show:
        print("\r\x1b[K", end="", flush=True)
