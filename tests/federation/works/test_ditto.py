"""Ditto's personal model by hand."""

from dataclasses import replace

from fedlora_mini import state as S
from fedlora_mini.federation import METHODS, Method
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.sharing import nothing
from fedlora_mini.federation.works import Ditto
from watched import SGD, advance, close, federation, gradient, parts, run


def test_dittos_personal_model_by_a_loop(tiny):
    """v <- v - lr (∇F(v) + lam (v - w)), w what came in; the global model is FedAvg's to the bit."""
    lam = 0.5
    watched, server = federation(replace(METHODS["ditto"], work=Ditto(lam)), parts(tiny), budget=SGD)
    plain, mean = federation("fedavg", parts(tiny), budget=SGD)
    v = {client: S.pick(server.state, is_model) for client in watched.clients}
    for round in (1, 2):
        w = S.clone(server.state)
        advance(watched, server, round), advance(plain, mean, round)
        assert S.digest(S.pick(server.state, is_model)) == S.digest(mean.state)
        for client in watched.clients:
            batches = watched.members[client].batches(round, SGD, "personal")
            for step in range(1, SGD.steps + 1):
                g = gradient(watched.setting.model, v[client], *batches(step))
                v[client] = {n: p - SGD.lr * (g[n] + lam * (p - w[n])) for n, p in v[client].items()}
            assert close(watched.engine.personal(client, server), v[client])


def test_ditto_without_a_pull_is_local_training(tiny):
    watched, server, _ = run(replace(METHODS["ditto"], work=Ditto(0.0)), parts(tiny), 2)
    alone, start = federation(Method("local", "full", nothing), parts(tiny))
    for client in watched.clients:
        v = start.state
        for round in (1, 2):
            v, _ = alone.members[client].fit(round, v, "personal")
        assert S.digest(watched.engine.personal(client, server)) == S.digest(v)


def test_a_strong_pull_ties_dittos_models_to_the_global_one(tiny):
    distances = []
    for lam in (0.0, 4.0, 9.0):
        watched, server = federation(replace(METHODS["ditto"], work=Ditto(lam)), parts(tiny), budget=SGD)
        advance(watched, server, 1)
        w = S.pick(server.state, is_model)
        advance(watched, server, 2)
        distances.append(sum(S.norm(S.sub(watched.engine.personal(k, server), w)) for k in watched.clients))
    assert distances[2] < 0.8 * distances[1] < 0.64 * distances[0]
