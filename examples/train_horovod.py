"""Train a small ResNet on several ranks: ``horovodrun --gloo -np 2 -H localhost:2 python THIS_FILE``."""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
import time

import horovod.torch as hvd
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import checkpoint
import common
import data
import options
from model import SmallResNet
from report import Log


def main() -> None:
    """Train, and evaluate and save after every epoch."""
    args = options.parse(__doc__)
    hvd.init()
    device = common.choose_device()
    torch.manual_seed(args.seed)

    images = data.load(args.dataset, args.data_dir, args.train_samples)
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(
        images.train, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed
    )
    loader = DataLoader(images.train, batch_size=args.batch_size, sampler=sampler, drop_last=True)
    options.require_batches(args, len(loader), len(sampler))
    model = SmallResNet(images.image_size, images.classes, args.width).to(device)

    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    schedule = options.warm_up_and_decay(args, len(loader))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    # Broadcast the weights last: Horovod fills an empty optimizer state by a step, and weight decay changes them.
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    start, ranks, history = checkpoint.load_model(args.output, model) if args.resume else (0, hvd.size(), [])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    if start:
        checkpoint.load_optimizer(args.output, start, ranks, len(loader), optimizer, scheduler)
    log = Log(args, model, history)

    last = min(args.epochs, args.stop_after or args.epochs)
    bar = tqdm(
        total=last * len(loader),
        initial=start * len(loader),
        unit="step",
        mininterval=1,
        disable=None if hvd.rank() == 0 else True,
    )
    for epoch in range(start, last):
        sampler.set_epoch(epoch)
        model.train()
        sent_before = common.megabytes_sent(optimizer, model, epoch * len(loader))
        began, loss_sum = time.perf_counter(), torch.zeros((), device=device)
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach()
            bar.update()
        train_loss = common.mean_over_ranks(loss_sum.item() / len(loader), "train_loss")
        seconds = time.perf_counter() - began
        sent = common.megabytes_sent(optimizer, model, (epoch + 1) * len(loader)) - sent_before

        common.average_batch_norm(model)
        virtual = common.virtual_accuracy(optimizer, model, images.test, device, args)
        with common.evaluation_point(optimizer):
            score = common.evaluate(model, images.test, device)
            weights = checkpoint.snapshot(model)
        log.add(
            epoch=epoch + 1,
            train_loss=train_loss,
            test_loss=score.loss,
            test_accuracy=score.accuracy,
            virtual_accuracy=virtual,
            seconds=seconds,
            mb_sent=log.megabytes + sent,
        )
        checkpoint.save(args.output, epoch + 1, weights, optimizer, scheduler, log.history)
        if not math.isfinite(train_loss):
            break
    bar.close()
    hvd.shutdown()


if __name__ == "__main__":
    main()
