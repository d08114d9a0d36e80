"""A spec is read once on a machine, and anew where anything that decides it has changed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.runtime.errors import ConfigError
from shoal.runtime.models import spec_cache
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.models.spec_cache import remembered_spec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
}
SECOND_START = """
import sys
from shoal.runtime.models import spec_cache
from pathlib import Path
spec_cache.private_folder = lambda: Path(sys.argv[1])
spec = spec_cache.remembered_spec(eval(sys.argv[2]))
print(spec.hidden_size, spec.layers[1].rope is not None, "transformers" in sys.modules)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(spec_cache, "private_folder", lambda: tmp_path)
    return tmp_path


def test_the_second_start_does_without_transformers(folder: Path) -> None:
    assert remembered_spec(CONFIG) == ModelSpec.from_config(CONFIG)
    command = [sys.executable, "-P", "-c", SECOND_START, str(folder), repr(CONFIG)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["64", "True", "False"]


def test_what_is_remembered_is_the_same(folder: Path) -> None:
    assert [remembered_spec(CONFIG), remembered_spec(CONFIG)] == [ModelSpec.from_config(CONFIG)] * 2
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(("change", "max_len"), [({"rope_theta": 1e4}, None), ({}, 64), ({"hidden_size": 128}, None)])
def test_another_config_is_read_anew(folder: Path, change: dict[str, Any], max_len: int | None) -> None:
    remembered_spec(CONFIG)
    changed = CONFIG | change
    assert remembered_spec(changed, max_len=max_len) == ModelSpec.from_config(changed, max_len=max_len)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, b"\x81"])
def test_a_damaged_file_is_written_anew(folder: Path, damage: bytes) -> None:
    spec = remembered_spec(CONFIG)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert remembered_spec(CONFIG) == spec
    assert file.read_bytes() == whole


def test_a_config_that_is_refused_is_refused_each_time(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="num_key_value_heads"):
            remembered_spec(CONFIG | {"num_key_value_heads": 3})
    assert not list(folder.iterdir())


def test_where_nothing_can_be_kept_it_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_cache, "private_folder", lambda: tmp_path / "gone")
    assert remembered_spec(CONFIG) == ModelSpec.from_config(CONFIG)
