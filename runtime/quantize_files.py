"""The files of a checkpoint that `shoal quantize` makes, besides its weights: the folder, configs and tokenizer."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import processors

from .errors import ConfigError
from .gguf_tokenizer import build_tokenizer, read_tokenizer_data
from .safetensors_checkpoint import INDEX

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_OWN = {"config.json", INDEX}  # written anew
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def new_folder(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end, or is removed with all that is in it.

    num_bytes: about what will be written.

    Raises:
        ConfigError: something is there already, there is no room for it, or it cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder: name another one, or remove it")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {parent}")
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise ConfigError(f"--out {out}: about {num_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    partial = parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    except OSError as error:
        full = f"; about {num_bytes / 1e9:.2f} GB are needed" if error.errno in _NO_ROOM else ""
        raise ConfigError(f"--out {out}: {error.strerror or error}{full}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_companions(model: Path, folder: Path, config: dict[str, Any]) -> None:
    """config.json, and what belongs to the tokenizer: copied, or from a .gguf file made anew."""
    _write_json(folder / "config.json", config)
    if model.is_file():
        _write_gguf_tokenizer(model, folder, config)
        return
    for file in sorted(model.iterdir()):
        wanted = file.suffix in _COPIED or file.name.upper().startswith(_LEGAL)
        if wanted and file.name not in _OWN and file.is_file():
            shutil.copyfile(file, folder / file.name)  # follows links: in the hub's cache all files are links


def _write_gguf_tokenizer(model: Path, folder: Path, config: dict[str, Any]) -> None:
    data = read_tokenizer_data(model)
    backend = build_tokenizer(data)
    ids = {"bos_token": data.bos_id, "eos_token": data.eos_id, "unk_token": data.unk_id, "pad_token": data.pad_id}
    special = {name: data.tokens[id] for name, id in ids.items() if id is not None}
    before = [special["bos_token"]] if data.add_bos and "bos_token" in special else []
    after = [special["eos_token"]] if data.add_eos and "eos_token" in special else []
    if around := [(token, data.tokens.index(token)) for token in (*before, *after)]:
        # transformers goes by this; we go by the flags below.
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=around)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": data.add_bos,
        "add_eos_token": data.add_eos,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if data.chat_template is not None:
        tokenizer_config["chat_template"] = data.chat_template
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    ends = {"bos_token_id": data.bos_id, "eos_token_id": list(data.end_ids), "pad_token_id": data.pad_id}
    _write_json(folder / "generation_config.json", {key: value for key, value in ends.items() if value is not None})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
