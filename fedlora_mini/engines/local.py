"""Clients simulated in this process: one after another, or several in one pass along the group axis."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key, adapters, trainable
from fedlora_mini.adapters.grouped import check_groupable
from fedlora_mini.data.base import Split
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.aggregation.padded import truncate
from fedlora_mini.federation.client import Budget, moves_at_all, train
from fedlora_mini.federation.exchange import Request, Server, Update, is_model
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.federation.member import Member, Setting, on
from fedlora_mini.federation.row import Method, Work
from fedlora_mini.privacy.dpsgd import GuardedGroup
from fedlora_mini.state import State

EXECUTIONS = ("auto", "sequential", "grouped")
SMALL = 4
SMALL_PRIVATE = 16


class LocalEngine:
    """`model` is prepared for the method's adapter; `data[k]` is client k's training split.

    execution: "sequential", "grouped" (equal to it up to rounding), or "auto" = grouped where it can be and pays: on an
    accelerator, and on a CPU up to batches of SMALL, beyond which the loop is faster (benchmarks/README.md); under
    privacy every image has factors of its own anyway, so that it pays up to SMALL_PRIVATE.
    ranks: of clients that adapt with fewer directions than the model has. guard: makes all gradients private.

    Raises for an unknown execution, "grouped" where the method's work, rule or tensors have no group axis, and under a
    guard for a method that reads images beside the private gradient and a layer that mixes images.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        keys: Mapping[str, Key],
        data: Sequence[Split],
        budget: Budget,
        seed: int = 0,
        execution: str = "auto",
        precision: str = "float32",
        ranks: Mapping[int, int] | None = None,
        guard: Guarding | None = None,
    ) -> None:
        if execution not in EXECUTIONS:
            raise unknown("execution", execution, EXECUTIONS)
        can = all(key.factor in _factors(model, key.path) for key in keys.values())
        if guard is not None:
            guard.check(method)
            check_groupable(dict(model.named_modules()), ())  # no layer that mixes images
            if not can:
                raise FedloraError(
                    f"'{method.title}' trains a model's own weights: private gradients need a row whose adapters "
                    "have a group axis"
                )
            layers = dict(adapters(model))
            moving = [name for name, key in keys.items() if moves_at_all(key, layers)]
            check_groupable(dict(model.named_modules()), moving)
        self.setting = Setting(model, method, keys, budget, seed, precision, guard)
        self.device = next(model.parameters()).device
        start = trainable(model)
        self.members = [Member(k, on(self.device, split), dict(start), self.setting) for k, split in enumerate(data)]
        for client, rank in (ranks or {}).items():
            self.members[client].memory = truncate(start, rank)
        self.clients = [member.number for member in self.members]
        if execution == "grouped" and not can:
            raise FedloraError(
                f"'{method.title}' trains a model's own weights, which have no group axis: use execution 'sequential'"
            )
        work = type(method.work)
        plain = work.round is Work.round and all(term.grouped for term in method.objective)
        plain = plain and not getattr(method.rule, "folds", False)  # frozen weights have no group axis
        same = len({budget.of(len(member.data)).steps for member in self.members}) == 1 and not ranks
        if execution == "grouped" and not (plain and same):
            raise FedloraError(f"'{method.title}' lets clients work one after the other: use execution 'sequential'")
        pays = self.device.type != "cpu" or budget.batch <= (SMALL if guard is None else SMALL_PRIVATE)
        self.grouped = can and plain and same and pays if execution == "auto" else execution == "grouped"

    @property
    def method(self) -> Method:
        return self.setting.method

    @property
    def keys(self) -> Mapping[str, Key]:
        return self.setting.keys

    @property
    def memory(self) -> dict[int, State]:
        return {member.number: member.memory for member in self.members}

    @property
    def untimed(self) -> bool:
        """Whether a round's seconds are secret: they grow with its batches, whose sizes secret coins decide."""
        return self.setting.guard is not None and self.setting.guard.secure

    def private(self, name: str) -> bool:
        """Whether a tensor never leaves its client."""
        return self.setting.private(name)

    def exchange(self, requests: dict[int, Request]) -> Iterator[Update]:
        """The updates in the order of clients."""
        order = sorted(requests)
        if self.grouped and len({len(self.members[client].memory) for client in order}) == 1:
            yield from self._together(order, requests)
        else:
            for client in order:
                yield self.members[client].answer(requests[client])

    def _together(self, group: list[int], requests: dict[int, Request]) -> Iterator[Update]:
        members, own = [self.members[client] for client in group], self.setting
        for member in members:
            member.receive(requests[member.number])
        round, budget = requests[group[0]].round, own.budget.of(len(members[0].data))
        draws = [member.batches(round, budget) for member in members]
        guarded = [each for member in members if (each := member.guarded(round, budget, "batches")) is not None]
        together = GuardedGroup(guarded, draws)
        guard = together if len(guarded) > 1 else next(iter(guarded), None)
        starts, kept = [member.tensors for member in members], [member.notes for member in members]
        args = (own.model, own.method, own.keys, starts, together.batches, budget, round, own.precision)
        ends, losses = train(*args, kept=kept, guard=guard)
        yield from (m.close(end, loss, round) for m, end, loss in zip(members, ends, losses, strict=True))

    def personal(self, client: int, server: Server) -> State:
        """The client's own model: the server's shared tensors with the client's private ones, as its work has it.

        At the client's rank, where that is another than the server's.
        """
        member, rank = self.members[client], server.ranks.get(client)
        shared = server.state if rank is None else truncate(server.state, rank)
        return S.pick(self.method.work.personal(shared | member.own(member.memory), member), is_model)

    @property
    def private_in_common(self) -> str:
        """Where private tensors stand in `common`."""
        return "start" if getattr(self.method.rule, "silent", False) else "weighted mean"

    def common(self, server: Server) -> State:
        """The model for a site that never trained: shared tensors, and private ones at their weighted mean.

        Where clients are protected, at their common start, which the server has: their mean would be of changes that
        nobody clipped or noised.
        """
        if self.private_in_common == "start":
            return S.pick(server.state, is_model)
        own = [member.own(member.memory) for member in self.members]
        mean = S.mean(own, [float(len(member.data)) for member in self.members])
        return S.pick(server.state, is_model) | mean


def _factors(model: nn.Module, path: str) -> tuple[str, ...]:
    return getattr(model.get_submodule(path), "factors", ())
