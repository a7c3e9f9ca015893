"""`fedlora fewshot`: a new structure from a few images, from the command line."""

import argparse
from typing import Any

from fedlora_mini.cli.settings import Add, folder_of, options, parse_rates
from fedlora_mini.cli.shown import print_columns
from fedlora_mini.errors import FedloraError

EXAMPLES = """examples:
  fedlora fewshot --list                                     tasks and arms
  fedlora fewshot lora-4 arena-8 full --shots 5 --splits 0-2 the phantom's vessel, one rate for all
  fedlora fewshot --tasks nuclei-he,nuclei-fluo520 --shots 5,10 --splits 0-4 --search-lr 1e-3,3e-3,1e-2
  fedlora fewshot arena-8 --change lam=0.01 --splits 0-7     another weight of ARENA's l1 norm

Without arms: all of them. No validation data: training stops by its own loss, and --search-lr chooses each arm's rate
on a task that is not reported. An interrupted study goes on where it stopped when the same command is given again."""


def fewshot_command(args: argparse.Namespace) -> None:
    """A new structure from a few images: arms x shots x splits."""
    from tqdm import tqdm

    from fedlora_mini.experiments.compare import parse_seeds
    from fedlora_mini.experiments.fewshot import ARMS, TASKS, Study
    from fedlora_mini.experiments.fewshot.report import write_report

    if args.list:
        print_columns([("task", "what"), *((name, row.summary) for name, row in TASKS.items())])
        print()
        print_columns([("arm", "title", "adapter"), *((name, row.title, row.adapter) for name, row in ARMS.items())])
        return
    if args.search_lr is not None and args.lr is not None:
        raise FedloraError("--lr and --search-lr: give the rate, or a grid for its search")
    tasks, arms, shots = args.tasks.split(","), args.arms or list(ARMS), parse_seeds(args.shots, "shots")
    splits = parse_seeds(args.splits, "splits")
    folder = folder_of(args.out or f"runs/fewshot-{args.tasks.replace(',', '-')}")
    rates = [5e-3 if args.lr is None else args.lr]
    if args.search_lr is not None:
        rates = parse_rates(args.search_lr, "--search-lr")
    settings = {"steps": args.steps, "batch": args.batch, "patience": args.patience, "threads": args.threads}
    settings |= {"changes": tuple(options(args.change, "--change").items())}
    searched = parse_seeds(args.search_splits, "splits")
    looked = len(arms) * len(rates) * len(searched) * (len(rates) > 1)

    def on_run(record: dict[str, Any]) -> None:
        bar.update()
        own = record["config"]
        bar.set_postfix_str(f"{own['task']} {own['arm']} {own['shots']} shots: Dice {record['dice']:.3f}")

    study = Study(tasks, arms, shots, splits, folder, rates, settings, on_run, searched)
    total = len(tasks) * len(arms) * len(shots) * len(splits) + looked
    with tqdm(total=total, unit="run", disable=None) as bar:
        results = study.run()
    text, pictures = write_report(results, folder)
    print(text.read_text(encoding="utf-8"))
    print(f"tables: {text}\npictures: {', '.join(map(str, pictures))}")


def register(add: Add) -> None:
    """The command and its options."""
    option = add("fewshot", fewshot_command, "a new structure from 1 to 10 images", EXAMPLES).add_argument
    option("arms", nargs="*", metavar="ARM", help="rows of `fedlora fewshot --list` [all]")
    option("--list", action="store_true", help="print tasks and arms")
    option("--tasks", default="vessel", help="comma-separated [vessel]")
    option("--shots", default="1,2,5,10", help="labelled images, such as 5 or 1,2,5,10 [1,2,5,10]")
    option("--splits", default="0-2", help="such as 0-7: other labelled images and test images [0-2]")
    option("--search-lr", metavar="RATES", help="a grid, the same for every arm, on the tuning task")
    option("--search-splits", default="1000-1002", help="splits of the tuning task [1000-1002]")
    option("--lr", type=float, help="one rate for all arms, without --search-lr [5e-3]")
    option("--steps", type=int, default=120, help="at most so many steps [120]")
    option("--batch", type=int, default=4, help="images a step, at most the shots [4]")
    option("--patience", type=int, default=40, help="steps without a fall of the loss that end training [40]")
    option("--change", action="append", default=[], metavar="NAME=VALUE", help="an option of the regulariser")
    option("--threads", type=int, default=1, help="CPU threads [1]")
    option("--out", metavar="FOLDER", help="where to write [runs/fewshot-…]")
