"""What `run`, `network` and `compare` may set: options of the parser, and the `RunConfig` settings they give."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedlora_mini.errors import FedloraError

Add = Callable[..., argparse.ArgumentParser]
"""(name, what it calls, help, examples) -> a command's parser."""

PRIVATE = ("unit", "delta", "accountant", "clip", "clipping", "micro", "quantile", "secure")
"""Options that mean nothing without --epsilon or --sigma."""


def options(pairs: Sequence[str], option: str = "--option") -> dict[str, Any]:
    """NAME=VALUE of a repeated option."""
    from fedlora_mini.experiments.arms import value

    out = {}
    for pair in pairs:
        name, found, given = pair.partition("=")
        if not found:
            raise FedloraError(f"{option} '{pair}' is not understood; accepted: NAME=VALUE")
        out[name.replace("-", "_")] = value(given)
    return out


def data_options(pairs: Sequence[str]) -> dict[str, Any]:
    """The data set's own options. Raises for what has an option of the command."""
    given = options(pairs)
    for name in given:
        if name in ("size", "seed", "sites", "unseen", "name"):
            raise FedloraError(
                f"--option {name}=… is no option of a data set: use --{'data' if name == 'name' else name}"
            )
    return given


def parse_rates(text: str, option: str) -> list[float]:
    """ "1e-3,3e-3" -> [0.001, 0.003]."""
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) != len(rates):
        raise FedloraError(
            f"{option} '{text}' is not understood; accepted: positive numbers such as 1e-3,3e-3, none twice"
        )
    return rates


def folder_of(text: str) -> Path:
    """The folder to write to; it need not be there. Raises, before anything runs, if it cannot be written to."""
    folder = Path(text)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise FedloraError(f"cannot write to '{text}': '{there}' {why}; accepted: a folder, or the name of a new one")
    return folder


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The `RunConfig` settings among the parsed arguments; what was not given keeps its default."""
    names = (
        "data sites unseen size dirichlet clients model base rank alpha rounds steps batch lr optimiser weight_decay "
        "fraction execution device precision threads eval_every passes epsilon unit sigma delta accountant clip "
        "clipping micro quantile"
    )
    given = {name: getattr(args, name) for name in names.split() if getattr(args, name, None) is not None}
    if args.epsilon is None and args.sigma is None:
        for name in PRIVATE:
            if getattr(args, name) is not None and getattr(args, name) is not False:
                raise FedloraError(f"--{name} needs --epsilon or --sigma: without one of them nothing is private")
    if args.quantile is not None and args.unit != "client":
        raise FedloraError("--quantile needs --unit client: an image's gradients have a fixed C")
    if args.steps is not None and args.passes is not None:
        raise FedloraError("--steps and --passes: give the local steps, or how often they go through the data")
    if args.ranks is not None:
        if not all(rank.strip().isdecimal() for rank in args.ranks.split(",")):
            raise FedloraError(f"--ranks '{args.ranks}' is not understood; accepted: whole numbers such as 2,4,8")
        given["ranks"] = [int(rank) for rank in args.ranks.split(",")]
    given |= {"data_options": data_options(args.option), "change": options(args.change, "--change")}
    given["leakage"], given["whole_unseen"] = args.leakage, args.whole_unseen
    given["secure"] = args.secure
    return given | {"augment": not args.no_augment}


def add_run_settings(parser: argparse.ArgumentParser) -> None:
    """The options of one federated run."""
    add = parser.add_argument
    add("--data", help="a data set (see `fedlora data list`) or the path of your own folder or zip [phantom]")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the data set; repeatable")
    add("--sites", help="how many sites, or their names, comma-separated")
    add("--unseen", help="sites that never train, comma-separated")
    add("--whole-unseen", action="store_true", help="score these on all their images [on their test share]")
    add("--size", type=int, help="image side in pixels [64]")
    add("--dirichlet", type=float, metavar="ALPHA", help="deal the images anew, Dirichlet(ALPHA) over their origin")
    add("--clients", type=int, help="with --dirichlet: to so many clients")
    add("--model", help="a network (see `fedlora models`) [minisam]")
    add("--base", help="auto, none, meshnet-brain, imagenet, or a file of `fedlora pretrain` [auto]")
    add("--rank", type=int, help="rank r of the adapters [4]")
    add("--ranks", help="ranks by client in a circle, such as 2,4,8, for methods that take unequal ones")
    add("--alpha", type=float, help="scale s = alpha / r [alpha = r]")
    add("--rounds", type=int, help="rounds of communication [10]")
    add("--steps", type=int, help="local steps a round [10]")
    add("--passes", type=float, help="local steps by the client's own data: so many times through it")
    add("--batch", type=int, help="images a step [8]")
    add("--lr", type=float, help="learning rate [the adapter's: lora 5e-3, full 1e-3]")
    add("--optimiser", help="adam or sgd [adam]")
    add("--weight-decay", type=float, help="decoupled weight decay [0]")
    add("--no-augment", action="store_true", help="no mirrored images")
    add("--fraction", type=float, help="share of the clients in a round [1]")
    add("--execution", help="auto, sequential, or grouped: all clients in one pass [auto: where it pays]")
    add("--device", help="auto, cpu or cuda [auto]")
    add("--precision", help="auto, float32 or bf16 [auto: bf16 on CUDA]")
    add("--change", action="append", default=[], metavar="NAME=VALUE", help="another number in the method's row")
    add("--leakage", action="store_true", help="measure in every round what shared factors tell of the sites")
    add("--epsilon", type=float, help="privacy budget: what may be spent on any one image, or client [no privacy]")
    add("--unit", help="what is protected: image or client [image]")
    add("--sigma", type=float, help="noise multiplier [with --epsilon: the least that the accountant allows]")
    add("--delta", type=float, help="of the privacy budget [1e-5]")
    add("--accountant", help="pld (tight), rdp, gdp or zcdp [pld]")
    add("--clip", type=float, metavar="C", help="largest norm of one image's gradient, or client's change [1]")
    add("--quantile", type=float, help="with --unit client: C follows this quantile of the norms [C stays]")
    add("--clipping", help="flat, per-layer or normalised [flat]")
    add("--micro", type=int, metavar="N", help="images whose own gradients are held in memory at once [64]")
    add("--secure", action="store_true", help="noise and coins from the operating system: a run cannot be repeated")
    add("--threads", type=int, help="CPU threads [torch's choice]")
    add("--eval-every", type=int, default=2, metavar="N", help="validation Dice every N rounds, 0 = never [2]")
    add("--out", metavar="FOLDER", help="where to write [runs/…]")
