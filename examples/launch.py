"""Starts a script under horovodrun on this host, shows what its rank 0 prints and keeps everything."""

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
    """The run failed; the message has the end of what it printed."""


def command(script: Path, arguments: list[str], ranks: int) -> list[str]:
    """What to type for it. Gloo needs no MPI at run time and no ssh to this host.

    All ranks are here, so they talk over the loopback interface; and they wait long for each other, as a
    busy or sleeping machine may keep one from running for more than Gloo's 30 seconds.
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
    """Runs it to its end; its whole output goes to `log`. Raises LaunchError if it fails."""
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
    """The end of what the ranks said; horovodrun's own words, a long traceback, only if no rank said anything."""
    lines = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if not is_bar(line)]
    return "\n".join(([line for line in lines if PREFIX.match(line)] or lines)[-TAIL:])


def is_bar(text: str) -> bool:
    return "it/s]" in text or "step/s]" in text or "s/step]" in text or "?step/s" in text


def rank_zero(text: str) -> tuple[bool, str]:
    """Whether a piece of horovodrun's output is rank 0's, and the piece without its prefixes."""
    ranks = PREFIX.findall(text)
    return bool(ranks) and ranks[-1][0] == "0", PREFIX.sub("", text)


def _copy(source: IO[bytes], file: IO[bytes], show: bool) -> None:
    """Progress bars end in a carriage return: shown on a terminal, where the next one covers them."""
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
