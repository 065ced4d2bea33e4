"""Messages about methods that are called at the wrong moment; two of them are Horovod's own."""

STEP_AFTER_SYNCHRONIZE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). This can "
    "cause training slowdown. You may want to consider using optimizer.skip_synchronize() context if you use "
    "optimizer.synchronize() in your code."
)
SKIPPED_TOO_EARLY = (
    "optimizer.step() inside optimizer.skip_synchronize() without optimizer.synchronize() before it (rank {rank}): the "
    "gradients of this step have not been exchanged. Call synchronize() first, or step() outside of the context"
)
ZERO_GRAD_TOO_EARLY = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
    "This is prohibited as it can cause a race condition."
)
