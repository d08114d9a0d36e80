"""Guessing on a real model: tokens a second with no guesses, n-grams and a draft model, in one run.

    python benchmarks/speculation.py [--batches 1,4] [--tokens 96] [--rounds 2] [--targets q4,bf16] [--threads N]

Target q4 is SmolLM2-135M as its file has it, in 4 bits; its draft is its own first layers with its head. Target bf16
is the same model dequantised; its draft is the file. Half of the prompts ask to repeat a text, half to write one, and
answers are greedy. Rounds take turns, and the best one counts; prompts are in the prefix cache. With one thread, as is
best on a busy machine, CPU time is taken: others do not stretch it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from shoal.cluster.demo import need_demo_model
from shoal.runtime import LLM, SamplingParams

DRAFT_LAYERS = (8, 20)
REPORT = (
    "The harbour office counted 412 ships in March, 38 more than a year before. Most of them carried grain; the rest "
    "brought timber, salt and machine parts. Two were held back because their papers were incomplete, and one because "
    "of a leak."
)
PROMPTS = [
    f"Repeat this text exactly, but write April instead of March:\n{REPORT}",
    "Write a short story about a lighthouse keeper and a storm.",
    f"Copy the following report word for word:\n{REPORT}",
    "Explain to a child why the sky is blue.",
]


def rewrite(source: Path, target: Path, *, layers: int | None = None, dense: bool = False) -> Path:
    """The file with its first layers only, or with its matrices in bfloat16."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value: Any = field.contents()
        if name == "llama.block_count" and layers is not None:
            value = layers
        of_items = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], of_items)
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if layers is not None and parts[0] == "blk" and int(parts[1]) >= layers:
            continue
        data, kind = np.asarray(tensor.data), tensor.tensor_type
        if dense and kind is not GGMLQuantizationType.F32:
            data, kind = quantize(dequantize(data, kind), GGMLQuantizationType.BF16), GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@dataclass
class Guessing:
    """One way to guess at one target, and the best it came to."""

    name: str
    llm: LLM
    clock: Callable[[], float]
    best: dict[int, float]
    said: list[list[int]] | None = None

    def run(self, batch: int, tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        chats = [[{"role": "user", "content": prompt}] for prompt in (PROMPTS * batch)[: max(batch, len(PROMPTS))]]
        self.said, began = [], self.clock()
        for at in range(0, len(chats), batch):
            outputs = self.llm.chat(chats[at : at + batch], params, progress=False)
            self.said += [output.outputs[0].token_ids for output in outputs]
        speed = sum(map(len, self.said)) / (self.clock() - began)
        self.best[batch] = max(self.best.get(batch, 0.0), speed)

    def acceptance(self) -> str:
        stats = self.llm.stats()
        if not stats.spec_drafts:
            return "          -"
        return f"{stats.acceptance_length:5.2f} {stats.spec_accepted_tokens / stats.spec_drafted_tokens:5.0%}"


def measure(model: Path, drafts: dict[str, str | None], options: argparse.Namespace) -> list[Guessing]:
    batches = [int(batch) for batch in options.batches.split(",")]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    made = []
    for name, draft in drafts.items():
        fields = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_gb": 0.2, "num_threads": options.threads}
        made.append(Guessing(name, LLM(str(model), device="cpu", speculative_model=draft, **fields), clock, {}))
    for _ in range(options.rounds + 1):  # the first reads the prompts
        for guessing in made:
            for batch in batches:
                guessing.run(batch, options.tokens)
    for guessing in made:
        speeds = "".join(f"{guessing.best[batch]:9.1f}" for batch in batches)
        same = sum(a == b for a, b in zip(guessing.said or [], made[0].said or [], strict=True))
        line = f"{guessing.name:24s}{guessing.acceptance()}{speeds}   {same}/{len(guessing.said or [])} as without"
        print(line, flush=True)
        guessing.llm.close()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--targets", default="q4,bf16")
    parser.add_argument("--threads", type=int, help="1: CPU time is taken")
    options = parser.parse_args()
    file = need_demo_model()
    print("target, guesses by      length right   tok/s at batch " + options.batches)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "q4" in options.targets:
            first = {f"q4, first {n} layers": str(rewrite(file, folder / f"{n}.gguf", layers=n)) for n in DRAFT_LAYERS}
            measure(file, {"q4, none": None, "q4, ngram": "ngram", **first}, options)
        if "bf16" in options.targets:
            dense = rewrite(file, folder / "dense.gguf", dense=True)
            measure(dense, {"bf16, none": None, "bf16, ngram": "ngram", "bf16, the q4 file": str(file)}, options)


if __name__ == "__main__":
    main()
