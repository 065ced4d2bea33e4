"""The user's object: Horovod's contract, arguments, consensus points, checkpoints."""

from hvd_compress.optimizer.distributed_optimizer import DistributedOptimizer
from hvd_compress.optimizer.merging import merge_states

__all__ = ["DistributedOptimizer", "merge_states"]
