"""Station 3, the key: denies by default, on the raw ASGI path.

It looks at `scope["path"]` and the header bytes and at nothing derived from them: a Host header can bend
`request.url`. Whatever is not on the short list of public routes needs the key where one is set: unknown routes and
`/docs` too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.errors import InvalidRequest, Unauthorized
from .config import RouterConfig
from .http import error_response
from .tenant import Tenant

ALIVE_PATH = "/health"
PUBLIC_PATHS = frozenset({ALIVE_PATH, "/ready"})


class Keys:
    """The accepted keys, as digests; and the salt under which a key's owner may share cached prefixes."""

    def __init__(self, keys: Sequence[str], *, secret: bytes) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secret = secret

    def check(self, authorization: bytes | None) -> Tenant:
        """The caller. Raises Unauthorized. Takes the same time whichever key is right."""
        if not self._digests:
            return Tenant(name="anonymous", salt=self.salt(b""))
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise Unauthorized("no API key: send `Authorization: Bearer KEY`", code="missing_api_key")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Unauthorized("the API key is not one of this server's", code="invalid_api_key")
        return Tenant(name=f"key-{matches.index(True) + 1}", salt=self.salt(digest))

    def salt(self, *parts: bytes) -> str:
        """A salt that only the secret's holder can make; equal for equal parts."""
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def keys_of(config: RouterConfig) -> Keys:
    secret = config.secret.encode() if config.secret else secrets.token_bytes(32)
    return Keys(config.api_keys, secret=secret)


class Guard:
    """Raw ASGI, outermost: header limits, the key, and an envelope for whatever got past every other handler.

    check_open: raises while there is no model yet; then only `ALIVE_PATH` is answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        config: RouterConfig,
        check_open: Callable[[], object],
        on_status: Callable[[str, int], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._check_open = check_open
        self._on_status = on_status
        self._limits = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # we have no websockets; closing before accepting is a refusal
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False
        request_id = f"req-{uuid.uuid4().hex}".encode()

        async def watched(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                self._on_status(_route(scope), message["status"])
            await send(message)

        try:
            self._check_headers(scope["headers"])
            if scope["path"] not in PUBLIC_PATHS:
                scope["shoal.tenant"] = self._keys.check(_authorization(scope["headers"]))
            if scope["path"] != ALIVE_PATH:
                self._check_open()
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 - the last line of defence; error_response logs what is a bug
            response = error_response(error)
            if not started:
                await response(scope, receive, watched)

    def _check_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        limits = self._limits
        if len(headers) > limits.max_headers:
            raise InvalidRequest(
                f"{len(headers)} headers were sent; at most {limits.max_headers} are allowed (max_headers)",
                param="headers",
                code="headers_too_large",
            )
        size = sum(len(name) + len(value) for name, value in headers)
        if size > limits.max_header_bytes:
            raise InvalidRequest(
                f"the headers have {size} bytes; at most {limits.max_header_bytes} are allowed (max_header_bytes)",
                param="headers",
                code="headers_too_large",
            )


def _route(scope: Scope) -> str:
    """The route's pattern; paths that are no route are one, for they are the client's to choose."""
    return getattr(scope.get("route"), "path", "other")


def _authorization(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    given = [value for name, value in headers if name == b"authorization"]
    return given[0] if len(given) == 1 else None  # two of them is nobody's key
