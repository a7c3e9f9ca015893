"""`fedlora audit`: attacks on the private mechanism, from the command line."""

import argparse
import sys

from fedlora_mini.cli.settings import Add
from fedlora_mini.cli.shown import print_columns
from fedlora_mini.errors import FedloraError


def audit_command(args: argparse.Namespace) -> int:
    """Whether the private mechanism keeps what it claims, beside three that do not.

    Status 1 if it is accused, or if one of the three is not caught.
    """
    from fedlora_mini.experiments.audit import RIGHT, convictable, misjudged, report, suspects
    from fedlora_mini.experiments.config import LARGEST_EPSILON

    if not 0 < args.epsilon <= LARGEST_EPSILON:
        raise FedloraError(f"--epsilon must be positive and at most {LARGEST_EPSILON:g}, got {args.epsilon}")
    right = suspects(args.epsilon, args.delta, args.q, args.steps)[RIGHT]
    if args.games >= 8 and args.canaries >= 10 and not convictable(right, args.games, args.canaries):
        raise FedloraError(
            f"--games {args.games} and --canaries {args.canaries} are too few to convict anyone of more than epsilon "
            f"{args.epsilon:g}, even by guesses that are all right: take more"
        )
    found = report(args.epsilon, args.delta, args.q, args.steps, args.games, args.canaries, seed=args.seed)
    numbers = ("many runs", "many runs, Gaussian", "one run", "FPR", "TPR", "allowed")
    rows = [("mechanism", "claimed", "releases", "many runs", "same, Gaussian", *numbers[2:], "by", "caught")]
    for row in found:
        told = ("-" if row[k] is None else f"{row[k]:.{3 if k == 'FPR' else 2}f}" for k in numbers)
        verdict = ", ".join(row["by"]) or "-", str(row["caught"]).lower()
        rows.append((row["mechanism"], f"{row['claimed']:g}", f"{row['releases']}", *told, *verdict))
    print_columns(rows)
    print(
        "lower bounds on epsilon; TPR at least, at an FPR of at most, and the TPR that the claim's curve allows there. "
        "All of a row holds together with 95 % confidence. Chapter 19"
    )
    if wrong := misjudged(found):
        print(f"broken and not caught, or right and accused: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def register(add: Add) -> None:
    """The command and its options."""
    option = add("audit", audit_command, "attacks on the private mechanism: does it keep its epsilon?").add_argument
    option("--epsilon", type=float, default=3.0, help="what it claims [3]")
    option("--delta", type=float, default=1e-5, help="at which it claims that [1e-5]")
    option("--q", type=float, default=1.0, help="sampling rate [1]")
    option("--steps", type=int, default=4, help="releases [4]")
    option("--games", type=int, default=4000, help="runs with one canary or none [4000]")
    option("--canaries", type=int, default=1000, help="canaries of the one run [1000]")
    option("--seed", type=int, default=0, help="draws the noise, the samples and who is in [0]")
