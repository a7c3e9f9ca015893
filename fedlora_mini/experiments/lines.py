"""Records in files: read with errors that name the file, and added to what a file holds, so that nothing is lost."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.checkpoint import write_atomically


def parsed(text: str, where: str) -> dict[str, Any]:
    """One record. Raises, with the place, if it is none: half a line of a file that was cut off, say."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise FedloraError(f"{where} is damaged, or not JSON: {error}") from None
    if not isinstance(record, dict):
        raise FedloraError(f'{where} is no record: expected {{"config": …}}, got {text.strip()[:40]}')
    return record


def read_record(path: Path) -> dict[str, Any]:
    """The record that is all of a file."""
    return parsed(path.read_text(encoding="utf-8", errors="replace"), f"'{path}'")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may have been cut off in the middle of its last one."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [parsed(line, f"line {i} of '{path}'") for i, line in enumerate(lines, 1) if line.strip()]


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line a record."""
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records))


def key_of(record: dict[str, Any]) -> str:
    """What makes two records the same run: their configurations."""
    return json.dumps(record.get("config"), sort_keys=True)


def add_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records beside those that the file holds; one of an equal configuration takes the old one's place."""
    kept = {key_of(r): r for r in read_lines(path)} if path.exists() else {}
    write_lines(path, list((kept | {key_of(r): r for r in records}).values()))


def records_file() -> Path:
    """The file that `python -m MODULE FILE.jsonl` names. Ends with the usage if it names none, or an option."""
    given, spec = sys.argv[1:], sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    usage = f"usage: python -m {name} FILE.jsonl    (where the records go)"
    if not given:
        sys.exit(usage)
    if options := [each for each in given if each.startswith("-")]:
        helped = not {"-h", "--help"}.isdisjoint(options)
        print(usage, file=sys.stdout if helped else sys.stderr)
        sys.exit(0 if helped else 2)
    return Path(given[0])
