"""`fedlora pretrain`: the frozen base, made from a seed."""

import argparse
from pathlib import Path

from fedlora_mini.cli.settings import Add, folder_of
from fedlora_mini.errors import FedloraError


def pretrain_command(args: argparse.Namespace) -> None:
    """Make the frozen base."""
    import torch
    from tqdm import tqdm

    from fedlora_mini.experiments.pretrain import Pretraining, pretrain

    given = {n: getattr(args, n) for n in ("model", "size", "steps", "batch", "seed") if getattr(args, n) is not None}
    config = Pretraining(**given)
    if args.threads < 1:
        raise FedloraError(f"--threads must be at least 1, got {args.threads}")
    out = Path(args.out)
    folder_of(str(out.parent))
    if out.is_dir():
        raise FedloraError(f"cannot write to '{out}': it is a folder; accepted: the name of a file")
    torch.set_num_threads(args.threads)
    with tqdm(
        total=config.steps, desc=f"pre-training {config.model}", unit="step", dynamic_ncols=True, disable=None
    ) as bar:

        def progress(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        print(pretrain(config, out, progress))


def register(add: Add) -> None:
    """The command and its options."""
    option = add(
        "pretrain", pretrain_command, "make the pre-trained base from a seed, in minutes on a CPU"
    ).add_argument
    option("--model", help="a segmenting 2D network (see `fedlora models`) [minisam]")
    option("--size", type=int, help="image side in pixels [64]")
    option("--steps", type=int, help="optimiser steps [1500]")
    option("--batch", type=int, help="images a step [16]")
    option("--seed", type=int, help="draws the start and the phantoms [0]")
    option("--threads", type=int, default=1, help="the bytes depend on it [1]")
    option("--out", default="base.safetensors", metavar="FILE", help="where to write [base.safetensors]")
