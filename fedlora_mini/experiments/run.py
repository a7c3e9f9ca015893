"""One run to its end, from the checkpoint if its folder holds one; the folder gets log, result and final states."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from fedlora_mini import state as S
from fedlora_mini.data import DATASETS, Dataset
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.checkpoint import (
    check_nothing_released,
    load_checkpoint,
    read_notes,
    save_checkpoint,
    write_atomically,
)
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation, dataset_of
from fedlora_mini.experiments.leakage import ends
from fedlora_mini.experiments.lines import read_lines, read_record
from fedlora_mini.experiments.provenance import changed, machine, origin

Progress = Callable[[dict[str, Any]], None]


def run(
    config: RunConfig,
    folder: str | Path,
    progress: Progress = lambda record: None,
    data: Dataset | Callable[[], Dataset] | None = None,
    test: bool = True,
) -> dict[str, Any]:
    """Run to the end, from the folder's checkpoint if it holds one, and return the result record.

    The folder gets `log.jsonl` (config, one line a round, result), `checkpoint.safetensors` after every round,
    `final.safetensors` and `result.json`. A finished folder of this run is returned as it is, another run's is refused,
    also one on other images, from another base or by another row of the same name. data: your own in the place of the
    config's (see `Federation.build`), or a function that makes it when it is needed. Without `test` no test image is
    looked at, which is all that a search needs; the same folder with `test` then adds these scores. Nothing is made
    before the first round.
    """
    folder = Path(folder)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if is_finished(folder, test=False):
        return _finished(config, folder, data, test)
    started = perf_counter()
    federation = Federation.build(config, data() if callable(data) else data)
    server, engine = federation.server, federation.engine
    made = {"versions": origin(config, federation.data), "machine": machine(engine.device)}
    head = {"event": "start", "config": config.asdict(), **made}
    head = json.loads(json.dumps(head))  # as a checkpoint has it
    checkpoint = folder / "checkpoint.safetensors"
    if config.private and not checkpoint.exists():
        check_nothing_released(folder / "log.jsonl")
    records = _resumed(checkpoint, federation, head) if checkpoint.exists() else [head]
    before = read_notes(checkpoint).get("seconds", 0.0) if checkpoint.exists() else 0.0
    folder.mkdir(parents=True, exist_ok=True)
    for each in federation.rounds():
        record = {"event": "round", **asdict(each)}
        if config.leakage:
            record["leakage"] = federation.leakage
        if config.eval_every and (each.round % config.eval_every == 0 or each.round == config.rounds):
            record |= federation.validate()
        records.append(record)
        elapsed = 0.0 if each.seconds is None else before + perf_counter() - started  # else they are secret
        save_checkpoint(checkpoint, server, engine, records, federation.watch, elapsed)
        write_atomically(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        shutil.copymode(folder / "log.jsonl", checkpoint)  # whoever may read the log
        progress(record)
    tested = federation.evaluate("test") if test else {}
    result = _result(federation, records, tested, before + perf_counter() - started)
    final = {f"{owner}/{name}": value for owner, s in federation.states().items() for name, value in s.items()}
    tensors = {name: value.cpu().clone().contiguous() for name, value in final.items()}  # no two share memory
    (folder / "final.safetensors").write_bytes(save(tensors))  # save_file's are the owner's alone
    _close(folder, records, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _close(folder: Path, records: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """The result as the log's last line, and by itself, which makes the folder a finished one."""
    write_atomically(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in [*records, result]))
    write_atomically(folder / "result.json", json.dumps(result, indent=1))


def _tested(result: dict[str, Any]) -> bool:
    return "personal" in result["scores"]


def is_finished(folder: Path, test: bool = True) -> bool:
    """Whether `run` of the same config would have nothing to do."""
    return (folder / "result.json").exists() and (not test or _tested(read_record(folder / "result.json")))


def _finished(
    config: RunConfig, folder: Path, data: Dataset | Callable[[], Dataset] | None, test: bool
) -> dict[str, Any]:
    """The result of a folder that has one. Raises where it is another run's."""
    result = read_record(folder / "result.json")
    asked = json.loads(json.dumps(config.asdict()))  # as JSON has it
    if RunConfig.read(result.get("config", {})).asdict() != asked:
        raise FedloraError(f"'{folder}' holds another run's result; choose another folder")
    data = data() if callable(data) else data
    if data is not None or config.data not in DATASETS:  # a name stands for the same images every day
        data = data or dataset_of(config)
        if told := changed(result.get("versions", {}), origin(config, data)):
            raise FedloraError(f"'{folder}' holds a run with {told}; choose another folder")
    return result if _tested(result) or not test else _test(folder, result, data)


def _test(folder: Path, result: dict[str, Any], data: Dataset | None) -> dict[str, Any]:
    """A finished run that had not met its test images meets them."""
    started = perf_counter()
    federation = Federation.finished(folder, data)
    result["scores"] = federation.evaluate("test") | result["scores"]
    if result["seconds"] is not None:
        result["seconds"] += perf_counter() - started
    _close(folder, read_lines(folder / "log.jsonl")[:-1], result)
    return result


def _resumed(checkpoint: Path, federation: Federation, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a checkpoint of this run, with the federation put back to where it was."""
    config = head["config"]
    try:
        begun = read_notes(checkpoint)["records"][0]
        config = begun["config"]
        _check_same(begun, head, checkpoint.parent)
        return load_checkpoint(checkpoint, federation.server, federation.engine, federation.watch)
    except FedloraError:
        raise
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise FedloraError(f"'{checkpoint}' is damaged: {error}; {_instead(config)}") from None


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    if old["config"] != new["config"]:
        raise FedloraError(f"'{folder}' holds another run's checkpoint; {_instead(old['config'])}")
    if old["versions"]["source"] != new["versions"]["source"]:
        raise FedloraError(f"'{folder}' was begun by other code; {_instead(old['config'])}")
    if told := changed(old["versions"], new["versions"]):
        raise FedloraError(f"'{folder}' was begun with {told}; {_instead(old['config'])}")


def _instead(config: dict[str, Any]) -> str:
    """What to do with a folder whose run cannot go on: what a private one released stays released.

    The config is as another state of the code may have written it, so no RunConfig.
    """
    if config.get("epsilon") is not None or config.get("sigma") is not None:
        return "choose another folder, and add up what both runs spend: what this one released stays released"
    return "choose another folder, or delete this one to start again"


def _leakage(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What `--leakage` logged in every round, and M5 and M6 as they ended."""
    found = [r["leakage"] for r in rounds if "leakage" in r]
    return {"leakage": {"rounds": found} | ends(found)} if found else {}


def _model(federation: Federation, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Under privacy also "server", of the model itself: the log of ||ΔW||_F^2, the mean aggregation error, KB up.

    Where clients are protected, the first alone: it is read off the noised model.
    """
    config = federation.config
    if not config.private:
        return {}
    told = {"energy": federation.product()}
    if config.unit == "image":
        errors = [r["agg_err"] for r in rounds if r["agg_err"] is not None]
        told["agg_err"] = sum(errors) / len(errors) if errors else 0.0
        told["kb_up"] = sum(r["bytes_up"] for r in rounds) / 1e3
    return {"server": {"model": told}}


def _result(
    federation: Federation, records: list[dict[str, Any]], tested: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The line that stands in `results/`: provenance, costs per round, scores on test data."""
    rounds = [record for record in records if record["event"] == "round"]
    took = [r["seconds"] for r in rounds]  # None where it would tell who was drawn, or how many images
    return {
        "event": "result",
        **{key: value for key, value in records[0].items() if key != "event"},
        "scores": tested | federation.look() | _model(federation, rounds),
        **federation.validate(),
        "private_in_common_model": federation.engine.private_in_common,
        "trained": federation.trained,
        "sites": {site.name: site.sizes() for site in (*federation.data.sites, *federation.data.unseen)},
        "data_note": federation.data.note,
        "clients": [r["clients"] and len(r["clients"]) for r in rounds],  # how many took part, where it may be told
        "bytes_up": [r["bytes_up"] for r in rounds],
        "bytes_down": [r["bytes_down"] for r in rounds],
        "agg_err": [r["agg_err"] for r in rounds],
        "loss": [r["loss"] for r in rounds],
        **({"ranks": {str(k): rank for k, rank in ranks.items()}} if (ranks := federation.server.ranks) else {}),
        "refused": [line for r in rounds for line in r["refused"]],
        **_leakage(rounds),
        **federation.promise.told(federation.server.round),
        "round_seconds": took,
        "seconds": None if None in took else seconds,
        "final_sha256": S.digest(list(federation.states().values())),
    }
