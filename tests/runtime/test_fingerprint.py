"""Two models that could answer differently have different digests."""

from pathlib import Path

import pytest

from shoal.runtime import fingerprint
from shoal.runtime.fingerprint import model_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return model


def test_equal_models_are_equal_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("words decide nothing")
    assert model_digest(copy, "bfloat16") == model_digest(folder, "bfloat16")


def test_every_difference_shows(folder: Path) -> None:
    seen = {model_digest(folder), model_digest(folder, "bfloat16"), model_digest(folder, "b", "float16")}
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    seen.add(model_digest(folder))
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    seen.add(model_digest(folder))
    (folder / "config.json").rename(folder / "other.json")
    seen.add(model_digest(folder))
    weights.write_bytes(content[:-1])
    seen.add(model_digest(folder))
    assert len(seen) == 7


def test_large_files_are_looked_at_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SAMPLES", 8)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 16)
    file = tmp_path / "model.gguf"
    content = bytes(1000)
    file.write_bytes(content)
    plain = model_digest(file)
    for at in (0, 15, 985, 999):
        file.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
        assert model_digest(file) != plain
    file.write_bytes(bytes(1001))
    assert model_digest(file) != plain
