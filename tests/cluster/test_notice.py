"""Word of a machine's end: from real HTTP servers that answer as each cloud does, and from an operator's file."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal.cluster.draining import follow
from shoal.cluster.notice import (
    FILE_S,
    AwsNotice,
    AzureNotice,
    FileNotice,
    GcpNotice,
    Metadata,
    NoNotice,
    Notice,
    select_notice,
    watch,
)

WHEN = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


class Service:
    """A metadata service. answers: path -> body, else not found. needs: a header without which it says 401."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.needs: dict[str, str] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                missing = [name for name, value in outer.needs.items() if self.headers.get(name) != value]
                body = outer.answers.get(f"{self.command} {self.path}", outer.answers.get(self.path))
                if self.command == "GET" and missing:
                    self.send_response(401)
                    body = None
                else:
                    self.send_response(404 if body is None else 200)
                data = (body or "").encode()
                for name, value in {**outer.headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def metadata(self) -> Metadata:
        return Metadata(self.url)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def test_aws(service: Service) -> None:
    service.answers["PUT /latest/api/token"] = "t0ken"
    service.needs = {"X-aws-ec2-metadata-token": "t0ken"}
    source = AwsNotice(service.metadata)

    async def scenario() -> None:
        assert await source.look() is None
        service.answers["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-11-21T11:00:00Z"}'
        assert await source.look() == Notice(None, "rebalance recommendation")
        told = {"action": "terminate", "time": "2026-11-21T12:00:00Z"}
        service.answers["/latest/meta-data/spot/instance-action"] = json.dumps(told)
        assert await source.look() == Notice(WHEN.timestamp(), "spot terminate")
        assert service.asked.count("PUT /latest/api/token") == 1
        service.needs = {"X-aws-ec2-metadata-token": "another"}  # it has expired
        service.answers["PUT /latest/api/token"] = "another"
        assert await source.look() == Notice(WHEN.timestamp(), "spot terminate")

    asyncio.run(scenario())


def test_gcp_says_that_not_when(service: Service) -> None:
    service.needs = {"Metadata-Flavor": "Google"}
    now = [100.0]
    source = GcpNotice(service.metadata, now=lambda: now[0])

    async def scenario() -> None:
        service.answers["/computeMetadata/v1/instance/preempted"] = "FALSE"
        service.answers["/computeMetadata/v1/instance/maintenance-event"] = "NONE"
        assert await source.look() is None
        service.answers["/computeMetadata/v1/instance/maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        assert await source.look() is None
        service.answers["/computeMetadata/v1/instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert await source.look() == Notice(160.0, "maintenance")
        now[0] = 110.0
        assert await source.look() == Notice(160.0, "maintenance"), "it counts from when it was heard first"
        service.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
        assert await source.look() == Notice(140.0, "preempted")

    asyncio.run(scenario())


def event(kind: str, *resources: str, at: str = "Sat, 21 Nov 2026 12:00:00 GMT") -> dict[str, object]:
    return {
        "EventId": "1",
        "EventType": kind,
        "Resources": list(resources),
        "EventStatus": "Scheduled",
        "NotBefore": at,
    }


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], None),
        ([event("Preempt", "other")], None),
        ([event("Freeze", "ours")], None),
        ([event("Preempt", "other", "ours")], Notice(WHEN.timestamp(), "Preempt")),
        ([event("Redeploy", "ours", at=""), event("Preempt", "ours")], Notice(50.0, "Redeploy")),
    ],
)
def test_azure(service: Service, events: list[dict[str, object]], expected: Notice | None) -> None:
    service.needs = {"Metadata": "true"}
    service.answers["/metadata/instance/compute/name?api-version=2021-02-01&format=text"] = "ours"
    service.answers["/metadata/scheduledevents?api-version=2020-07-01"] = json.dumps({"Events": events})
    assert asyncio.run(AzureNotice(service.metadata, now=lambda: 50.0).look()) == expected


@pytest.mark.parametrize(
    ("answers", "headers", "kind"),
    [
        ({"/computeMetadata/v1/": "instance/"}, {"Metadata-Flavor": "Google"}, GcpNotice),
        ({"/metadata/instance?api-version=2021-02-01": "{}"}, {}, AzureNotice),
        ({"PUT /latest/api/token": "t"}, {}, AwsNotice),
        ({}, {}, NoNotice),
    ],
)
def test_auto_asks_whose_machine_it_is(
    service: Service, answers: dict[str, str], headers: dict[str, str], kind: type
) -> None:
    service.answers, service.headers = answers, headers
    assert type(asyncio.run(select_notice("auto", base_url=service.url))) is kind


def test_auto_where_there_is_no_metadata_service() -> None:
    source = asyncio.run(select_notice("auto", base_url="http://127.0.0.1:9"))
    assert asyncio.run(source.look()) is None


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    source = FileNotice(file)

    async def scenario() -> None:
        assert await source.look() is None
        file.write_text("45\n")
        os.utime(file, (1000, 1000))
        assert await source.look() == Notice(1045.0, str(file))
        file.write_text("")
        os.utime(file, (1000, 1000))
        assert await source.look() == Notice(1000.0 + FILE_S, str(file))
        file.write_text("soon")
        with pytest.raises(ValueError, match="soon"):
            await source.look()

    asyncio.run(scenario())


def test_what_is_new_is_told_once_and_failures_are_outlived() -> None:
    first, sooner = Notice(None, "rebalance recommendation"), Notice(70.0, "spot stop")

    class Scripted:
        def __init__(self) -> None:
            self.script = iter([None, OSError("down"), first, first, ValueError("odd"), first, sooner, None, sooner])

        async def look(self) -> Notice | None:
            said = next(self.script, KeyboardInterrupt())
            if isinstance(said, BaseException):
                raise said
            return said

    told: list[Notice] = []
    failures = [ConnectionError("the GCS is down")]

    async def tell(notice: Notice) -> None:
        if failures:
            raise failures.pop()
        told.append(notice)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(watch(Scripted(), tell, every_s=0.0))
    assert told == [first, sooner]


def test_whoever_has_a_part_on_a_node_hears_that_it_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.draining.LOOK_EVERY_S", 0.0)
    script: list[dict[str, float | None] | ConnectionError] = [
        {"other": 130.0},
        ConnectionError("the GCS is down"),
        {"other": 130.0, "ours": None},
        {"ours": None},
        {"ours": 160.0},
        {"ours": 130.0, "stage": 120.0},
    ]
    heard: list[float | None] = []

    def draining() -> dict[str, float | None]:
        said = script.pop(0) if script else KeyboardInterrupt()
        if isinstance(said, BaseException):
            raise said
        return said

    async def depart(left_s: float | None) -> None:
        heard.append(left_s)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(follow(draining, lambda: {"ours", "stage"}, depart, now=lambda: 100.0))
    assert heard == [None, 60.0, 30.0, 20.0]
