"""What there is: `fedlora methods | adapters | models | data`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from fedlora_mini.cli.settings import Add, data_options
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


def data_list(args: argparse.Namespace) -> None:
    """A row a data set."""
    from fedlora_mini import data

    rows = data.available()
    print_columns([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)])


def data_fetch(args: argparse.Namespace) -> None:
    """Download, verify and prepare, unless that is done."""
    from fedlora_mini import data

    print(data.fetch(_named(args), args.source, args.size))


def data_prepare(args: argparse.Namespace) -> None:
    """Make the prepared file anew."""
    from fedlora_mini import data

    print(data.prepare(_named(args), args.source, args.size))


def data_show(args: argparse.Namespace) -> None:
    """The table of shifts and a gallery."""
    from fedlora_mini import data
    from fedlora_mini.experiments.config import LARGEST_SIDE

    if args.size > LARGEST_SIDE:
        raise FedloraError(f"size must be from 8 to {LARGEST_SIDE}, got {args.size}")
    loaded = data.load(_named(args), size=args.size, seed=args.seed, **data_options(args.option))
    print(data.shift_table(loaded).to_string(float_format=lambda v: f"{v:.3f}"))
    out = Path(args.out or f"{loaded.name}-gallery.png")
    try:
        data.gallery(loaded).savefig(out, dpi=130)
    except (OSError, ValueError) as error:  # no such folder, no such kind of picture
        raise FedloraError(f"cannot write --out '{out}': {error}") from None
    print(f"{loaded.note}\nlicence: {loaded.licence}\ngallery: {out}")


def data_check(args: argparse.Namespace) -> int:
    """Every problem of one's own data."""
    from fedlora_mini import data

    if _named(args) in data.DATASETS and not Path(args.name).exists():
        raise FedloraError(f"'{args.name}' is a built-in data set: `data check` is for the path of your own folder")
    report = data.check(args.name)
    print(report)
    return 1 if report.problems else 0


def _named(args: argparse.Namespace) -> str:
    if not args.name:
        raise FedloraError(f"fedlora data {args.action} needs a name or a path; see `fedlora data list`")
    return str(args.name)


def register(add: Add) -> None:
    """Four commands."""
    methods = add("methods", methods_command, "the table of methods, with what each trains, sends and keeps")
    methods.add_argument("names", nargs="*", metavar="METHOD", help="only these rows")
    methods.add_argument("--check", action="store_true", help="say whether a tiny run did what each row says")
    methods.add_argument("--model", default="minisam", help="the network of the tiny run [minisam]")
    add("adapters", adapters_command, "what can be trained in a network")
    add("models", models_command, "the networks that adapters attach to")

    told = "list, fetch, prepare, show or check data"
    data = add("data", data_list, told, "example: fedlora data check hospitals/; fedlora data fetch --help says more")
    _register_data(data.add_subparsers(dest="action", required=True, metavar="ACTION"))


def _register_data(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The five actions, each with what it reads."""

    def action(name: str, act: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(act=act)
        return made

    action("list", data_list, "the data sets, and which of them are ready")
    fetched = action("fetch", data_fetch, "download, verify and prepare a data set, unless that is done at this size")
    prepared = action("prepare", data_prepare, "the same, but the prepared file is made anew even if it is there")
    shown = action("show", data_show, "the shifts between sites in numbers, and a gallery")
    checked = action("check", data_check, "every problem of your own folder or zip, before anything trains")
    for made in (fetched, prepared):
        made.add_argument("name", nargs="?", help="a data set that is downloaded")
        made.add_argument("--from", dest="source", metavar="PATH_OR_URL", help="take the archive from here")
    shown.add_argument("name", nargs="?", help="a data set, or the path of your own folder or zip")
    checked.add_argument("name", nargs="?", help="the path of your own folder or zip")
    for made in (fetched, prepared, shown):
        made.add_argument("--size", type=int, default=64, help="image side in pixels [64]")
    shown.add_argument("--seed", type=int, default=0, help="draws the splits, and what is simulated [0]")
    shown.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    shown.add_argument("--out", metavar="PNG", help="where the gallery goes [NAME-gallery.png]")
