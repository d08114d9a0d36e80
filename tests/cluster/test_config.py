"""`shoal.yaml`: composed from the folders' models, flags over it, and a hint for whatever is misspelt."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.config import ServerConfig, check_supported, is_loopback, load_config
from shoal.cluster.parts import default_name, parts
from shoal.cluster.serve import share_cores
from shoal.runtime.errors import ConfigError

MODEL = {("engine", "model"): "some/model"}


def write(folder: Path, text: str) -> Path:
    file = folder / "shoal.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "engine: {model: a/b, max_num_seqs: 4, block_size: 32}\nserver: {port: 9000}\n")
    config = load_config({("engine", "max_num_seqs"): 8}, file=file)
    assert (config.engine.model, config.engine.max_num_seqs, config.engine.block_size) == ("a/b", 8, 32)
    assert config.server.port == 9000


def test_defaults_are_the_models(tmp_path: Path) -> None:
    config = load_config(MODEL)
    assert config.server == ServerConfig()
    assert config.server.host == "127.0.0.1"
    assert [part.names for part in parts(config)] == [("some/model",)]
    check_supported(config)
    assert load_config(MODEL, file=write(tmp_path, "")).engine == config.engine
    assert load_config(MODEL, file=write(tmp_path, "server:\n")).server == config.server


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engin: {model: x}", ["unknown key engin", "did you mean engine?"]),
        ("engine: {max_model_length: 5}", ["engine.max_model_length", "did you mean engine.max_model_len?"]),
        ("engine: {max-num-seqs: 5}", ["engine.max-num-seqs", "did you mean engine.max_num_seqs?"]),
        ("server: {tensor_parallel_size: 1}", ["server.tensor_parallel_size", "did you mean engine.tensor_parallel"]),
        ("server: {xyz: 1}", ["server.xyz", "known here: host, port"]),
        ("engine: [1]", ["engine is a list", "mapping"]),
        ("- 1", ["the root is a list"]),
        ("a: b: c", ["not YAML"]),
        ("server: {port: 70000}", ["server.port", "65535", "70000"]),
        ("engine: {dtype: int3}", ["engine.dtype", "int3"]),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load_config(MODEL, file=file)
    for word in [str(file), *words]:
        assert word in str(refused.value)


def test_a_flag_out_of_its_limits_is_named_as_a_flag() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs") as refused:
        load_config({**MODEL, ("engine", "max_num_seqs"): 0})
    assert "got 0" in str(refused.value)


def test_keys_never_show_in_a_refusal() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config({**MODEL, ("router", "api_keys"): "hunter2-not-a-list"})
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in repr(load_config({**MODEL, ("router", "api_keys"): ["hunter2"]}))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(MODEL, file=tmp_path / "none.yaml")


@pytest.mark.parametrize(("host", "alone"), [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::", False)])
def test_loopback(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


@pytest.mark.parametrize("secret", ["", "not a long one"])
def test_a_secret_that_can_be_guessed_is_refused_and_not_shown(tmp_path: Path, secret: str) -> None:
    file = write(tmp_path, f"router: {{secret: '{secret}'}}")
    with pytest.raises(ConfigError, match="at least 32 characters") as refused:
        load_config(MODEL, file=file)
    assert str(file) in str(refused.value)
    assert "router.secret" in str(refused.value)
    assert "not a long one" not in str(refused.value)


def test_a_password_needs_a_redis_that_asks_for_it() -> None:
    given: dict[tuple[str, str], object] = {**MODEL, ("server", "redis_password_file"): "/etc/password"}
    with pytest.raises(ConfigError, match="--redis-url is embedded"):
        check_supported(load_config(given))
    check_supported(load_config({**given, ("server", "redis_url"): "redis://there"}))


def test_one_port_is_not_two() -> None:
    with pytest.raises(ConfigError, match="--metrics-port 8000"):
        check_supported(load_config({**MODEL, ("server", "metrics_port"): 8000}))


def test_the_password_of_redis_is_not_shown() -> None:
    config = load_config({**MODEL, ("server", "redis_url"): "redis://:hidden@there"})
    assert "hidden" not in repr(config)
    with pytest.raises(ConfigError) as refused:
        load_config({**MODEL, ("server", "redis_url"): ["redis://:hidden@there"]})
    assert "--redis-url" in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("given", [{("router", "api_keys"): ["k"]}, {("server", "allow_anonymous"): True}])
def test_open_hosts_need_a_key_or_a_word(given: dict[tuple[str, str], object]) -> None:
    exposed = {**MODEL, ("server", "host"): "0.0.0.0"}
    with pytest.raises(ConfigError, match="--allow-anonymous"):
        check_supported(load_config(exposed))
    check_supported(load_config({**exposed, **given}))


def test_default_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Tiny.gguf").touch()
    assert default_name(str(tmp_path / "Tiny.gguf")) == "Tiny"
    assert default_name("org/name") == "org/name"
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert default_name(".") == "tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_name("~/tiny") == "tiny"


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda t: st.dictionaries(st.text(), t), max_leaves=9)
)
def test_any_tree_is_accepted_or_refused_never_a_crash(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    import yaml

    file = tmp_path_factory.mktemp("any") / "shoal.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with suppress(ConfigError):
        load_config(MODEL, file=file)


SMALL = {("server", "smaller_model"): "some/small.gguf"}


def test_the_smaller_model_has_the_main_one_s_options() -> None:
    config = load_config({**MODEL, **SMALL, ("engine", "max_num_seqs"): 3, ("server", "replicas"): 4})
    _, small = parts(config)
    assert (small.engine.model, small.engine.max_num_seqs, small.replicas) == ("some/small.gguf", 3, 1)
    assert small.names == ("some/small.gguf",)


def test_a_ladder_falls_to_a_model_that_is_there(tmp_path: Path) -> None:
    file = write(tmp_path, "router: {ladder: [{load: 1.5, model: some/small.gguf}]}\n")
    check_supported(load_config({**MODEL, **SMALL}, file=file))
    with pytest.raises(ConfigError, match="--smaller-model"):
        check_supported(load_config(MODEL, file=file))
    with pytest.raises(ConfigError, match="served as 'some/model'"):
        check_supported(load_config({**MODEL, ("server", "smaller_model"): "some/model"}))


@pytest.mark.parametrize(
    ("flags", "threads"),
    [({}, 8), ({"replicas": 2}, 4), ({"replicas": 3}, 2), ({"replicas": 16}, 1), ({"smaller_model": "m"}, 4)],
)
def test_replicas_on_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], threads: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    on_cpu = {**MODEL, ("engine", "device"): "cpu", **{("server", name): value for name, value in flags.items()}}
    assert share_cores(load_config(on_cpu)).engine.num_threads == threads
    assert share_cores(load_config({**on_cpu, ("engine", "num_threads"): 5})).engine.num_threads == 5
    assert share_cores(load_config({**on_cpu, ("engine", "device"): "cuda"})).engine.num_threads is None
