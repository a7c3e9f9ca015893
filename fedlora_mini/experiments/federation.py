"""A federation in memory: data, model, clients and server of a config, trained round by round and evaluated."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import ADAPTERS, adapters, keys, prepare, trainable
from fedlora_mini.adapters.features import statistic
from fedlora_mini.data import Dataset, Site, Split, load
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.leakage import Watch
from fedlora_mini.experiments.lines import read_record
from fedlora_mini.experiments.promise import Promise, guard_of, with_client_privacy
from fedlora_mini.experiments.provenance import changed, origin
from fedlora_mini.federation import Server, Update, federate, repartition
from fedlora_mini.federation.aggregation import AggregationError, aggregation_error
from fedlora_mini.federation.client import moves_at_all
from fedlora_mini.federation.exchange import OWN
from fedlora_mini.federation.loop import Round
from fedlora_mini.metrics import evaluate, recognise
from fedlora_mini.metrics.rank import pairs
from fedlora_mini.models import load_base
from fedlora_mini.models.zoo import check_task
from fedlora_mini.privacy import Release
from fedlora_mini.state import State
from fedlora_mini.thin import norm2

METRICS = {"segmentation": "dice", "classification": "accuracy"}  # what a search looks at


def pick_device(name: str) -> torch.device:
    """ "auto" = CUDA if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise FedloraError(f"device '{name}' was asked for, but this machine has none; accepted here: auto, cpu")
    return torch.device(name)


def dataset_of(config: RunConfig) -> Dataset:
    """The data of a run, dealt to clients as its partition says. The data seed is the run's seed."""
    own = config.data_options
    data = load(config.data, size=config.size, seed=config.seed, sites=config.sites, unseen=config.unseen, **own)
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
        """Model, adapters and clients of a config, on its device; nothing is trained yet.

        data: your own in the place of the config's, whose `sites`, `unseen`, `size`, `dirichlet` and `data_options` do
        not act on it: `data.choose_sites`, `limit` and `repartition` do the same by hand. Raises, naming the setting,
        for whatever does not fit: network and task, row and network, row and privacy, partition, base, device.
        """
        row = config.row
        data = dataset_of(config) if data is None else data
        row = with_client_privacy(row, config, 1 if row.pooled else len(data.sites))
        device = pick_device(config.device)
        check_task(config.model, data.task)
        data.check()
        model = load_base(config.model, len(data.classes), data.spatial, config.base, config.seed)
        given = {"rank": config.rank, "alpha": config.alpha}
        given |= {"sites": 1 if row.pooled else len(data.sites)}
        options = {name: value for name, value in given.items() if name in ADAPTERS[row.adapter].options}
        model = prepare(model, row.adapter, config.seed, **options).to(device)
        start = trainable(model)
        table = keys(model, list(start))
        if told := row.keeps_nothing(table, config.model) or row.sends_nothing(table) or row.filters_nothing(table):
            raise FedloraError(told)
        noised = [name for name, key in table.items() if statistic(name) and row.shared(key)]
        if config.private and config.unit == "client" and noised:
            told = f"noise on '{noised[0]}' can make a variance negative"
            raise FedloraError(
                f"{told}: privacy of clients needs a network without batch norms, or norms that stay home"
            )
        train = [site.train for site in data.sites]
        ranks = config.ranks_of(len(train), row)
        train = [Split.concat(train)] if row.pooled else train
        steps = min(config.budget.of(len(split)).steps for split in train)
        layers = dict(adapters(model))
        if told := row.rests({name: key for name, key in table.items() if moves_at_all(key, layers)}, steps):
            raise FedloraError(told)
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
        if config.whole_unseen and not data.unseen:
            raise FedloraError(f"whole_unseen needs a site that never trains, and '{data.name}' here has none")
        apart = [site.val for site in data.sites], [unseen_part(site, config) for site in data.unseen]
        watch = Watch(engine, server, *apart, data.classes) if config.leakage else None
        return cls(config, data, model, server, engine, watch)

    @classmethod
    def finished(cls, folder: str | Path, data: Dataset | None = None) -> "Federation":
        """A run as it ended, from its folder: `engine.personal(client, server)` and `evaluate()` are what they were.

        Not to be trained on: memories that no model needs, such as gradients, are not in the folder. Ledgers are.
        Raises for other images than the run's, where its record knows them, another base or another row of that name.
        """
        folder = Path(folder)
        record, tensors = folder / "result.json", folder / "final.safetensors"
        if missing := [path.name for path in (record, tensors) if not path.is_file()]:
            raise FedloraError(f"'{folder}' holds no finished run: it lacks {', '.join(missing)}")
        result = read_record(record)
        config = RunConfig.read(result["config"])
        try:
            data = dataset_of(config) if data is None else data
        except FedloraError as error:
            told = "a run on a Dataset of your own needs it again: Federation.finished(folder, data=dataset)"
            raise FedloraError(f"the data '{config.data}' of '{folder}' cannot be loaded ({error}); {told}") from None
        if told := changed(result.get("versions", {}), origin(config, data)):
            raise FedloraError(f"'{folder}' holds a run with {told}")
        federation = cls.build(config, data)
        parts: dict[str, State] = {}
        try:
            final = load_file(tensors)
        except SafetensorError as error:
            raise FedloraError(f"'{tensors}' is damaged: {error}") from None
        for name, value in final.items():
            owner, _, own = name.partition("/")
            parts.setdefault(owner, {})[own] = value.to(federation.engine.device)
        server = federation.server
        server.state, server.round = parts["server"], len(result["loss"])
        server.ranks |= {int(client): rank for client, rank in result.get("ranks", {}).items()}
        for member in federation.engine.members:
            heard = S.pick(server.state, lambda name: not name.startswith(OWN))
            member.memory = heard | parts.get(f"client {member.number}", {})
            member.noised = {(round, "batches") for round in range(1, server.round + 1)}
        told = result.get("privacy", {})
        for member, times in zip(federation.engine.members, told.get("releases", ()), strict=False):
            if member.ledger is not None and times:
                member.ledger.releases = [Release(told["sigma"], told["q"], times)]
        return federation

    def rounds(self) -> Iterator[Round]:
        """Run the rounds that are left, up to one that a privacy budget does not allow; yields one `Round` each."""
        row, config, watch = self.engine.method, self.config, self.watch

        def watched(before: State, after: State, updates: list[Update]) -> float | None:
            """The error, after a look at all updates: it compares clients."""
            assert watch is not None
            self.leakage = watch.end(self.server.round + 1, updates)
            return aggregation_error(self.model, before, after, updates, self.engine.private)

        def meter(before: State) -> AggregationError:
            return AggregationError(self.model, before, self.engine.private)

        def choose(round: int) -> list[int]:
            chosen = config.chosen(self.engine.clients, round)
            if watch is not None:
                watch.begin(chosen)
            return chosen

        args = (row, self.engine, self.server, self.engine.keys, config.rounds, config.steps, choose)
        error = watched if watch is not None else None
        for each in self.within_budget(federate(*args, error, self.engine.setting.layers, meter)):
            if watch is not None:
                self.leakage |= watch.after()
            yield each

    def within_budget(self, loop: Iterator[Round]) -> Iterator[Round]:
        """The rounds up to one that a privacy budget does not allow."""
        while not self.promise.refuses(self.server.round + 1) and (each := next(loop, None)) is not None:
            yield each

    @property
    def promise(self) -> Promise:
        """The budget of the run and what is spent of it."""
        return Promise(self.config, self.engine.method, self.engine.members)

    @property
    def trained(self) -> int:
        """How many numbers a client's training can move: no messages or notes, nothing received or held still."""
        setting, schedule = self.engine.setting, self.engine.method.schedule
        steps = setting.budget.steps
        moving = (
            name
            for name, key in setting.keys.items()
            if moves_at_all(key, setting.layers) and schedule.may_move(key, 2, steps)  # in two rounds all have a turn
        )
        return sum(self.server.state[name].numel() for name in moving)

    def client_of(self, site: int) -> int:
        return 0 if self.engine.method.pooled else site

    def evaluate(self, part: str = "test", hd95: bool = True, protocols: tuple[str, ...] = ()) -> dict[str, Any]:
        """Protocol -> site -> scores. Private tensors under `global` and `new site`: see `LocalEngine.common`.

        part: a split's name. With `whole_unseen` "test" is, at a site that never trains, all that it has.
        """
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
            own = engine.method.work.notes or engine.method.personal_notes  # what a site's model reads besides
            same = "personal" in out and not own and not any(map(engine.private, common)) and not self.server.ranks
            common_notes = self.server.state
            out["global"] = (
                out["personal"]
                if same  # one model for all
                else {site.name: scores(common, getattr(site, part), common_notes) for site in self.data.sites}
            )
        if "new site" in wanted and self.data.unseen:
            notes, new = self.server.state, {}
            for site in self.data.unseen:
                split = unseen_part(site, self.config) if part == "test" else getattr(site, part)
                seen = engine.method.images(split.images, notes)
                state = engine.method.work.newcomer(common, engine.members, seen)
                new[site.name] = scores(state, split, notes)
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
        """The final bytes: the server's state, and of every client what makes its own model of it.

        "server" holds every trained tensor by name, frozen weights that products were folded into, and notes, with a
        "~" in their names. "client k" holds its private tensors, and notes where they make its model: the second model
        of Ditto, the average of IOP-FL, the own pairs of FedALT, masks and own entries of pFL-ResFIM, the amplitude
        that HarmoFL gives its images. A run's `final.safetensors` has them as "<part>/<name>": see `finished`.
        """
        return {"server": self.server.state} | {f"client {m.number}": m.personal_part for m in self.engine.members}


def unseen_part(site: Site, config: RunConfig) -> Split:
    """What a site that never trains is scored on: its test share, or with `whole_unseen` all that it has."""
    return Split.concat([site.train, site.val, site.test]) if config.whole_unseen else site.test


def mean_over_sites(protocol: dict[str, Any], metric: str = "dice") -> float:
    """The mean of a metric over the sites of one protocol."""
    values = [scores[metric] for scores in protocol.values()]
    return sum(values) / len(values)
