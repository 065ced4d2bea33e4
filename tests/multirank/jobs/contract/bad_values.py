"""Bad values of compressors, algorithms and policies: every rank's ValueError names the argument and the value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import hvd_compress
from tests.multirank.support.cases import cases
from tests.multirank.support.refusals import Bad, refused

RANKS = (2,)

# Each expression with fragments of its error.
COMPRESSORS: dict[str, tuple[str, ...]] = {
    **{f"TopK({v})": ("TopK: density", f"={v}") for v in ("0", "-0.1", "1.5", "True", "'0.1'", "None")},
    **{f"RandomK({v})": ("RandomK: density", f"={v}") for v in ("0.0", "2", "False", "'all'")},
    **{f"RandomBlock({v})": ("RandomBlock: density", f"={v}") for v in ("0", "1.0001", "[0.5]")},
    "RandomBlock(math.nan)": ("RandomBlock: density", "=nan"),
    "RandomBlock(math.inf)": ("RandomBlock: density", "=inf"),
    "RandomBlock(torch.tensor(0.5))": ("RandomBlock: density", "tensor(0.5000"),
    "TopK(0.1, sampled=1)": ("TopK: sampled=1", "True or False"),
    "TopK(0.1, sampled='no')": ("TopK: sampled='no'",),
    **{f"RandomBlock(0.5, seed={v})": (f"RandomBlock: seed={v}", "integer >= 0") for v in ("-1", "0.5", "True", "'a'")},
    **{f"RandomK(0.5, seed={v})": (f"RandomK: seed={v}",) for v in ("-1", "None")},
    **{f"LowRank({v})": (f"LowRank: rank={v}", "integer >= 1") for v in ("0", "-2", "1.5", "None", "True")},
    "LowRank(2, seed=-1)": ("LowRank: seed=-1",),
    **{f"BlockSign({v})": ("BlockSign: block_size", f"={v}") for v in ("0", "-8", "8.0", "'tensor'", "True")},
    **{f"CountSketch(0.1, rows={v})": (f"CountSketch: rows={v}",) for v in ("0", "2.5", "None")},
    **{f"CountSketch(columns={v})": (f"CountSketch: columns={v}",) for v in ("0", "-4", "1.0")},
    "CountSketch(0)": ("CountSketch: density", "=0"),
    "CountSketch(0.1, seed=-1)": ("CountSketch: seed=-1",),
    **{f"Cast({v})": (f"Cast: dtype={v}",) for v in ("torch.bfloat16", "torch.int8", "'float16'", "None")},
    "Warmup(TopK(0.1), 0.5)": ("Warmup: densities=0.5", "sequence"),
    "Warmup(TopK(0.1), 'fast')": ("Warmup: densities='fast'",),
    "Warmup(TopK(0.1), (1.0, 0.0))": ("Warmup: densities[1]", "=0.0"),
    "Warmup(TopK(0.1), (math.nan,))": ("Warmup: densities[0]", "=nan"),
    "Warmup(TopK(0.1), steps=0)": ("Warmup: steps=0",),
    "Warmup(TopK(0.1), steps=1.5)": ("Warmup: steps=1.5",),
    "Warmup(BlockSign())": ("Warmup: compressor=BlockSign", "density"),
    "Warmup(TopK)": ("Warmup: compressor=<class", "TopK"),
    "Warmup(Warmup(TopK(0.1)))": ("Warmup: compressor=Warmup",),
    "Warmup.geometric(TopK(0.1), 2.0, 3, 10)": ("Warmup.geometric: start", "=2.0"),
    "Warmup.geometric(TopK(0.1), 0.5, 0, 10)": ("Warmup.geometric: stages=0",),
    "Warmup.geometric(BlockSign(), 0.5, 2, 10)": ("Warmup: compressor=BlockSign",),
}
ALGORITHMS: dict[str, tuple[str, ...]] = {
    **{f"EF({v})": (f"EF: compressor={v}", "compressor object") for v in ("None", "0.1", "'topk'")},
    "EF(TopK)": ("EF: compressor=<class", "TopK"),
    "EF(EF(TopK()))": ("EF: compressor=EF(",),
    "EF(CountSketch())": ("EF: compressor=CountSketch", "GlobalSketch"),
    "EF(TopK(), rescale_residual=1)": ("EF: rescale_residual=1",),
    **{f"DEF(TopK(), {v})": (f"DEF: coefficient={v}",) for v in ("2", "-0.1", "'Auto'", "None", "True")},
    "DEF(TopK(), math.nan)": ("DEF: coefficient=nan",),
    "DEF(TopK(), 'auto')": ("DEF: coefficient='auto'", "TopK"),
    "DEF(Warmup(RandomBlock()), 'auto')": ("DEF: coefficient='auto'", "Warmup"),
    **{f"DEF(TopK(), local_steps={v})": (f"DEF: local_steps={v}",) for v in ("0", "-1", "1.5", "True")},
    "DEF(LowRank(), masking=True)": ("DEF: masking=True", "LowRank"),
    "DEF(TopK(), masking='yes')": ("DEF: masking='yes'",),
    **{f"DEF(TopK(), clip_norm={v})": (f"DEF: clip_norm={v}",) for v in ("0", "-1.0", "'5'", "True")},
    "DEF(Dense())": ("DEF: compressor=Dense(",),
    "DEF(CountSketch())": ("DEF: compressor=CountSketch", "GlobalSketch"),
    "DistEF(LowRank())": ("DistEF: compressor=LowRank", "no server"),
    "DistEF(Warmup(TopK()))": ("DistEF: compressor=Warmup", "one payload size"),
    "DistEF(None)": ("DistEF: compressor=None",),
    "DistEF(server_compressor='sign')": ("DistEF: server_compressor='sign'",),
    "DistEF(rescale_residual=None)": ("DistEF: rescale_residual=None",),
    **{f"LIEC(averaging_period={v})": (f"LIEC: averaging_period={v}",) for v in ("0", "-3", "2.0", "None", "True")},
    "LIEC(LowRank())": ("LIEC: compressor=LowRank", "no server"),
    "LIEC(CountSketch())": ("LIEC: compressor=CountSketch",),
    "LIEC(Warmup(TopK()))": ("LIEC: compressor=Warmup",),
    "Dense(TopK())": ("Dense: compressor=TopK", "EF("),
    "Dense('fp16')": ("Dense: compressor='fp16'", "Cast"),
    "GlobalSketch(None)": ("GlobalSketch: sketch=None", "CountSketch"),
    "GlobalSketch(exchange=None)": ("GlobalSketch: exchange=None", "allgather"),
    **{f"GlobalSketch(k={v})": (f"GlobalSketch: k={v}",) for v in ("0", "0.5", "True")},
    **{f"GlobalSketch(candidates={v})": (f"GlobalSketch: candidates={v}",) for v in ("0", "None")},
    "GlobalSketch(masking=1)": ("GlobalSketch: masking=1",),
    "GlobalSketch(dense_vectors='yes')": ("GlobalSketch: dense_vectors='yes'",),
    "GlobalSketch(clip_norm=math.inf)": ("GlobalSketch: clip_norm=inf",),
    **{f"GlobalTopK({v})": ("GlobalTopK: density", f"={v}") for v in ("0", "-1", "'k'")},
    "GlobalTopK(0.1, rescale_residual=0)": ("GlobalTopK: rescale_residual=0",),
}
POLICIES: dict[str, tuple[str, ...]] = {
    "Policy(None)": ("Policy: default=None",),
    "Policy(TopK())": ("Policy: default=TopK", "algorithm"),
    "Policy(Policy(Dense()))": ("Policy: default=Policy(",),
    **{f"Policy(Dense(), dense_below={v})": (f"Policy: dense_below={v}",) for v in ("-1", "1.5", "True")},
    **{f"Policy(Dense(), dense_dims={v})": (f"Policy: dense_dims={v}",) for v in ("-2", "'1'")},
    "Policy(Dense(), patterns=3)": ("Policy: patterns=3", "pairs"),
    "Policy(Dense(), patterns='*.bias')": ("Policy: patterns='*.bias'", "pairs"),
    "Policy(Dense(), patterns=[('a',)])": ("Policy: patterns=[('a',)]", "pairs"),
    "Policy(Dense(), patterns={1: Dense()})": ("Policy: patterns={1: ", "strings"),
    "Policy(Dense(), patterns={'*': TopK()})": ("Policy: patterns['*']=TopK",),
    "Policy(Dense(), groups={'0': Dense()})": ("Policy: groups: the key='0'",),
    "Policy(Dense(), groups={-1: Dense()})": ("Policy: groups: the key=-1",),
    "Policy(Dense(), groups={0: None})": ("Policy: groups[0]=None",),
    "Policy(Dense(), groups=[Dense()])": ("Policy: groups=[Dense", "pairs"),
    "Policy(EF(TopK()), groups={1: DEF(TopK())})": ("Policy: groups[1]=DEF", "gradients", "updates"),
    "Policy(DEF(TopK()), patterns={'a': DEF(TopK(), local_steps=2)})": ("Policy: patterns['a']=DEF", "local_steps=2"),
    "Policy(DEF(TopK()), patterns={'a': DEF(TopK(), clip_norm=2.0)})": ("Policy: patterns['a']=DEF", "clip_norm=2.0"),
}
# Well-formed, but not possible in this job, or not by itself.
UNUSABLE: dict[str, tuple[str, ...]] = {
    "RandomBlock()": ("compression=RandomBlock", "EF("),
    "EF": ("compression=<class", "EF"),
    "None": ("compression=None",),
    "'ef'": ("compression='ef'",),
    "Compression": ("compression=<class", "Compression.none"),
    "GlobalTopK(0.1)": ("GlobalTopK", "MPI"),
    "GlobalSketch(exchange='tree')": ("GlobalSketch: exchange='tree'", "MPI"),
    "Policy(DEF(TopK()), patterns={'*': GlobalTopK(0.1)})": ("GlobalTopK", "MPI"),
}


def evaluate(expression: str) -> Any:
    """Return the value of an expression in the names of the package."""
    return eval(expression, {**vars(hvd_compress), "math": math, "torch": torch})


def wrap_with(expression: str) -> None:
    """Wrap an optimizer with this compression."""
    hvd_compress.DistributedOptimizer(
        torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), compression=evaluate(expression)
    )


@cases({expression: (expression, text) for expression, text in {**COMPRESSORS, **ALGORITHMS, **POLICIES}.items()})
def check_value(case: tuple[str, tuple[str, ...]]) -> None:
    expression, fragments = case
    refused(Bad(lambda: evaluate(expression), fragments))


@cases({expression: (expression, text) for expression, text in UNUSABLE.items()})
def check_compression(case: tuple[str, tuple[str, ...]]) -> None:
    expression, fragments = case
    refused(Bad(lambda: wrap_with(expression), fragments))
