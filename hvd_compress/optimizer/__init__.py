"""The object that replaces Horovod's: DistributedOptimizer, its arguments, consensus points and checkpoints."""

from hvd_compress.optimizer.distributed_optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
