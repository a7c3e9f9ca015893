"""What every command shows alike: columns, a bar of rounds."""

import sys
from collections.abc import Callable, Sequence
from typing import Any


def print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """A head, a rule, rows; every column as wide as its widest cell."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))


def progress(title: str, rounds: int) -> Callable[[dict[str, Any]], None]:
    """A bar on standard error with the current loss and validation Dice."""
    from tqdm import tqdm

    bars: list[Any] = []  # begun with the first round, so that an error before it stands alone
    shown: dict[str, str] = {}

    def step(record: dict[str, Any]) -> None:
        """Show one finished round."""
        if not bars:
            bars.append(tqdm(total=rounds, desc=title, unit="round", dynamic_ncols=True, disable=None))
        bar = bars[0]
        for line in record["refused"]:
            bar.write(f"round {record['round']}: refused {line}", file=sys.stderr)
        if record["loss"] is not None:
            shown["loss"] = f"{record['loss']:.3f}"
        for name, what in (("val_dice", "Dice"), ("val_accuracy", "accuracy")):
            if name in record:
                shown[what] = f"{record[name]:.3f}"
        bar.n = record["round"]
        bar.set_postfix(shown)
        if record["round"] == rounds:
            bar.close()

    return step
