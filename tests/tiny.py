"""Tokenizers and a model small enough to reason about, for tests of anything that speaks in text."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from shoal.runtime.tokenizer import Tokenizer, TokenizerInfo

BOS, EOS, START, END = 256, 257, 258, 259  # ids of the byte tokenizer's special tokens
SPECIAL = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_model(folder: Path, *, max_len: int = 8192, seed: int = 3) -> Path:
    """The folder, with a random llama in it that speaks the byte tokenizer's tokens. seed: of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=272,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=max_len,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token i is byte i (0 to 255); behind them the special tokens. 260 tokens, byte-level as GPT-2's."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    return _byte_level(vocabulary, [])


def merging_tokenizer() -> tokenizers.Tokenizer:
    """The byte tokenizer with some pairs merged: tokens of several letters, and halves of characters."""
    letters = _letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    merges = [
        (letters[a], letters[b]) for a, b in (b"th", b"in", b"he", b"an", b" t", b"ab", "é".encode(), b"\xf0\x9f")
    ]
    merges += [("Ġt", "he"), ("in", "g")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    return _byte_level(vocabulary, merges)


def fallback_tokenizer() -> tokenizers.Tokenizer:
    """As sentencepiece's with byte fallback: `▁` for a space, `<0x00>` and so on for what is in no other token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnorstw,.é日"]
    merges = [("h", "e"), ("▁", "w"), ("▁w", "o")]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    out = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    out.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    out.add_special_tokens(["<unk>", "<s>", "</s>"])
    return out


def byte_text() -> Tokenizer:
    """The byte tokenizer as the runtime has it, with an end and a chat template."""
    special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    return Tokenizer(byte_tokenizer(), TokenizerInfo(special=special, eos_ids=(EOS,), chat_template=TEMPLATE))


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    out = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(list(SPECIAL))
    return out


def _letters() -> list[str]:
    """The letter that byte-level BPE has for each byte."""
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    plain = {byte: encode(chr(byte))[0][0] for byte in range(128)}
    # The letters for 128 to 255 come in order of the byte: those that are printable in Latin-1, else from U+0100 on.
    spare = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(plain.values()))
    high = {ord(letter): letter for letter in spare if ord(letter) < 256}
    rest = iter(letter for letter in spare if ord(letter) >= 256)
    return [plain[b] if b < 128 else high[b] if b in high else next(rest) for b in range(256)]
