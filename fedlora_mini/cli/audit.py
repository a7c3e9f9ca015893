"""`fedlora audit`: attacks on the private mechanism, from the command line."""

import argparse

from fedlora_mini.cli.settings import Add
from fedlora_mini.cli.shown import print_columns


def audit_command(args: argparse.Namespace) -> int:
    """Whether the private mechanism keeps what it claims, beside three that do not."""
    from fedlora_mini.experiments.audit import report

    found = report(args.epsilon, args.delta, args.q, args.steps, args.games, args.canaries, seed=args.seed)
    rows = [("mechanism", "claimed", "releases", "many runs", "same, Gaussian", "one run", "caught")]
    for row in found:
        bounds = ("-" if row[k] is None else f"{row[k]:.2f}" for k in ("many runs", "many runs, Gaussian", "one run"))
        rows.append(
            (row["mechanism"], f"{row['claimed']:g}", f"{row['releases']}", *bounds, str(row["caught"]).lower())
        )
    print_columns(rows)
    print("lower bounds on epsilon; those of a row hold together with 95 % confidence. Chapter 19")
    return int(found[0]["caught"])


def register(add: Add) -> None:
    """The command and its options."""
    option = add("audit", audit_command, "attacks on the private mechanism: does it keep its epsilon?").add_argument
    option("--epsilon", type=float, default=3.0, help="what it claims [3]")
    option("--delta", type=float, default=1e-5)
    option("--q", type=float, default=1.0, help="sampling rate [1]")
    option("--steps", type=int, default=4, help="releases [4]")
    option("--games", type=int, default=4000, help="runs with one canary or none [4000]")
    option("--canaries", type=int, default=1000, help="canaries of the one run [1000]")
    option("--seed", type=int, default=0)
