"""The command line: `fedlora methods | adapters | models | data | pretrain | run | network | compare | fewshot …`.

What a command runs is imported when it runs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from fedlora_mini.cli import audit, fewshot, lists, pretrain, private, reports, runs
from fedlora_mini.errors import FedloraError

RESUMED = {"run": "round", "compare": "round", "private": "round", "fewshot": "run"}
"""Command -> what it goes on from when it is given again."""


def parser() -> argparse.ArgumentParser:
    """All commands and their help."""
    raw = argparse.RawDescriptionHelpFormatter
    what = "Federated low-rank adaptation for medical segmentation."
    top = argparse.ArgumentParser("fedlora", description=what, allow_abbrev=False)
    own = "a Python file that adds rows, data sets or networks of your own; may be given again"
    top.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE", help=own)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, act: Callable[[argparse.Namespace], int | None], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=raw, allow_abbrev=False
        )
        made.set_defaults(act=act)
        return made

    for part in (lists, runs, fewshot, private, audit, reports, pretrain):
        part.register(add)
    return top


def import_file(path: Path) -> None:
    """Run a file as the module of its name, which is what an `Entry` of it may call itself."""
    name = path.stem
    if not (path.suffix == ".py" and path.is_file()):
        raise FedloraError(f"--import '{path}' is no Python file")
    if name in sys.modules:
        raise FedloraError(f"--import '{path}': there is a module '{name}' already; give the file another name")
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 if `data check` found problems; 2 for bad input, told in one line; 130 when interrupted.

    A file or folder that the operating system does not let us read or write is bad input.
    """
    args = parser().parse_args(argv)
    try:
        for file in args.imports:
            import_file(Path(file))
        return args.act(args) or 0
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        last = RESUMED.get(args.command, "")
        told = f"; the same command goes on from the last finished {last}" if last else ""
        print(f"\nfedlora: interrupted{told}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(
            f"fedlora: '{error.filename}': {error.strerror}" if error.filename else f"fedlora: {error}", file=sys.stderr
        )
        return 2
