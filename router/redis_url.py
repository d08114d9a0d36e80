"""Beside station 5: what `--redis-url` says, read and refused before anything starts. No I/O, and no Redis client.

    redis://[user:password@]host[:port][/db]            rediss:// is the same over TLS
    unix://[user:password@]/path/to/socket[?db=0]
    redis+sentinel://[user:password@]host[:port],.../service[/db]
    redis+cluster://[user:password@]host[:port],...     rediss+sentinel:// and rediss+cluster:// over TLS

Special characters of a user name or password are %-escaped. Options behind `?` are `db`, `password`, `username`,
`client_name`, for Sentinels' own login `sentinel_username` and `sentinel_password`, and redis-py's `ssl_*`.
"""

from __future__ import annotations

from typing import Literal, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from ..runtime.errors import ConfigError

Kind = Literal["server", "unix", "sentinel", "cluster"]
MAX_SOCKET_PATH = 107  # bytes: sun_path of sockaddr_un(7), less the zero at its end
_PORT, _SENTINEL_PORT = 6379, 26379
_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_TEXT_OPTIONS = ("username", "password", "client_name", "sentinel_username", "sentinel_password")
_TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_keyfile",
    "ssl_password",
)
_ESCAPES = "; characters such as / @ : ? # in a user name or password are written %2F %40 %3A %3F %23"


class RedisAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where Redis is. hosts: one of a server, some of a cluster or of Sentinels. tls: redis-py's `ssl_*`, where on."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    client_name: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    tls: dict[str, str | bool] | None = None

    def __str__(self) -> str:
        """For logs: without what must stay secret."""
        places = self.path or ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        return f"{self.service}@{places}" if self.service else places

    def __repr__(self) -> str:
        return f"RedisAddress({self.kind} {self})"


def parse_redis_url(url: str) -> RedisAddress:
    """The address that the URL names.

    Raises:
        ConfigError: says what is wrong, and shows nothing of the URL that could be a part of its password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        _refuse(f"it must begin with {', '.join(f'{known}://' for known in _SCHEMES)}")
    kind, is_tls = _SCHEMES[scheme]
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError:  # brackets that do not match, say; urllib's own text shows the password
        _refuse("its host cannot be read" + _ESCAPES)
    if parts.fragment:
        _refuse("it has a #" + _ESCAPES)
    login, _, authority = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    options = _options(parts.query, is_tls)
    texts = {"username": unquote(username), "password": unquote(password)} | {
        name: value for name, value in options.items() if name in _TEXT_OPTIONS
    }
    address = {
        "kind": kind,
        "tls": _tls(options) if is_tls else None,
        **{name: text or None for name, text in texts.items()},
        **_place(kind, authority, unquote(parts.path), options.get("db")),
    }
    return RedisAddress(**address)  # type: ignore[arg-type]  # each field is made by name above


def _place(kind: Kind, authority: str, path: str, db: str | None) -> dict[str, object]:
    """hosts, path, service and db."""
    if kind == "unix":
        if authority or not path.startswith("/"):
            _refuse("unix:// is followed by the absolute path of a socket: unix:///run/redis.sock" + _ESCAPES)
        if len(path.encode()) > MAX_SOCKET_PATH:
            _refuse(f"the socket's path has {len(path.encode())} bytes, the system allows {MAX_SOCKET_PATH}")
        return {"path": path, "db": _db(db)}
    hosts = tuple(_host(part, _SENTINEL_PORT if kind == "sentinel" else _PORT) for part in authority.split(","))
    if kind == "server" and len(hosts) > 1:
        _refuse("it names several hosts: that takes redis+sentinel:// or redis+cluster://")
    names = [name for name in path.split("/") if name]
    service = ""
    if kind == "sentinel":
        if not names:
            _refuse("it names no service: redis+sentinel://host:port/SERVICE")
        service = names.pop(0)
    if len(names) > 1 or (names and db is not None):
        _refuse("it names more than one database" + _ESCAPES)
    number = _db(names[0] if names else db)
    if kind == "cluster" and number:
        _refuse("a cluster has database 0 alone")
    return {"hosts": hosts, "service": service, "db": number}


def _host(part: str, default_port: int) -> tuple[str, int]:
    host, _, port = part.rpartition(":") if ":" in part.rpartition("]")[2] else (part, "", str(default_port))
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or any(character in "[]/@% \t" for character in bare):
        _refuse("a host is missing or cannot be read" + _ESCAPES)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        _refuse("a port is not a number from 1 to 65535" + _ESCAPES)
    return unquote(bare), int(port)


def _db(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        _refuse("its database is not a number" + _ESCAPES)
    return int(text)


def _options(query: str, is_tls: bool) -> dict[str, str]:
    options: dict[str, str] = {}
    known = ("db", *_TEXT_OPTIONS, *(_TLS_OPTIONS if is_tls else ()))
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name.startswith("ssl_") and not is_tls:
            _refuse("it has ssl_ options, which take rediss://")
        if name in ("timeout", "socket_timeout", "socket_connect_timeout"):
            _refuse("its timeouts are set by redis_timeout_s, not in the URL")
        if name not in known:
            _refuse(f"it has an option that is not known; known are {', '.join(known)}" + _ESCAPES)
        options[name] = value
    return options


def _tls(options: dict[str, str]) -> dict[str, str | bool]:
    tls: dict[str, str | bool] = {name: value for name, value in options.items() if name in _TLS_OPTIONS}
    if tls.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
        _refuse("ssl_cert_reqs is none, optional or required")
    if "ssl_check_hostname" in tls:
        answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        answer = answers.get(str(tls["ssl_check_hostname"]).lower())
        if answer is None:
            _refuse("ssl_check_hostname is true or false")
        tls["ssl_check_hostname"] = answer
    return tls


def _refuse(what: str) -> NoReturn:
    raise ConfigError(f"redis_url cannot be used: {what}")
