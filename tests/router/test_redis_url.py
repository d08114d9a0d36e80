"""What `--redis-url` may say, and that no refusal shows a password."""

import pytest

from shoal.router.redis_url import RedisAddress, parse_redis_url
from shoal.runtime.errors import ConfigError

TWO = (("h1", 26379), ("h2", 7000))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress(kind="server", hosts=(("h", 6379),))),
        ("redis://:pw@h:7/3", RedisAddress(kind="server", hosts=(("h", 7),), password="pw", db=3)),
        (
            "redis://me:p%40%2F@[::1]:7?db=3",
            RedisAddress(kind="server", hosts=(("::1", 7),), username="me", password="p@/", db=3),
        ),
        (
            "rediss://h/1?ssl_ca_certs=/ca.pem&ssl_check_hostname=false",
            RedisAddress(
                kind="server", hosts=(("h", 6379),), db=1, tls={"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False}
            ),
        ),
        ("unix:///run/r.sock?db=2", RedisAddress(kind="unix", path="/run/r.sock", db=2)),
        ("unix://:pw@/run/r.sock", RedisAddress(kind="unix", path="/run/r.sock", password="pw")),
        ("unix:///run/r.sock?password=pw", RedisAddress(kind="unix", path="/run/r.sock", password="pw")),
        ("redis+sentinel://h1,h2:7000/main/2", RedisAddress(kind="sentinel", hosts=TWO, service="main", db=2)),
        (
            "rediss+sentinel://me:pw@h1,h2:7000/main?sentinel_password=spw",
            RedisAddress(
                kind="sentinel",
                hosts=TWO,
                service="main",
                username="me",
                password="pw",
                sentinel_password="spw",
                tls={},
            ),
        ),
        ("redis+cluster://h1:1,h2:2", RedisAddress(kind="cluster", hosts=(("h1", 1), ("h2", 2)))),
        ("rediss+cluster://:pw@h1", RedisAddress(kind="cluster", hosts=(("h1", 6379),), password="pw", tls={})),
    ],
)
def test_addresses(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "must begin with redis://"),
        ("geheim", "must begin with redis://"),
        ("http://:geheim@h", "must begin with redis://"),
        ("redis://", "host is missing"),
        ("redis://:geheim@", "host is missing"),
        ("redis://:geheim@h:notaport", "port is not a number"),
        ("redis://:geheim@h:0", "port is not a number"),
        ("redis://:geheim@h:70000", "port is not a number"),
        ("redis://:ge/heim@h", "%2F"),
        ("redis://:ge#heim@h", "%23"),
        ("redis://:ge?heim=1@h", "%3F"),
        ("redis://[geheim", "cannot be read"),
        ("redis://:geheim@h/x", "database is not a number"),
        ("redis://:geheim@h/1/2", "more than one database"),
        ("redis://:geheim@h1,h2", "several hosts"),
        ("redis://:geheim@h?ssl_ca_certs=x", "rediss://"),
        ("redis://:geheim@h?socket_timeout=9", "redis_timeout_s"),
        ("redis://:geheim@h?geheim=1", "option that is not known"),
        ("rediss://:geheim@h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("rediss://:geheim@h?ssl_check_hostname=maybe", "ssl_check_hostname"),
        ("unix://:geheim@", "absolute path"),
        ("unix://run/redis.sock", "absolute path"),
        ("unix:///" + "x" * 120, "allows 107"),
        ("redis+sentinel://:geheim@h", "no service"),
        ("redis+cluster://:geheim@h/1", "database 0"),
        ("redis+cluster://:geheim@h1,,h2", "host is missing"),
    ],
)
def test_refusals_say_what_is_wrong_and_show_no_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_redis_url(url)
    assert says in str(refused.value)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("show", [str, repr])
@pytest.mark.parametrize("url", ["redis://me:geheim@h:7/1", "redis+sentinel://me:geheim@h/s?sentinel_password=geheim"])
def test_an_address_shows_where_but_not_who(url: str, show: type[str]) -> None:
    assert "h:" in show(parse_redis_url(url))
    assert "geheim" not in show(parse_redis_url(url))
    assert "me" not in show(parse_redis_url(url)).replace("RedisAddress", "")
