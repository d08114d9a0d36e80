"""The way of a decision from Serve's controller to the ingresses, over a store that is a dictionary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import pytest
from ray.experimental import internal_kv

from shoal.cluster import autoscale_board
from shoal.cluster.autoscale_board import STALE_S, GcsBoard, follow_board, read_board
from shoal.router.load_report import Decided


def decided(replicas: int, *, at: float = 1000.0) -> Decided:
    words = "3.1 requests/s of 0.2 s come, 4 wait"
    return Decided(replicas=replicas, reason="load", words=words, most=8, ttft_s=2.0, since=at, said_at=at)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[bytes, bytes], bytes]:
    kept: dict[tuple[bytes, bytes], bytes] = {}

    def put(key: bytes, value: bytes, *, overwrite: bool, namespace: bytes) -> None:
        assert overwrite
        kept[namespace, key] = value

    monkeypatch.setattr(internal_kv, "_internal_kv_initialized", lambda: True)
    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, *, namespace: kept.get((namespace, key)))
    return kept


def written(*boards: GcsBoard) -> None:
    for board in boards:
        board._thread.shutdown()


def test_the_last_word_of_each_application_is_read(store: dict[tuple[bytes, bytes], bytes]) -> None:
    boards = GcsBoard("shoal-stable"), GcsBoard("shoal-canary")
    boards[0].show(decided(2))
    boards[0].show(decided(3))
    boards[1].show(decided(5))
    written(*boards)
    applications = ["shoal-stable", "shoal-canary", "shoal-fixed"]
    assert read_board(applications, now=1001.0) == {"shoal-stable": decided(3), "shoal-canary": decided(5)}


def test_a_word_that_nobody_repeats_is_void(store: dict[tuple[bytes, bytes], bytes]) -> None:
    board = GcsBoard("shoal-stable")
    board.show(decided(2))
    written(board)
    assert read_board(["shoal-stable"], now=1000.0 + STALE_S - 1)
    assert read_board(["shoal-stable"], now=1000.0 + STALE_S + 1) == {}


def test_without_a_ray_nothing_is_known() -> None:
    assert read_board(["shoal-stable"], now=0.0) == {}


def test_ingresses_go_on_asking_whatever_happens(
    store: dict[tuple[bytes, bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = GcsBoard("shoal-stable")
    board.show(decided(2, at=time.time()))
    written(board)
    heard: list[Mapping[str, Decided]] = []
    answers = iter([OSError("the GCS is away"), None])

    def get(key: bytes, *, namespace: bytes) -> bytes | None:
        if error := next(answers, None):
            raise error
        return store.get((namespace, key))

    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    monkeypatch.setattr(autoscale_board, "LOOK_S", 0.01)

    async def scenario() -> None:
        following = asyncio.create_task(follow_board(lambda: ["shoal-stable"], heard.append))
        async with asyncio.timeout(20):
            while not heard:
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(scenario())
    assert heard[0]["shoal-stable"].replicas == 2
