"""Station 3, the key: denies by default, on the raw ASGI path.

It looks at `scope["path"]` and the header bytes and at nothing derived from them: a Host header can bend
`request.url`. Whatever is not on the short list of public routes needs the key where one is set: unknown routes and
`/docs` too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.errors import InvalidRequest, Unauthorized
from .config import RouterConfig, digest_of
from .http import error_response
from .request_log import EXCHANGE, REQUEST_ID, Exchange, request_id
from .store import Store
from .tenant import Tenant
from .tenants import NoVault, Seals, StoredKeys, Vault, tenant_of

ALIVE_PATH = "/health"
PUBLIC_PATHS = frozenset({ALIVE_PATH, "/ready"})


class Keys:
    """Whose key it is; and salts under which a key's owner may share cached prefixes."""

    def __init__(self, config: RouterConfig, *, vault: Vault, seals: Seals) -> None:
        """vault: keys beyond the config's. Without any key or tenant in the config everyone is welcome."""
        self._vault = vault
        self._seals = seals
        self._tenants = {tenant.name: tenant_of(tenant, seals) for tenant in config.tenants}
        self._known: dict[bytes, tuple[bytes, Tenant]] = {}  # by name, with the digest
        for number, key in enumerate(config.api_keys, 1):
            digest = bytes.fromhex(digest_of(key).removeprefix("sha256:"))
            self._known[seals.name(digest)] = digest, Tenant(name=f"key-{number}", salt=seals.salt(digest))
        for tenant in config.tenants:
            for text in tenant.keys:
                digest = bytes.fromhex(text.removeprefix("sha256:"))
                self._known[seals.name(digest)] = digest, self._tenants[tenant.name]
        self._is_open = not config.api_keys and not config.tenants

    async def check(self, authorization: bytes | None) -> Tenant:
        """The caller. What it takes tells nothing of any key: see `tenants.py`.

        Raises:
            Unauthorized: no key, or one that is nobody's. Unavailable: it cannot be known whether it is somebody's.
        """
        if self._is_open:
            return Tenant(name="anonymous", salt=self.salt(b""))
        digest = hashlib.sha256(_key(authorization)).digest()
        name = self._seals.name(digest)
        known, tenant = self._known.get(name, (b"", None))
        if tenant is not None and hmac.compare_digest(digest, known):
            return tenant
        found = await self._vault.find(name)
        if found is None:
            raise Unauthorized("the API key is not one of this server's", code="invalid_api_key")
        # Of a tenant that the config knows, too, the config's word on what it may counts.
        return self._tenants.get(found.name) or tenant_of(found, self._seals)

    def salt(self, *parts: bytes) -> str:
        """A salt that only the secret's holder can make; equal for equal parts."""
        return self._seals.salt(*parts)


def keys_of(config: RouterConfig, store: Store | None = None, *, clock: Callable[[], float] = time.monotonic) -> Keys:
    """store: where there are more keys than the config's; None where there is none."""
    seals = Seals(config.secret.encode() if config.secret else secrets.token_bytes(32))
    return Keys(config, vault=NoVault() if store is None else StoredKeys(store, seals=seals, clock=clock), seals=seals)


class Guard:
    """Raw ASGI, outermost: header limits, the key, and an envelope for whatever got past every other handler.

    check_open: raises while there is no model yet; then only `ALIVE_PATH` is answered. on_end: called once a request,
    however it ended. Every answer carries the request's id, the client's own where it sent a sane one; `echoes_id` is
    False where what runs the application writes it, as Ray Serve does.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        config: RouterConfig,
        check_open: Callable[[], object],
        on_status: Callable[[str, int], None],
        on_end: Callable[[Exchange], None],
        echoes_id: bool,
    ) -> None:
        self._app = app
        self._keys = keys
        self._check_open = check_open
        self._on_status = on_status
        self._on_end = on_end
        self._echoes_id = echoes_id
        self._limits = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # we have no websockets; closing before accepting is a refusal
            await send({"type": "websocket.close", "code": 1008})
            return
        scope[EXCHANGE] = exchange = Exchange(request_id(scope["headers"]), scope["method"])

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.route, exchange.status = _route(scope), message["status"]
                if self._echoes_id:
                    message["headers"] = [*message.get("headers", ()), (REQUEST_ID, exchange.id.encode())]
                self._on_status(exchange.route, message["status"])
            await send(message)

        try:
            self._check_headers(scope["headers"])
            if scope["path"] not in PUBLIC_PATHS:
                scope["shoal.tenant"] = await self._keys.check(_authorization(scope["headers"]))
                exchange.tenant = scope["shoal.tenant"].name
            if scope["path"] != ALIVE_PATH:
                self._check_open()
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 - the last line of defence; error_response logs what is a bug
            exchange.failure = error
            response = error_response(error)
            if exchange.status is None:
                await response(scope, receive, watched)
        finally:
            self._on_end(exchange)

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
    """Raises Unauthorized: two of them are nobody's key."""
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) > 1:
        raise Unauthorized(f"{len(given)} Authorization headers were sent; send one", code="invalid_api_key")
    return given[0] if given else None


def _key(authorization: bytes | None) -> bytes:
    """Raises Unauthorized."""
    if not authorization:
        raise Unauthorized("no API key: send `Authorization: Bearer KEY`", code="missing_api_key")
    scheme, _, key = authorization.partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer":
        raise Unauthorized("the Authorization header is not `Bearer KEY`", code="invalid_api_key")
    if not key:
        raise Unauthorized("the Authorization header has no key behind `Bearer`", code="missing_api_key")
    if b" " in key:
        raise Unauthorized("the Authorization header has a space in its key", code="invalid_api_key")
    return key
