"""What there is: `fedlora methods | adapters | models | data`."""

import argparse
from pathlib import Path

from fedlora_mini.cli.settings import Add, options
from fedlora_mini.cli.shown import print_columns
from fedlora_mini.errors import FedloraError


def methods_command(args: argparse.Namespace) -> None:
    """Print the method table, from a tiny run of every row."""
    from tqdm import tqdm

    from fedlora_mini.experiments.table import table
    from fedlora_mini.federation.methods import METHODS, method

    names = args.names or list(METHODS)
    for name in names:
        method(name)
    checked = list(tqdm(table(names, args.model), "running", len(names), leave=False, unit="row", disable=None))
    if args.check:
        for each in checked:
            print(f"{each.row.name:<16} {'; '.join(each.problems) or 'as it says'}")
        if bad := [each.row.name for each in checked if each.problems]:
            raise FedloraError(f"{len(bad)} rows do not do what they say: {', '.join(bad)}")
        return
    rows = [("name", "method", "trained", "sent", "kept", "server", "up", "down", "beside")]
    for row in (each.row for each in checked):
        size = (f"{row.bytes_up:,}", f"{row.bytes_down:,}")
        rows.append((row.name, row.title, row.trained, row.sent, row.kept, row.server, *size, row.beside))
    print_columns(rows)
    print(f"up, down: bytes of one client in the second round, {args.model}, rank 4 where there is one.")


def adapters_command(args: argparse.Namespace) -> None:
    """Print what can be trained."""
    from fedlora_mini.adapters.registry import ADAPTERS
    from fedlora_mini.regularizers.companions import COMPANIONS

    rows = [("name", "what trains besides the head", "options", "training")]
    for name, recipe in ADAPTERS.items():
        training = COMPANIONS[name].__doc__ or "" if name in COMPANIONS else ""
        rows.append((name, recipe.summary, ", ".join(sorted(recipe.options)) or "-", training.partition(";")[0] or "-"))
    print_columns(rows)


def models_command(args: argparse.Namespace) -> None:
    """Print the networks."""
    from fedlora_mini.models.zoo import CLASSIFIERS, MODELS

    rows = [("name", "dims", "sides", "what")]
    for name, entry in (MODELS | CLASSIFIERS).items():
        rows.append((name, f"{entry.dims}D", f"multiples of {entry.multiple}, >= {entry.smallest}", entry.summary))
    print_columns(rows)


def data_command(args: argparse.Namespace) -> int:
    """list, fetch, prepare, show, check."""
    from fedlora_mini import data

    if args.action == "list":
        rows = [tuple(row) for row in (map(str, r.values()) for r in data.available())]
        print_columns([tuple(data.available()[0]), *rows])
        return 0
    if not args.name:
        raise FedloraError(f"fedlora data {args.action} needs a name or a path; see `fedlora data list`")
    if args.action == "fetch":
        print(data.fetch(args.name, args.source))
    elif args.action == "prepare":
        print(data.prepare(args.name, args.source, args.size))
    elif args.action == "check":
        report = data.check(args.name)
        print(report)
        return 1 if report.problems else 0
    else:
        loaded = data.load(args.name, size=args.size, seed=args.seed, **options(args.option))
        print(data.shift_table(loaded).to_string(float_format=lambda v: f"{v:.3f}"))
        out = Path(args.out or f"{loaded.name}-gallery.png")
        data.gallery(loaded).savefig(out, dpi=130)
        print(f"{loaded.note}\nlicence: {loaded.licence}\ngallery: {out}")
    return 0


def register(add: Add) -> None:
    """Four commands."""
    methods = add("methods", methods_command, "the table of methods, with what each trains, sends and keeps")
    methods.add_argument("names", nargs="*", metavar="METHOD", help="only these rows")
    methods.add_argument("--check", action="store_true", help="say whether a tiny run did what each row says")
    methods.add_argument("--model", default="minisam", help="the network of the tiny run [minisam]")
    add("adapters", adapters_command, "what can be trained in a network")
    add("models", models_command, "the networks that adapters attach to")

    data = add(
        "data", data_command, "list, fetch, prepare, show or check data", "example: fedlora data check hospitals/"
    )
    data.add_argument("action", choices=["list", "fetch", "prepare", "show", "check"])
    data.add_argument("name", nargs="?", help="a data set or a path")
    data.add_argument("--from", dest="source", metavar="PATH_OR_URL", help="take the archive from here")
    data.add_argument("--size", type=int, default=64)
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    data.add_argument("--out", metavar="PNG", help="show: where the gallery goes")
