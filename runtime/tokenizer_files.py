"""A model's tokenizer as its files have it: a folder of Hugging Face's, or a GGUF file (start-up of station 4)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from .errors import CheckpointError
from .gguf_file import GGUFFile
from .gguf_tokenizer import build_tokenizer, read_tokenizer_data
from .tokenizer import Tokenizer, TokenizerInfo

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Files that transformers can make a tokenizer of where there is no tokenizer.json.
_OTHER_FORMATS = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_tokenizer(model: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder, a hub id in the local cache, or a .gguf file; None where there are no files of one.

    Raises:
        CheckpointError: a file is there and cannot be read. ConfigError: there is no such model.
    """
    path = Path(model)
    if not path.exists():
        from .hub import resolve_model

        path = resolve_model(str(model))
    return _from_gguf(path) if path.is_file() else _from_folder(path)


def _from_folder(folder: Path) -> Tokenizer | None:
    backend = _backend(folder)
    if backend is None:
        return None
    files = _Files.read(folder)
    _add_missing(backend, files.tokenizer)
    special = _special_tokens(files)
    template = _chat_template(folder, files.tokenizer)
    return Tokenizer(
        backend,
        TokenizerInfo(
            special=special,
            eos_ids=_eos_ids(backend, special, files),
            add_bos=_flag(files.tokenizer, "add_bos_token", "add_eos_token"),
            add_eos=_flag(files.tokenizer, "add_eos_token", "add_bos_token"),
            chat_template=template,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Files:
    """The JSON files beside the vocabulary; {} for those that are not there."""

    tokenizer: dict[str, Any]
    special: dict[str, Any]
    generation: dict[str, Any]
    model: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Files:
        names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
        return cls(*(_json(folder / name) for name in names))


def _backend(folder: Path) -> tokenizers.Tokenizer | None:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise CheckpointError(f"{file}: cannot be read as a tokenizer: {error}") from error
    if not any((folder / name).exists() for name in _OTHER_FORMATS):
        return None
    # Seconds to import, so only here: these formats are read by what is in transformers alone.
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizers.Tokenizer.from_str(backend.backend_tokenizer.to_str())
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot read its tokenizer: {error}") from error


def _add_missing(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Some models name added tokens in tokenizer_config.json alone; their ids must come out as listed."""
    listed = sorted((int(id), token) for id, token in config.get("added_tokens_decoder", {}).items())
    for id, token in listed:
        if backend.id_to_token(id) is not None or id != backend.get_vocab_size():
            continue
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
        added = tokenizers.AddedToken(token["content"], **flags)
        (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])


def _special_tokens(files: _Files) -> dict[str, str]:
    """The named special tokens; the config's win over the map's."""
    found: dict[str, str] = {}
    for source in (files.special, files.tokenizer):
        for name in _SPECIAL:
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _eos_ids(backend: tokenizers.Tokenizer, special: dict[str, str], files: _Files) -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's, and those that the model's configs list."""
    found = [backend.token_to_id(special.get("eos_token", ""))]
    for source in (files.generation, files.model, files.model.get("text_config", {})):
        value = source.get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(id for id in found if isinstance(id, int)))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default one of: chat_template.jinja, chat_template.json, tokenizer_config.json's."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = _json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _flag(config: dict[str, Any], name: str, other: str) -> bool | None:
    """One of the two given says both, as transformers has it: then the post-processor has no say."""
    return bool(config.get(name, False)) if name in config or other in config else None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _from_gguf(file: Path) -> Tokenizer | None:
    if "tokenizer.ggml.model" not in GGUFFile(file).metadata:
        return None
    data = read_tokenizer_data(file)
    ids = {"bos_token": data.bos_id, "eos_token": data.eos_id, "unk_token": data.unk_id, "pad_token": data.pad_id}
    return Tokenizer(
        build_tokenizer(data),
        TokenizerInfo(
            special={name: data.tokens[id] for name, id in ids.items() if id is not None},
            eos_ids=data.end_ids,
            add_bos=data.add_bos,
            add_eos=data.add_eos,
            chat_template=data.chat_template,
        ),
    )
