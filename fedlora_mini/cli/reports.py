"""`fedlora report`: tables and a figure of finished runs, from the command line."""

import argparse
from pathlib import Path
from typing import Any

from fedlora_mini.cli.settings import Add, folder_of


def report_command(args: argparse.Namespace) -> None:
    """Tables and a figure of finished runs."""
    from fedlora_mini.experiments.report import read_results

    folder = folder_of(args.out)
    report(read_results([Path(run) for run in args.runs]), folder)


def report(results: list[dict[str, Any]], folder: Path) -> None:
    """Write the tables and the figure of results, print the tables."""
    from fedlora_mini.experiments.report import write_report

    text, picture = write_report(results, folder)
    print(text.read_text(encoding="utf-8"))
    print(f"tables: {text}\nfigure: {picture}")


def print_stopped(results: list[dict[str, Any]]) -> None:
    """One line for every run that its privacy budget ended early."""
    from fedlora_mini.experiments.arms import arm_of

    for r in results:
        if why := r.get("privacy", {}).get("stopped"):
            print(f"stopped: {arm_of(r['config'])} seed {r['config']['seed']}: {why}")


def register(add: Add) -> None:
    """The command and its options."""
    made = add(
        "report", report_command, "tables and a figure of finished runs", "example: fedlora report results/a.jsonl"
    )
    made.add_argument("runs", nargs="+", metavar="RUN", help="run folders, comparison folders or .jsonl files")
    made.add_argument("--out", default=".", metavar="FOLDER", help="where report.md and report.png go [here]")
