"""Word that a machine is about to be taken away: from its cloud's metadata service, or by an operator's file.

Every process of ours asks for its own machine, each few seconds: there is no actor a node to place and to watch, and
wherever something of ours runs somebody listens. What was heard is told to Ray (draining.py), which tells everyone.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

logger = logging.getLogger("shoal.cluster")

METADATA = "http://169.254.169.254"  # of all three; the machine alone reaches it
TIMEOUT_S = 1.0
ASK_EVERY_S = 3.0  # AWS and Azure suggest 5 s and 1 s

AWS_TOKEN_S = 600
GCP_PREEMPTED_S = 30.0  # from then on, as GCP promises
GCP_MAINTENANCE_S = 60.0
FILE_S = 30.0  # where the file does not say
AZURE_EVENTS = frozenset({"Preempt", "Terminate", "Reboot", "Redeploy"})  # a Freeze passes in seconds

Get = Callable[..., "Reply"]


class Notice(NamedTuple):
    """The machine goes at `deadline`, in unix seconds; None: nobody says when, and it may even stay."""

    deadline: float | None
    reason: str


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: str


class NoticeSource(Protocol):
    """Whoever knows of one machine's end."""

    async def look(self) -> Notice | None:
        """What is known now; None: it stays.

        Raises:
            OSError: nobody answers. ValueError, KeyError, TypeError: what is answered makes no sense.
        """
        ...


class NoNotice:
    """The null source."""

    async def look(self) -> Notice | None:
        return None


class FileNotice:
    """A file that an operator, or a hook before shutdown, puts on the machine; it may hold the seconds that are left.

    They count from when it was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def look(self) -> Notice | None:
        try:
            text, written = self._path.read_text(encoding="ascii").strip(), self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        return Notice(written + (float(text) if text else FILE_S), str(self._path))


class Metadata:
    """A metadata service over HTTP. base_url: for tests."""

    def __init__(self, base_url: str = METADATA) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port or 80

    async def ask(self, path: str, *, method: str = "GET", **headers: str) -> Reply:
        """Raises OSError: nobody answers, or something that is no HTTP."""
        return await asyncio.to_thread(self._ask, method, path, headers)

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            body = answer.read(2**20).decode("utf-8", "replace")
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()


class AwsNotice:
    """EC2: two minutes before a spot instance is stopped; and, without a time, that it is likely to be.

    docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html, with IMDSv2's tokens.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._token = ""

    async def look(self) -> Notice | None:
        action = await self._get("/latest/meta-data/spot/instance-action")
        if action.status == 200:
            told = json.loads(action.body)
            return Notice(_rfc3339(told["time"]), f"spot {told['action']}")
        rebalance = await self._get("/latest/meta-data/events/recommendations/rebalance")
        return Notice(None, "rebalance recommendation") if rebalance.status == 200 else None

    async def _get(self, path: str) -> Reply:
        reply = await self._metadata.ask(path, X_aws_ec2_metadata_token=self._token)
        if reply.status != 401:
            return reply
        self._token = await aws_token(self._metadata)
        return await self._metadata.ask(path, X_aws_ec2_metadata_token=self._token)


class GcpNotice:
    """Compute Engine: 30 s before a spot instance is stopped, and before a host's maintenance ends one with a GPU.

    cloud.google.com/compute/docs/instances/spot, .../docs/metadata/getting-live-migration-notice
    """

    def __init__(self, metadata: Metadata, now: Callable[[], float] = time.time) -> None:
        self._metadata = metadata
        self._now = now
        self._heard: Notice | None = None  # it says that, not when

    async def look(self) -> Notice | None:
        if await self._get("preempted") == "TRUE":
            return self._hear(GCP_PREEMPTED_S, "preempted")
        if await self._get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return self._hear(GCP_MAINTENANCE_S, "maintenance")
        self._heard = None
        return None

    def _hear(self, left_s: float, reason: str) -> Notice:
        if self._heard is None or self._heard.reason != reason:
            self._heard = Notice(self._now() + left_s, reason)
        return self._heard

    async def _get(self, name: str) -> str:
        reply = await self._metadata.ask(f"/computeMetadata/v1/instance/{name}", Metadata_Flavor="Google")
        return reply.body.strip() if reply.status == 200 else ""


class AzureNotice:
    """Scheduled Events: at least 30 s before a spot machine is taken, longer before maintenance.

    learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
    """

    def __init__(self, metadata: Metadata, now: Callable[[], float] = time.time) -> None:
        self._metadata = metadata
        self._now = now
        self._name: str | None = None

    async def look(self) -> Notice | None:
        if self._name is None:
            self._name = (await self._get("/metadata/instance/compute/name?api-version=2021-02-01&format=text")).strip()
        told = json.loads(await self._get("/metadata/scheduledevents?api-version=2020-07-01"))
        notices = [self._notice(event) for event in told["Events"] if self._is_ours(event)]
        return min(notices, key=lambda notice: notice.deadline or 0.0, default=None)

    def _is_ours(self, event: Mapping[str, Any]) -> bool:
        """A scale set is told of all its machines."""
        return event["EventType"] in AZURE_EVENTS and self._name in event["Resources"]

    def _notice(self, event: Mapping[str, Any]) -> Notice:
        when = event["NotBefore"]  # empty once it has begun
        return Notice(parsedate_to_datetime(when).timestamp() if when else self._now(), event["EventType"])

    async def _get(self, path: str) -> str:
        reply = await self._metadata.ask(path, Metadata="true")
        if reply.status != 200:
            raise OSError(f"the metadata service answers {reply.status}")
        return reply.body


async def select_notice(name: str, *, base_url: str = METADATA) -> NoticeSource:
    """The source that `server.notice` names."""
    metadata = Metadata(base_url)
    if name == "auto":
        name = await _cloud(metadata)
        logger.info("notices that this machine goes come from: %s", name)
    if name.startswith("file:"):
        return FileNotice(Path(name.removeprefix("file:")))
    sources: dict[str, Callable[[Metadata], NoticeSource]] = {"aws": AwsNotice, "gcp": GcpNotice, "azure": AzureNotice}
    return sources[name](metadata) if name in sources else NoNotice()


async def aws_token(metadata: Metadata) -> str:
    """Raises OSError: this is no EC2."""
    reply = await metadata.ask("/latest/api/token", method="PUT", X_aws_ec2_metadata_token_ttl_seconds=str(AWS_TOKEN_S))
    if reply.status != 200:
        raise OSError(f"no token: the metadata service answers {reply.status}")
    return reply.body


async def _cloud(metadata: Metadata) -> str:
    """Whose machine this is; `none` where no metadata service says."""
    try:
        root = await metadata.ask("/computeMetadata/v1/", Metadata_Flavor="Google")
        if root.headers.get("metadata-flavor") == "Google":
            return "gcp"
        if (await metadata.ask("/metadata/instance?api-version=2021-02-01", Metadata="true")).status == 200:
            return "azure"
        await aws_token(metadata)
        return "aws"
    except OSError:
        return "none"


async def watch(
    source: NoticeSource, tell: Callable[[Notice], Awaitable[None]], *, every_s: float = ASK_EVERY_S
) -> None:
    """Ask for ever, and tell what is new. What fails with an error that `look` may raise is tried again."""
    heard: Notice | None = None
    failed = ""
    while True:
        try:
            notice = await source.look()
            if notice is not None and notice != heard:
                await tell(notice)
                heard = notice
        except (OSError, ValueError, KeyError, TypeError) as error:
            if failed != (failed := f"{type(error).__name__}: {error}"):
                logger.warning("whether this machine is to go is not known: %s", failed)
        await asyncio.sleep(every_s)


def _rfc3339(text: str) -> float:
    """Raises ValueError."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
