"""One run: build, federate, evaluate under three protocols; its folder can be resumed from and reported."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import ADAPTERS, keys, prepare, trainable
from fedlora_mini.data import Dataset, Split, load
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.leakage import Watch
from fedlora_mini.experiments.promise import Promise, guard_of, with_client_privacy
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.federation import Server, federate, repartition
from fedlora_mini.federation.aggregation import aggregation_error
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.loop import Round
from fedlora_mini.metrics import evaluate, recognise, swap_drop
from fedlora_mini.metrics.rank import pairs
from fedlora_mini.models import load_base
from fedlora_mini.models.zoo import check_task
from fedlora_mini.state import State
from fedlora_mini.thin import norm2

METRICS = {"segmentation": "dice", "classification": "accuracy"}  # what a search looks at
Progress = Callable[[dict[str, Any]], None]


def pick_device(name: str) -> torch.device:
    """ "auto" = CUDA if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise FedloraError(f"device '{name}' was asked for, but this machine has none; accepted here: auto, cpu")
    return torch.device(name)


def dataset_of(config: RunConfig) -> Dataset:
    """The data of a run, dealt to clients as its partition says. The data seed is the run's seed."""
    sites = int(config.sites) if config.sites and config.sites.isdigit() else config.sites
    own = config.data_options
    data = load(config.data, size=config.size, seed=config.seed, sites=sites, unseen=config.unseen, **own)
    if config.dirichlet is None:
        return data
    by = "label" if data.task == "classification" else "site"
    return repartition(data, config.clients or len(data.sites), config.dirichlet, config.seed, by)


@dataclass
class Federation:
    """Everything a run needs in memory: what `fedlora run` uses, and a notebook can hold in its hands."""

    config: RunConfig
    data: Dataset
    model: nn.Module
    server: Server
    engine: LocalEngine
    watch: Watch | None = None
    leakage: dict[str, Any] = field(default_factory=dict)  # of the last round

    @classmethod
    def build(cls, config: RunConfig, data: Dataset | None = None) -> "Federation":
        """Model, adapters and clients of a config, on its device; nothing is trained yet."""
        row = config.row
        data = dataset_of(config) if data is None else data
        row = with_client_privacy(row, config, 1 if row.pooled else len(data.sites))
        device = pick_device(config.device)
        check_task(config.model, data.task)
        model = load_base(config.model, len(data.classes), data.spatial, config.base, config.seed)
        given = {"rank": config.rank, "alpha": config.alpha}
        given |= {"sites": 1 if row.pooled else len(data.sites)}
        options = {name: value for name, value in given.items() if name in ADAPTERS[row.adapter].options}
        model = prepare(model, row.adapter, config.seed, **options).to(device)
        start = trainable(model)
        table = keys(model, list(start))
        train = [site.train for site in data.sites]
        ranks = config.ranks_of(len(train), row)
        train = [Split.concat(train)] if row.pooled else train
        engine = LocalEngine(
            model,
            row,
            table,
            train,
            config.budget,
            config.seed,
            config.execution,
            ("bf16" if device.type == "cuda" else "float32") if config.precision == "auto" else config.precision,
            ranks,
            guard_of(config, [len(split) for split in train]),
        )
        server = Server(start, ranks=dict(ranks))
        return cls(config, data, model, server, engine, Watch(engine, server) if config.leakage else None)

    def rounds(self) -> Iterator[Round]:
        """Run the rounds that are left, up to one that a privacy budget does not allow; yields one `Round` each."""
        row, config = self.engine.method, self.config

        def error_of(before: State, after: State, updates: list[Any]) -> float | None:
            if self.watch is not None:
                self.leakage = self.watch.end(self.server.round + 1, updates)
            return aggregation_error(self.model, before, after, updates, self.engine.private)

        def choose(round: int) -> list[int]:
            chosen = config.chosen(self.engine.clients, round)
            if self.watch is not None:
                self.watch.begin(chosen)
            return chosen

        args = (row, self.engine, self.server, self.engine.keys, config.rounds, config.steps, choose, error_of)
        yield from self.within_budget(federate(*args, layers=self.engine.setting.layers))

    def within_budget(self, loop: Iterator[Round]) -> Iterator[Round]:
        """The rounds up to one that a privacy budget does not allow."""
        while not self.promise.refuses(self.server.round + 1) and (each := next(loop, None)) is not None:
            yield each

    @property
    def promise(self) -> Promise:
        """The budget of the run and what is spent of it."""
        return Promise(self.config, self.engine.method, self.engine.members)

    def client_of(self, site: int) -> int:
        return 0 if self.engine.method.pooled else site

    def evaluate(self, part: str = "test", hd95: bool = True, protocols: tuple[str, ...] = ()) -> dict[str, Any]:
        """Protocol -> site -> scores. Private tensors stand at their weighted mean under `global` and `new site`."""
        names, engine = self.data.classes, self.engine
        out: dict[str, Any] = {}
        wanted = protocols or ("personal", "global", "new site")
        common = engine.common(self.server)

        def scores(state: State, split: Split, notes: State) -> dict[str, Any]:
            seen = replace(split, images=engine.method.images(split.images, notes))
            if seen.labelled:
                return asdict(recognise(self.model, state, seen, names))
            return asdict(evaluate(self.model, state, seen, names, hd95))

        if "personal" in wanted:
            out["personal"] = {}
            for k, site in enumerate(self.data.sites):
                member = engine.members[self.client_of(k)]
                state = engine.personal(member.number, self.server)
                out["personal"][site.name] = scores(state, getattr(site, part), member.notes)
        if "global" in wanted:
            one = not any(map(engine.private, common)) and not engine.method.work.notes  # one model for all
            same = "personal" in out and one
            common_notes = self.server.state
            out["global"] = (
                out["personal"]
                if same
                else {site.name: scores(common, getattr(site, part), common_notes) for site in self.data.sites}
            )
        if "new site" in wanted and self.data.unseen:
            notes, new = self.server.state, {}
            for site in self.data.unseen:
                seen = engine.method.images(getattr(site, part).images, notes)
                state = engine.method.work.newcomer(common, engine.members, seen)
                new[site.name] = scores(state, getattr(site, part), notes)
            out["new site"] = new
        return out

    def validate(self) -> dict[str, float]:
        """The mean over sites of their own models' scores on validation data, under its name in records."""
        personal = self.evaluate("val", hd95=False, protocols=("personal",))["personal"]
        metric = METRICS[self.data.task]
        return {f"val_{metric}": mean_over_sites(personal, metric)}

    def look(self) -> dict[str, Any]:
        """Site -> what the row's work says of its client, under "work"; nothing if it has nothing to say."""
        engine = self.engine
        members = [engine.members[self.client_of(k)] for k in range(len(self.data.sites))]
        found = [engine.method.work.look(engine.personal(m.number, self.server), m) for m in members]
        return {"work": dict(zip((site.name for site in self.data.sites), found, strict=True))} if all(found) else {}

    def product(self) -> float:
        """log sum ||ΔW||_F^2 over the layers with thin factors of the server's model; -inf while B = 0."""
        thin = pairs(self.model, {name: value.double() for name, value in self.server.state.items()})
        energy = sum(float(norm2(P, Q)) for P, Q in thin.values())
        return math.log(energy) if energy else -math.inf

    def states(self) -> dict[str, State]:
        """The final bytes: the server's state and every client's private part."""
        own = {f"client {c}": S.pick(m, self.engine.private) for c, m in self.engine.memory.items()}
        return {"server": self.server.state} | own


def mean_over_sites(protocol: dict[str, Any], metric: str = "dice") -> float:
    """The mean of a metric over the sites of one protocol."""
    values = [scores[metric] for scores in protocol.values()]
    return sum(values) / len(values)


def run(
    config: RunConfig,
    folder: Path,
    progress: Progress = lambda record: None,
    data: Callable[[], Dataset] | None = None,
) -> dict[str, Any]:
    """Run to the end, from the folder's checkpoint if it holds one, and return the result record.

    The folder gets `log.jsonl` (config, one line a round, result), `checkpoint.safetensors` after every round,
    `final.safetensors` and `result.json`. A finished folder is returned as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "result.json"
    if finished.exists():
        return json.loads(finished.read_text(encoding="utf-8"))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    started = perf_counter()
    federation = Federation.build(config, data() if data else None)
    server, engine = federation.server, federation.engine
    head = {"event": "start", "config": config.asdict(), "versions": versions(), "machine": machine(engine.device)}
    checkpoint = folder / "checkpoint.safetensors"
    records = load_checkpoint(checkpoint, server, engine) if checkpoint.exists() else [head]
    _check_same(records[0], head, folder)
    for each in federation.rounds():
        record = {"event": "round", **asdict(each)}
        if config.leakage:
            record["leakage"] = federation.leakage
        if config.eval_every and (each.round % config.eval_every == 0 or each.round == config.rounds):
            record |= federation.validate()
        records.append(record)
        save_checkpoint(checkpoint, server, engine, records)
        write_atomically(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        progress(record)
    result = _result(federation, records, perf_counter() - started)
    final = {f"{owner}/{name}": value for owner, s in federation.states().items() for name, value in s.items()}
    tensors = {name: value.cpu().clone().contiguous() for name, value in final.items()}  # no two share memory
    save_file(tensors, folder / "final.safetensors")
    write_atomically(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in [*records, result]))
    write_atomically(finished, json.dumps(result, indent=1))
    checkpoint.unlink(missing_ok=True)
    return result


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    if old["config"] != new["config"]:
        raise FedloraError(f"'{folder}' holds another run's checkpoint; choose another folder or delete it")
    if old["versions"]["source"] != new["versions"]["source"]:
        raise FedloraError(f"'{folder}' was begun by other code; delete it to start again")


def _leakage(federation: Federation, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """M1 to M5 by round, and M6: what a site loses with another site's private factors, on its validation data."""
    if federation.watch is None:
        return {}
    engine, data = federation.engine, federation.data
    out: dict[str, Any] = {"rounds": [r["leakage"] for r in rounds], **federation.watch.final()}
    privates = [member.own(member.memory) for member in engine.members]
    if len(privates) > 1 and any(privates):
        shared = S.pick(federation.server.state, is_model)

        def score(state: State, k: int) -> float:
            return evaluate(federation.model, state, data.sites[k].val, data.classes, hd95=False).dice

        out["swap_drop"] = swap_drop(score, shared, privates).tolist()
    return {"leakage": out}


def _model(federation: Federation, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Under privacy also "server", of the model itself: the log of ||ΔW||_F^2, the mean aggregation error, KB up."""
    if not federation.config.private:
        return {}
    errors = [r["agg_err"] for r in rounds if r["agg_err"] is not None]
    told = {
        "energy": federation.product(),
        "agg_err": sum(errors) / len(errors) if errors else 0.0,
        "kb_up": sum(r["bytes_up"] for r in rounds) / 1e3,
    }
    return {"server": {"model": told}}


def _result(federation: Federation, records: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The line that stands in `results/`: provenance, costs per round, scores on test data."""
    rounds = [record for record in records if record["event"] == "round"]
    return {
        "event": "result",
        **{key: value for key, value in records[0].items() if key != "event"},
        "scores": federation.evaluate("test") | federation.look() | _model(federation, rounds),
        **federation.validate(),
        "private_in_common_model": "weighted mean",
        "trained": S.count(federation.server.state),
        "sites": {site.name: site.sizes() for site in (*federation.data.sites, *federation.data.unseen)},
        "data_note": federation.data.note,
        "bytes_up": [r["bytes_up"] for r in rounds],
        "bytes_down": [r["bytes_down"] for r in rounds],
        "agg_err": [r["agg_err"] for r in rounds],
        "loss": [r["loss"] for r in rounds],
        "refused": [line for r in rounds for line in r["refused"]],
        **_leakage(federation, rounds),
        **federation.promise.told(federation.server.round),
        "round_seconds": [r["seconds"] for r in rounds],
        "seconds": seconds,
        "final_sha256": S.digest(list(federation.states().values())),
    }
