"""Versions of a model beside each other behind two real ingresses: who answers, who is copied to, who is taken back.

Three variants stand beside stable: one computes the same, one has other weights, and one fails whatever it is asked.
Clients are OpenAI's own, without a retry; no request of theirs fails, and each answer is one version's from end to end.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shoal.cluster.processes import adopting_orphans

from ..redis_servers import RedisServer, needs_redis
from ..tiny import tiny_model
from .changes import Service, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_redis]

STABLE, TWIN, OTHER, BROKEN = "stable", "twin", "other", "broken"
LONG = 200  # tokens: a stream that is there before a version of the model is replaced, and behind it
ASKED: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0, "max_tokens": LONG, "stream": True},
    {"prompt": "In 1969", "temperature": 0.9, "seed": 1, "max_tokens": LONG, "stream": True},
    {"prompt": "Water boils", "temperature": 0.8, "seed": 2, "max_tokens": 40, "stream": True},
    {"prompt": "The largest oceans", "temperature": 0.7, "seed": 3, "max_tokens": 40, "stream": False},
    {"prompt": "A list:", "temperature": 0.9, "seed": 5, "max_tokens": 8, "stream": False},
]
SHORT = 4  # of ASKED


class Told(NamedTuple):
    """An answer: who gave it, and its text."""

    variant: str
    text: str


class Client:
    """OpenAI's. port: where it asks, in the place of the service's."""

    def __init__(self, service: Service, *, port: int | None = None) -> None:
        import openai

        url = f"http://127.0.0.1:{port or service.port}/v1"
        self._client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(self, index: int, **headers: str) -> Told:
        """Raises whatever its client would see. AssertionError: a stream that has no end."""
        answer = self._client.completions.with_raw_response.create(
            model="tiny",
            extra_headers={"x-shoal-cache": "bypass"} | {f"x-shoal-{name}": said for name, said in headers.items()},
            extra_body={"ignore_eos": True},
            timeout=120,
            **ASKED[index],
        )
        variant, parsed = answer.headers["x-shoal-variant"], answer.parse()
        chunks = [choice for chunk in parsed for choice in chunk.choices] if ASKED[index]["stream"] else parsed.choices
        assert chunks[-1].finish_reason == "length", "no end"
        return Told(variant, "".join(choice.text for choice in chunks))


class Load:
    """Clients that ask again and again, each the same and for another session each time.

    versions: what the variants say to each, at one time or another.
    """

    def __init__(self, service: Service, *versions: dict[str, list[str]]) -> None:
        self.failures: list[str] = []
        self.answered: Counter[str] = Counter()  # by whom
        self._client = Client(service)
        self._versions = versions
        self._counts = [0] * len(ASKED)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(len(ASKED))]

    def _run(self, index: int) -> None:
        rng = random.Random(index)
        while not self._stop.is_set():
            try:
                told = self._client.ask(index, session=str(rng.randrange(1000)))
            except Exception as error:  # noqa: BLE001 (whatever it is, it is a request that failed)
                self.failures.append(f"{index}: {error!r:.500}")
                return
            self.answered[told.variant] += 1
            self._counts[index] += 1
            if all(told.text != texts[told.variant][index] for texts in self._versions):
                self.failures.append(f"{index}: {told.variant} says another text")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.await_answers()
        return self

    def await_answers(self) -> None:
        """Returns when each has asked, since now, and been answered."""
        enough = [count + 2 for count in self._counts]
        until(lambda: self.failures or all(map(int.__ge__, self._counts, enough)), 120.0)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(150)
            assert not thread.is_alive(), "a request has no end"
        assert self.failures == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each variant's."""
    import torch
    from safetensors.torch import load_file, save_file

    own, other, broken = (
        tiny_model(tmp_path_factory.mktemp(name), seed=seed) for name, seed in ((STABLE, 3), (OTHER, 4), (BROKEN, 5))
    )
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return {STABLE: own, TWIN: own, OTHER: other, BROKEN: broken}


@pytest.fixture(scope="module")
def service(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("rollout")
    with adopting_orphans(), RedisServer(folder / "redis") as redis:  # nothing of its cluster is left
        config = {
            "engine": {"model": str(models[STABLE])},
            "router": {"served_model_name": ["tiny"]},
            "server": {"redis_url": redis.unix_url, "drain_timeout_s": 0.2},
            "variants": [{"name": name, "engine": {"model": str(models[name])}} for name in (TWIN, OTHER, BROKEN)],
            "rollout": {"allow_variant_header": True},
        }
        service = Service(folder, config)
        yield service
        service.close()


@pytest.fixture(scope="module")
def texts(service: Service) -> dict[str, list[str]]:
    """What each variant says if nothing happens."""
    client = Client(service)
    said = {}
    for name in (STABLE, TWIN, OTHER):
        until(lambda name=name: seen(service, name, "state") <= {"idle", "serving"})
        told = [client.ask(index, variant=name) for index in range(len(ASKED))]
        assert {each.variant for each in told} == {name}
        said[name] = [each.text for each in told]
    assert said[STABLE] == said[TWIN]
    assert all(map(str.__ne__, said[STABLE], said[OTHER]))
    return said


def variants(service: Service) -> list[dict[str, dict[str, Any]]]:
    """As each ingress describes them."""
    told = [json.loads(service.get("/v1/cluster", port=port)) for port in service.ingress_ports()]
    return [{each["name"]: each for each in one["variants"]} for one in told]


def seen(service: Service, name: str, field: str) -> set[Any]:
    """What the ingresses say of a variant."""
    return {one[name][field] for one in variants(service)}


def roll_out(service: Service, **rollout: Any) -> None:
    """Returns when both ingresses give each variant its share."""
    service.tell(rollout=rollout)
    weights = rollout["weights"]
    wanted = {name: {round(weight / sum(weights.values()), 6)} for name, weight in weights.items()}
    until(lambda: all(seen(service, name, "share") == share for name, share in wanted.items()))


def answered(service: Service) -> Counter[str]:
    """Requests that each variant has answered, by the service's own count."""
    return service.sums("shoal_e2e_request_latency_seconds_count", "variant")


def asked(service: Service) -> Counter[str]:
    """Of each ingress: the answers that it gave."""
    return service.sums("shoal_http_responses_total", "ingress", route="/v1/completions", status="200")


def rolled_back(service: Service, name: str) -> Counter[str]:
    """Ingresses that took it back, by the bound."""
    return service.sums("shoal_variant_rollbacks_total", "bound", variant=name)


def test_a_session_has_one_variant_at_both_ingresses(service: Service, texts: dict[str, list[str]]) -> None:
    roll_out(service, weights={STABLE: 3, OTHER: 1})
    # Ingresses that have just started may not know each other yet: what the fixture asked must be counted.
    until(lambda: answered(service).total() >= 3 * len(ASKED) <= asked(service).total())
    by_variant, by_ingress = answered(service), asked(service)
    clients = [Client(service, port=port) for port in service.ingress_ports()]
    told = {session: [client.ask(SHORT, session=session) for client in clients] for session in map(str, range(40))}
    assert {one.text == texts[one.variant][SHORT] for every in told.values() for one in every} == {True}
    assert {len(set(every)) for every in told.values()} == {1}, "a session has been with two"
    counts = Counter(one.variant for every in told.values() for one in every)
    assert counts[STABLE] > counts[OTHER] > 0
    until(lambda: answered(service) - by_variant == counts, 20.0)  # it is counted behind its last byte
    assert sorted((asked(service) - by_ingress).values()) == [40, 40]
    assert seen(service, STABLE, "digest") == seen(service, TWIN, "digest") != seen(service, OTHER, "digest")

    roll_out(service, weights={STABLE: 1, OTHER: 1})
    client = Client(service)
    moved = {(every[0].variant, client.ask(SHORT, session=session).variant) for session, every in told.items()}
    assert moved == {(STABLE, STABLE), (STABLE, OTHER), (OTHER, OTHER)}


def test_copies_are_compared_and_nobody_gets_them(service: Service, texts: dict[str, list[str]]) -> None:
    roll_out(service, weights={STABLE: 1}, shadow={TWIN: 1, OTHER: 1, BROKEN: 1})
    until(lambda: answered(service).total() == asked(service).total())
    by_variant = answered(service)
    client = Client(service)
    for _ in range(3):
        assert [client.ask(index) for index in range(len(ASKED))] == [Told(STABLE, text) for text in texts[STABLE]]

    def copied(name: str) -> Counter[str]:
        return service.sums("shoal_shadow_generations_total", "outcome", variant=name)

    copies = 3 * len(ASKED)
    until(lambda: [copied(name).total() for name in (TWIN, OTHER, BROKEN)] == [copies] * 3)
    for name, outcome in ((TWIN, "same"), (OTHER, "differs"), (BROKEN, "failed")):
        assert copied(name).keys() <= {outcome, "dropped"}
        assert copied(name)[outcome] > copies // 2
    assert answered(service) - by_variant == Counter({STABLE: copies})


def test_first_tokens_that_come_late_end_its_share(service: Service, texts: dict[str, list[str]]) -> None:
    weights = {STABLE: 2, TWIN: 1}
    roll_out(service, weights=weights)
    with Load(service, texts) as load:
        until(lambda: load.answered[TWIN])
        bounds = {"max_error_rate": None, "max_ttft_s": 1e-6, "min_requests": 5}
        service.tell(rollout={"weights": weights, "rollback": bounds})
        until(lambda: seen(service, TWIN, "share") == {0.0})
        load.await_answers()  # what ran there has ended
        last = load.answered[TWIN]
        load.await_answers()
        assert load.answered[TWIN] == last
    assert rolled_back(service, TWIN) == {"ttft": 2}
    assert all(state.startswith("rolled back") for state in seen(service, TWIN, "state"))


def test_one_ingress_hears_it_from_the_other(service: Service, texts: dict[str, list[str]]) -> None:
    """Which never had a request."""
    weights, before = {STABLE: 1, TWIN: 3}, rolled_back(service, TWIN)
    roll_out(service, weights=weights)
    bounds = {"max_error_rate": None, "max_ttft_s": 1e-6, "min_requests": 5}
    service.tell(rollout={"weights": weights, "rollback": bounds})
    judge, _ = service.ingress_ports()
    client = Client(service, port=judge)
    while not rolled_back(service, TWIN) - before:
        assert client.ask(SHORT).text == texts[STABLE][SHORT]
    until(lambda: seen(service, TWIN, "share") == {0.0}, 20.0)
    assert {"another ingress" in state for state in seen(service, TWIN, "state")} == {True, False}


def test_a_variant_that_fails_fails_nobody(service: Service, texts: dict[str, list[str]]) -> None:
    weights = {STABLE: 2, BROKEN: 1}
    roll_out(service, weights=weights)
    with Load(service, texts) as load:
        service.tell(rollout={"weights": weights, "rollback": {"max_error_rate": 0.2, "min_requests": 5}})
        until(lambda: seen(service, BROKEN, "share") == {0.0})
        load.await_answers()
    assert load.answered.keys() == {STABLE}
    assert rolled_back(service, BROKEN) == {"error_rate": 2}


def test_stable_gets_other_weights_under_running_streams(
    service: Service, texts: dict[str, list[str]], models: dict[str, Path]
) -> None:
    """Each answer is one version's from end to end, and the new one's once the old one is gone. Keep last."""
    roll_out(service, weights={STABLE: 1})
    replaced = texts | {STABLE: texts[OTHER]}
    with Load(service, texts, replaced) as load:
        service.deploy(engine={"model": str(models[OTHER])})
        until(lambda: seen(service, STABLE, "digest") == seen(service, OTHER, "digest"))
        load.await_answers()
        client = Client(service)
        assert [client.ask(index) for index in range(len(ASKED))] == [Told(STABLE, text) for text in texts[OTHER]]
    assert service.interrupted() == {}
