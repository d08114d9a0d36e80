"""The tokenizer inside a GGUF file, as data and as a `tokenizers.Tokenizer` (start-up of station 4).

Two kinds: byte-level BPE (GGUF calls it "gpt2"), split first by one of a few regular expressions named by `pre`, and
SentencePiece's BPE ("llama"), whose merges are not in the file and follow from the vocabulary. What is added before and
after a text (`add_bos`, `add_eos`) is left to the caller: the tokenizer has no post-processor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .errors import CheckpointError
from .gguf_file import GGUFFile
from .gguf_names import Metadata

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"

# How the vocabularies' authors split text before merging; the expressions are part of the models.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "falcon3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "pixtral": _LLAMA3, "tekken": _TEKKEN, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "megrez": _QWEN2,
}  # fmt: skip
_PLAIN = ("default", "gpt-2", "phi-2", "jina-es", "jina-de", "roberta-bpe")
_DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_STARTS_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")


@dataclass(frozen=True, slots=True)
class GGUFTokenizerData:
    """What the file says about its tokenizer. Ids not given are None; `types` is one of llama.cpp's a token."""

    path: Path
    architecture: str
    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer."""
        return tuple(dict.fromkeys(id for id in (self.eos_id, self.eot_id) if id is not None))


def read_tokenizer_data(path: Path) -> GGUFTokenizerData:
    """Raises CheckpointError where the file is unsound or has no tokenizer that can be built."""
    metadata = Metadata(GGUFFile(path).metadata, path)
    prefix = "tokenizer.ggml."
    kind, pre = metadata.get(f"{prefix}model", str), metadata.get(f"{prefix}pre", str, "default")
    tokens = metadata.values.get(f"{prefix}tokens")
    merges = metadata.values.get(f"{prefix}merges", [])
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError(f"{path}: expected lists of strings as {prefix}tokens and {prefix}merges")

    def numbers(name: str) -> np.ndarray:
        values = metadata.values.get(prefix + name)
        if values is None:
            return np.zeros(len(tokens))
        if not isinstance(values, np.ndarray) or len(values) != len(tokens):
            raise CheckpointError(f"{path}: expected {len(tokens)} numbers as {prefix}{name}, one a token")
        return values

    def id_of(name: str) -> int | None:
        key = f"{prefix}{name}_token_id"
        id = metadata.get(key, int) if key in metadata.values else None
        if id is not None and not 0 <= id < len(tokens):
            raise CheckpointError(f"{path}: {key}: expected an id below {len(tokens)}, found {id}")
        return id

    sentencepiece = kind == "llama"
    template_key = "tokenizer.chat_template"
    return GGUFTokenizerData(
        path=path,
        architecture=metadata.architecture,
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=[int(type) for type in numbers("token_type").tolist()],
        scores=numbers("scores").tolist(),
        merges=merges,
        bos_id=id_of("bos"),
        eos_id=id_of("eos"),
        eot_id=id_of("eot"),
        unk_id=id_of("unknown"),
        pad_id=id_of("padding"),
        add_bos=metadata.get(f"{prefix}add_bos_token", bool, sentencepiece or pre in _STARTS_WITH_BOS),
        add_eos=metadata.get(f"{prefix}add_eos_token", bool, False),
        add_space_prefix=metadata.get(f"{prefix}add_space_prefix", bool, sentencepiece),
        chat_template=metadata.get(template_key, str) if template_key in metadata.values else None,
    )


def build_tokenizer(data: GGUFTokenizerData) -> Tokenizer:
    """The tokenizer; control tokens are special added tokens, user-defined ones added tokens."""
    try:
        match data.kind:
            case "gpt2":
                tokenizer = _byte_level(data)
            case "llama":
                tokenizer = _sentencepiece(data)
            case other:
                raise CheckpointError(f"{data.path}: tokenizer model {other!r} is not supported: expected gpt2, llama")
        _add_whole(tokenizer, data)
    except CheckpointError:
        raise
    except Exception as error:  # what tokenizers raises has no type of its own
        raise CheckpointError(f"{data.path}: tokenizers refuses its vocabulary: {error}") from error
    return tokenizer


def _add_whole(tokenizer: Tokenizer, data: GGUFTokenizerData) -> None:
    """Tokens that text is searched for before anything else."""
    typed = list(zip(data.tokens, _spelled(data), data.types, strict=True))
    # A run of spaces is left to the merges: in its own spelling it would never be found.
    own = [token for token, spelled, kind in typed if kind == _USER_DEFINED and token == spelled]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, _, k in typed if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])


def _byte_level(data: GGUFTokenizerData) -> Tokenizer:
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in data.merges)]
    vocab = {token: id for id, token in enumerate(data.tokens)}
    # Vocabularies made for tiktoken hold words that no chain of merges reaches.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_SPLITS.get(data.pre) is _LLAMA3))
    if data.pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[data.pre]), behavior="isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    elif data.pre in _DIGIT_BY_DIGIT:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    elif data.pre in _PLAIN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        known = ", ".join(sorted((*_SPLITS, *_DIGIT_BY_DIGIT, *_PLAIN)))
        raise CheckpointError(f"{data.path}: pre-tokenizer {data.pre!r} is not supported: expected one of {known}")
    if _SPLITS.get(data.pre) is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(data: GGUFTokenizerData) -> Tokenizer:
    tokens = _spelled(data)
    vocab = {token: id for id, token in enumerate(tokens)}
    unknown = None if data.unk_id is None else tokens[data.unk_id]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=_implied_merges(data, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    spaces: normalizers.Normalizer = normalizers.Replace(" ", _SPACE)
    undo: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if data.add_space_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _spelled(data: GGUFTokenizerData) -> list[str]:
    """Tokens as the normalised text spells them: gemma's runs of spaces stand in the file as real spaces."""
    if data.kind != "llama":
        return data.tokens
    return [_SPACE * len(token) if " " in token and not token.strip(" ") else token for token in data.tokens]


def _implied_merges(data: GGUFTokenizerData, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two, best token first: by score, but gemma's were merged in the order of ids."""
    scores = np.zeros(len(data.tokens)) if data.architecture.startswith("gemma") else np.array(data.scores)
    rank = np.argsort(-scores, kind="stable").argsort()
    return [
        merge
        for token, id in sorted(vocab.items(), key=lambda item: int(rank[item[1]]))
        for merge in _halves(token, vocab)
    ]


def _halves(token: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The longest left half first."""
    for at in range(len(token) - 1, 0, -1):
        left, right = token[:at], token[at:]
        if left in vocab and right in vocab:
            yield left, right
