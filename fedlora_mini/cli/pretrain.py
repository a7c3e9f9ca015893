"""`fedlora pretrain`: the frozen base, made from a seed."""

import argparse
from pathlib import Path

from fedlora_mini.cli.settings import Add


def pretrain_command(args: argparse.Namespace) -> None:
    """Make the frozen base."""
    import torch
    from tqdm import tqdm

    from fedlora_mini.experiments.pretrain import Pretraining, pretrain

    given = {n: getattr(args, n) for n in ("model", "size", "steps", "batch", "seed") if getattr(args, n) is not None}
    config = Pretraining(**given)
    torch.set_num_threads(args.threads)
    with tqdm(
        total=config.steps, desc=f"pre-training {config.model}", unit="step", dynamic_ncols=True, disable=None
    ) as bar:

        def progress(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        print(pretrain(config, Path(args.out), progress))


def register(add: Add) -> None:
    """The command and its options."""
    option = add(
        "pretrain", pretrain_command, "make the pre-trained base from a seed, in minutes on a CPU"
    ).add_argument
    option("--model")
    for name in ("size", "steps", "batch", "seed"):
        option(f"--{name}", type=int)
    option("--threads", type=int, default=1, help="the bytes depend on it [1]")
    option("--out", default="base.safetensors", metavar="FILE")
