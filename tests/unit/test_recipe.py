"""The recipe for a new compressor in CONTRIBUTING.md, executed to the letter: one file and one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multirank.support.harness import launch

ROOT = Path(__file__).resolve().parents[2]
TRIAL = """
import horovod.torch as hvd
import torch
import hvd_compress
from hvd_compress.compressors import Layout

hvd.init()
strided = hvd_compress.compressors.Strided(every=3)
flat, layout = torch.arange(1.0, 14.0), Layout(("a", "b"), (8, 5))
codec = strided.codec(layout, torch.float32, torch.device("cpu"))
for step in range(5):
    codec.set_step(step)
    payload, image = torch.empty(codec.numel), torch.zeros(13)
    codec.encode(flat, payload)
    codec.accumulate(payload, image, 1.0)
    parts = [strided.decode(strided.encode(part, name, step)) for name, part in zip("ab", flat.split((8, 5)))]
    assert torch.equal(image, torch.cat(parts)) and 0 < int((image != 0).sum()) < 13

masked = hvd_compress.DEF(strided, coefficient=0.0, masking=True)
for algorithm in (hvd_compress.EF(strided), hvd_compress.DEF(strided), masked, hvd_compress.DistEF(strided)):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    optimizer = hvd_compress.DistributedOptimizer(sgd, model.named_parameters(), compression=algorithm)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 5)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4, losses
    assert optimizer.stats().residual_norm > 0
print("trained")
"""


def recipe() -> tuple[str, str]:
    """Return the code of the compressor and the line that makes it public, as they are printed."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    line = re.search(r"`(from hvd_compress\.compressors\.NAME import Name as Name)`", text)
    assert code
    assert line
    return code.group(1), line.group(1)


def attempt(directory: Path, name: str, with_line: bool) -> subprocess.CompletedProcess[str]:
    """Train with a copy of the package to which the recipe was added."""
    code, line = recipe()
    shutil.copytree(ROOT / "hvd_compress", directory / "hvd_compress", ignore=shutil.ignore_patterns("__pycache__"))
    compressors = directory / "hvd_compress" / "compressors"
    (compressors / f"{name}.py").write_text(code, encoding="utf-8")
    if with_line:
        with (compressors / "__init__.py").open("a", encoding="utf-8") as file:
            file.write(line.replace("NAME", name).replace("Name", "Strided") + "\n")
    return subprocess.run(
        [sys.executable, "-c", TRIAL],
        cwd=directory,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("name", ["strided", "sparse"])  # the package has a module sparse of its own
def test_one_file_and_one_line(tmp_path: Path, name: str) -> None:
    ended = attempt(tmp_path, name, with_line=True)
    assert ended.returncode == 0, ended.stderr
    assert "trained" in ended.stdout


def test_the_recipe_is_short() -> None:
    code, _ = recipe()
    assert len(code.splitlines()) <= 45


def test_without_the_line_it_is_not_there(tmp_path: Path) -> None:
    ended = attempt(tmp_path, "strided", with_line=False)
    assert ended.returncode != 0
    assert "Strided" in ended.stderr


VOTING = """
import horovod.torch as hvd
import torch
import hvd_compress
from hvd_compress.algorithms.majority_vote import MajorityVote

hvd.init()
assert hvd_compress.__file__.startswith(DIRECTORY), hvd_compress.__file__
torch.manual_seed(hvd.rank())
data, target = torch.randn(40, 5), torch.randn(40, 3)
model = torch.nn.Linear(5, 3).double()
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
sgd = torch.optim.SGD(model.parameters(), lr=0.02)
optimizer = hvd_compress.DistributedOptimizer(sgd, model.named_parameters(), compression=MajorityVote())
optimizer.check_replicas = True


def virtual():
    with optimizer.consensus("virtual"):
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


losses = []
for step in range(60):
    before = virtual()
    optimizer.zero_grad()
    loss = (model(data.double()) - target.double()).square().mean()
    loss.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    moved = 0.02 * hvd.allreduce(gradient, name="test.gradient")
    optimizer.step()
    assert torch.allclose(virtual(), before - moved, rtol=0, atol=1e-12), f"mass is lost at step {step}"
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses
assert optimizer.stats().bytes_sent > 0 and optimizer.stats().residual_norm > 0
print("voted")
"""


def test_an_update_algorithm_is_one_exchange_and_one_configuration(tmp_path: Path) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A new update algorithm")[2]
    exchange, configuration = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shutil.copytree(ROOT / "hvd_compress", tmp_path / "hvd_compress", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "hvd_compress" / "exchange" / "majority_vote.py").write_text(exchange, encoding="utf-8")
    (tmp_path / "hvd_compress" / "algorithms" / "majority_vote.py").write_text(configuration, encoding="utf-8")
    (tmp_path / "trial.py").write_text(VOTING.replace("DIRECTORY", repr(str(tmp_path))), encoding="utf-8")
    ended = launch([sys.executable, str(tmp_path / "trial.py")], ranks=2, env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 0, ended.output
    assert {f"[{rank}]<stdout>:voted" for rank in range(2)} <= set(ended.output.splitlines()), ended.output
