"""How well a model predicts a text, and how far another one is from it: perplexity, KL divergence, error of the logits.

Both go through the decoder with the right text as their input (teacher forcing), one layer in memory at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import ConfigError
from .layerwise import AsDense, LayerwiseRun, cut_text
from .models.spec import ModelSpec
from .progress import Progress
from .rank import open_checkpoint
from .tokenizer import Tokenizer
from .tokenizer_files import load_tokenizer

LOGITS = 1 << 24  # logits of a model that are held at once


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model on a text of `num_tokens` predicted tokens."""

    perplexity: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same text, token by token.

    kl_*: of the other model's distribution from the first one's, in nats. error_*: the norm of the difference of two
    rows of logits over the norm of the first one's row, both with their mean taken off (it changes no probability).
    agreement: the share of tokens at which both think the same token the most likely.
    """

    perplexity: float
    other_perplexity: float
    num_tokens: int
    kl_mean: float
    kl_max: float
    error_mean: float
    error_max: float
    agreement: float

    @property
    def loss(self) -> float:
        """By how much the other's perplexity is worse: 0.01 is one per cent."""
        return self.other_perplexity / self.perplexity - 1


def shipped_text(name: str) -> str:
    """A text that comes with the package: "calibration" or "evaluation"."""
    return (Path(__file__).parent / "corpus" / f"{name}.txt").read_text(encoding="utf-8")


def need_tokenizer(path: Path) -> Tokenizer:
    """Raises ConfigError: the model has none."""
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ConfigError(f"model {str(path)!r} has no tokenizer: no text can be run through it")
    return tokenizer


def measure(path: Path, text: str, *, device: torch.device) -> Prediction:
    """The perplexity of the model at `path` on a text."""
    found = compare(path, path, text, device=device)
    return Prediction(found.perplexity, found.num_tokens)


def compare(path: Path, other: Path, text: str, *, device: torch.device) -> Comparison:
    """Hold a model against another one of the same vocabulary, by the first one's tokenizer. Shows progress.

    Raises:
        ConfigError: their vocabularies differ, or the model has no tokenizer. CheckpointError: one cannot be read.
    """
    checkpoints = [AsDense(open_checkpoint(place)) for place in dict.fromkeys((path, other))]
    specs = [ModelSpec.from_config(checkpoint.config) for checkpoint in checkpoints]
    sizes = {(spec.vocab_size, spec.num_layers) for spec in specs}
    if len(sizes) > 1:
        raise ConfigError(f"{path} and {other} are not the same model: (vocabulary, layers) are {sorted(sizes)}")
    chunks = cut_text(need_tokenizer(path), text, max_len=min(spec.max_len for spec in specs))
    runs = [LayerwiseRun(spec, chunks, device=device) for spec in specs]
    num_layers = specs[0].num_layers
    with Progress("Evaluating", total=num_layers + len(chunks), unit="parts") as progress:
        for layer in range(num_layers):
            for run, checkpoint in zip(runs, checkpoints, strict=True):
                run.advance(checkpoint, layer)
            progress.advance()
        tally = _Tally()
        for index, ids_T in enumerate(chunks):
            for rows in _slices(len(ids_T) - 1, max(1, LOGITS // specs[0].vocab_size)):
                targets_R = ids_T[rows.start + 1 : rows.stop + 1].to(device)
                tally.add(targets_R, [run.logits(index, rows) for run in runs])
            progress.advance()
    return tally.result()


def _slices(count: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, count)) for at in range(0, count, step)]


class _Tally:
    """What all rows add up to. Given one model alone, it is held against itself."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # [5, R] a slice: both negative log-likelihoods, KL, error, agreement

    def add(self, targets_R: Tensor, logits: Sequence[Tensor]) -> None:
        one_RV, other_RV = logits[0], logits[-1]
        log_p_RV, log_q_RV = one_RV.log_softmax(-1), other_RV.log_softmax(-1)
        kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).clamp_(min=0)
        one_RV, other_RV = (x - x.mean(-1, keepdim=True) for x in (one_RV, other_RV))
        error_R = (other_RV - one_RV).norm(dim=-1) / one_RV.norm(dim=-1).clamp(min=1e-12)
        agrees_R = log_p_RV.argmax(-1) == log_q_RV.argmax(-1)
        loss_R, other_loss_R = (-x.gather(1, targets_R[:, None])[:, 0] for x in (log_p_RV, log_q_RV))
        self._rows.append(torch.stack([loss_R, other_loss_R, kl_R, error_R, agrees_R.float()]).double().cpu())

    def result(self) -> Comparison:
        loss, other_loss, kl, error, agrees = torch.cat(self._rows, 1)
        return Comparison(
            perplexity=math.exp(loss.mean()),
            other_perplexity=math.exp(other_loss.mean()),
            num_tokens=len(loss),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            error_mean=float(error.mean()),
            error_max=float(error.max()),
            agreement=float(agrees.mean()),
        )
