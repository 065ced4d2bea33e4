"""Cases of fingerprint.py: every algorithm with every compressor that it permits, and options that change numbers."""

from __future__ import annotations

from typing import Any

Case = tuple[Any, dict[str, Any]]


class Cases:
    """The cases of one job, by name."""

    def __init__(self) -> None:
        self.found: dict[str, Case] = {}

    def add(self, name: str, algorithm: Any, **options: Any) -> None:
        """Add a case; ``options`` are DistributedOptimizer's, or say how ``train`` trains."""
        # Horovod may fuse the float16 payloads of several buckets, and where it cuts them decides how sums are rounded.
        if "Cast" in name or "fp16" in name:
            options["one_group"] = True
        self.found[name] = (algorithm, options)


def cases(launcher: str, ranks: int) -> dict[str, Case]:
    """Return every algorithm with every compressor it permits, and the options that change what is computed."""
    import hvd_compress as hc

    found = Cases()
    sketch = hc.CountSketch(columns=64, rows=3, seed=2)
    if launcher == "mpi" or ranks == 1:
        found.add("GlobalTopK", hc.GlobalTopK(0.05))
        found.add("GlobalTopK, unscaled residual", hc.GlobalTopK(0.05, rescale_residual=False))
        found.add("GlobalSketch(tree)", hc.GlobalSketch(sketch, "tree"))
    if launcher == "mpi":
        return found.found
    compressors = {
        "Identity": hc.Identity(),
        "Cast": hc.Cast(),
        "RandomBlock": hc.RandomBlock(1 / 8, seed=3),
        "RandomK": hc.RandomK(1 / 8, seed=3),
        "TopK": hc.TopK(0.05),
        "TopK sampled": hc.TopK(0.05, sampled=True),
        "BlockSign": hc.BlockSign(),
        "BlockSign(16)": hc.BlockSign(16),
        "LowRank": hc.LowRank(2),
        "Warmup(TopK)": hc.Warmup(hc.TopK(0.05), (1.0, 0.25), 8),
        "Warmup(RandomBlock)": hc.Warmup(hc.RandomBlock(1 / 8), (1.0, 0.5), 8),
    }
    add_gradient_cases(found, compressors)
    add_update_cases(found, compressors)
    add_two_way_cases(found, compressors)
    for exchange in ("allreduce", "allgather"):
        found.add(f"GlobalSketch({exchange})", hc.GlobalSketch(sketch, exchange))
        found.add(f"GlobalSketch({exchange}), unmasked", hc.GlobalSketch(sketch, exchange, k=20, masking=False))
    found.add("GlobalSketch(density)", hc.GlobalSketch(hc.CountSketch(0.2), clip_norm=1.0, dense_vectors=False))
    found.add("GlobalSketch, unscaled residual", hc.GlobalSketch(sketch, rescale_residual=False))
    block, top = compressors["RandomBlock"], compressors["TopK"]
    found.add("Policy of gradients", hc.Policy(hc.EF(block), dense_dims=1, patterns={"c.*": hc.EF(top)}))
    found.add("Policy of updates", hc.Policy(hc.DEF(block), dense_dims=1, groups={1: hc.DistEF()}))
    return found.found


def add_gradient_cases(found: Cases, compressors: dict[str, Any]) -> None:
    """Add the cases of Dense and EF."""
    import horovod.torch as hvd
    import torch

    import hvd_compress as hc

    found.add("Dense", hc.Dense())
    found.add("Dense(Cast)", hc.Dense(hc.Cast()))
    found.add("Dense, Sum", hc.Dense(), op=hvd.Sum)
    found.add("Dense, bfloat16", hc.Dense(), dtype=torch.bfloat16)
    found.add("Compression.fp16", hc.Compression.fp16)
    for name, compressor in compressors.items():
        found.add(f"EF({name})", hc.EF(compressor))
        found.add(f"EF({name}), constant rate", hc.EF(compressor), constant_rate=True)
    for name in ("RandomBlock", "TopK", "Cast"):
        compressor = compressors[name]
        found.add(f"EF({name}), unscaled residual", hc.EF(compressor, rescale_residual=False))
        found.add(f"EF({name}), Sum", hc.EF(compressor), op=hvd.Sum)
        found.add(f"EF({name}), predivided", hc.EF(compressor), gradient_predivide_factor=2.0)
        found.add(f"EF({name}), bfloat16", hc.EF(compressor), dtype=torch.bfloat16)
        found.add(f"EF({name}), float64", hc.EF(compressor), dtype=torch.float64)
        found.add(f"EF({name}), Adam", hc.EF(compressor), optimizer="adam")
    block = compressors["RandomBlock"]
    found.add("EF(RandomBlock), two passes", hc.EF(block), backward_passes_per_step=2)
    found.add("EF(RandomBlock), groups", hc.EF(block), groups=2)


def add_update_cases(found: Cases, compressors: dict[str, Any]) -> None:
    """Add the cases of DEF."""
    import horovod.torch as hvd
    import torch

    import hvd_compress as hc

    for name, compressor in compressors.items():
        found.add(f"DEF({name})", hc.DEF(compressor))
    for name in ("RandomBlock", "TopK", "Cast"):
        compressor = compressors[name]
        found.add(f"DEF({name}), unscaled residual", hc.DEF(compressor, rescale_residual=False))
        found.add(f"DEF({name}), coefficient 0", hc.DEF(compressor, 0.0))
        found.add(f"DEF({name}), coefficient 1", hc.DEF(compressor, 1.0))
        found.add(f"DEF({name}), 3 local steps", hc.DEF(compressor, local_steps=3))
        found.add(f"DEF({name}), Sum", hc.DEF(compressor), op=hvd.Sum)
        found.add(f"DEF({name}), bfloat16", hc.DEF(compressor), dtype=torch.bfloat16)
        found.add(f"DEF({name}), float64", hc.DEF(compressor), dtype=torch.float64)
        found.add(f"DEF({name}), Adam", hc.DEF(compressor), optimizer="adam")
    for name in ("RandomBlock", "RandomK", "TopK", "TopK sampled"):
        found.add(f"DEF({name}), masking", hc.DEF(compressors[name], 0.0, masking=True, clip_norm=1.0))
    for name in ("Identity", "Cast", "RandomBlock", "RandomK"):
        found.add(f"DEF({name}), auto", hc.DEF(compressors[name], "auto"))
    found.add("DEF(RandomBlock), two passes", hc.DEF(compressors["RandomBlock"]), backward_passes_per_step=2)


def add_two_way_cases(found: Cases, compressors: dict[str, Any]) -> None:
    """Add the cases of DistEF and LIEC."""
    import horovod.torch as hvd
    import torch

    import hvd_compress as hc

    for name, compressor in compressors.items():
        if name.partition("(")[0] not in ("LowRank", "Warmup"):
            found.add(f"DistEF({name})", hc.DistEF(compressor))
            found.add(f"LIEC({name})", hc.LIEC(compressor, averaging_period=7))
    found.add("DistEF(TopK, BlockSign)", hc.DistEF(compressors["TopK"], hc.BlockSign()))
    found.add("DistEF(BlockSign), unscaled residual", hc.DistEF(rescale_residual=False))
    found.add("DistEF(BlockSign), nesterov", hc.DistEF(), optimizer="nesterov")
    found.add("LIEC(BlockSign), unscaled residual", hc.LIEC(averaging_period=7, rescale_residual=False))
    found.add("LIEC(BlockSign), Sum", hc.LIEC(averaging_period=7), op=hvd.Sum)
    found.add("LIEC(BlockSign), bfloat16", hc.LIEC(averaging_period=7), dtype=torch.bfloat16)
