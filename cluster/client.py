"""A client of our HTTP API in the standard library alone: what `demo` and `chat --url` speak with."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..runtime.errors import ConfigError, EngineError, RequestError

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a server is. base: what stands before `/v1` in its paths; port None: the scheme's."""

    secure: bool
    host: str
    port: int | None
    base: str

    @staticmethod
    def parse(url: str) -> Origin:
        """Of `http://host:port`, with or without `/v1`. Raises ConfigError."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url {url}: {error}; expected http://host:port") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url}: expected http://host:port")
        return Origin(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


class Client:
    """Calls to one server; each opens a connection of its own, so threads may share a client."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._origin = Origin.parse(url)
        self._timeout_s = timeout_s
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """The name that the server's model goes by. Raises EngineError: it does not say so as OpenAI's API has it."""
        with self._call("GET", "/v1/models") as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise EngineError(f"{self._origin.base or '/'} has no /v1/models: is it OpenAI's API?") from None

    def chat(self, messages: Sequence[Message], **params: Any) -> Iterator[str]:
        """Pieces of the answer's text as they come."""
        for chunk in self.stream("/v1/chat/completions", {"messages": list(messages), **params}):
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of a streamed call, up to `[DONE]`.

        Raises:
            RequestError: refused (a 4xx). EngineError: failed, also in mid-stream, or cut off before the end.
        """
        with self._call("POST", path, {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                data = line[len(b"data: ") :].strip()
                if data == b"[DONE]":
                    return
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise EngineError(f"the server failed: {event['error']['message']}")
                yield event
        raise EngineError("the stream ended before its end")

    @contextmanager
    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        origin = self._origin
        kind = http.client.HTTPSConnection if origin.secure else http.client.HTTPConnection
        connection = kind(origin.host, origin.port, timeout=self._timeout_s)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, origin.base + path, payload, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                problem = f"{method} {path}: status {response.status}: {reason_of(response.read())}"
                raise RequestError(problem) if response.status < 500 else EngineError(problem)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"no answer from the server at {origin}: {error}") from None
        finally:
            connection.close()


def reason_of(body: bytes) -> str:
    """What a body that is no answer says, in one line."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace").strip() or "no body"
