"""One file that holds a run between two rounds; written beside and renamed, so a kill leaves the old one or the new."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.leakage import Watch
from fedlora_mini.federation import Server
from fedlora_mini.privacy import Ledger
from fedlora_mini.state import State


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def check_nothing_released(log: Path, sign: str = "round") -> None:
    """Raise if a private run's log has an event: without a checkpoint nobody knows what was spent after it.

    sign: "round" in one process, where a round that did not end told nobody; "start" where clients are elsewhere.
    """
    if log.exists() and f'"event": "{sign}"' in log.read_text(encoding="utf-8"):
        raise FedloraError(
            f"'{log.parent}' holds a private run that began, and no checkpoint with its ledgers: what it released "
            "stays released. Choose another folder, and add up what both runs spend"
        )


def save_checkpoint(
    path: Path,
    server: Server,
    engine: LocalEngine,
    records: list[dict[str, Any]],
    watch: Watch | None = None,
    seconds: float = 0.0,
) -> None:
    """What server, clients and watch remember, the records so far and the seconds that they took.

    No generator: each is made from its key.
    """
    tensors: dict[str, Tensor] = {f"server/{name}": value for name, value in server.state.items()}
    tensors |= {f"products/{name}": value for name, value in server.products.items()}
    for client, state in engine.memory.items():
        tensors |= {f"client {client}/{name}": value for name, value in state.items()}
    if watch is not None:
        tensors |= {f"watch/{name}": value for name, value in watch.memory().items()}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    notes = {
        "round": server.round,
        "changed": server.changed,
        "seen": {str(client): round for client, round in server.seen.items()},
        "ranks": {str(client): rank for client, rank in server.ranks.items()},
        "records": records,
        "seconds": seconds,
        "names": list(tensors),  # in their order, which the file does not keep: sums over tensors follow it
        "ledgers": {str(m.number): m.ledger.asdict() for m in engine.members if m.ledger is not None},
        "noised": {str(m.number): sorted(m.noised) for m in engine.members},
    }
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"notes": json.dumps(notes)})
    os.replace(part, path)


def read_notes(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: "records", "seconds", and what `load_checkpoint` puts back."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["notes"])


def load_checkpoint(
    path: Path, server: Server, engine: LocalEngine, watch: Watch | None = None
) -> list[dict[str, Any]]:
    """Put server, engine and watch back to where they were; returns the records."""
    notes = read_notes(path)
    with safe_open(path, framework="pt", device=str(engine.device)) as file:
        parts: dict[str, State] = {}
        for key in notes["names"]:
            owner, _, name = key.partition("/")
            parts.setdefault(owner, {})[name] = file.get_tensor(key)
    server.state, server.round, server.changed = parts["server"], notes["round"], notes["changed"]
    server.seen, server.ranks = ({int(c): value for c, value in notes[part].items()} for part in ("seen", "ranks"))
    server.products = parts.get("products", {})
    if watch is not None:
        watch.resume(parts.get("watch", {}))
    for member in engine.members:
        member.memory = parts[f"client {member.number}"]
        if member.ledger is not None:
            member.ledger = Ledger.fromdict(notes["ledgers"][str(member.number)])
        member.noised = {(round, purpose) for round, purpose in notes.get("noised", {}).get(str(member.number), ())}
    return notes["records"]
