"""What GGUF's kinds of blocks cost on this machine: memory of the weights, tokens a second, in one table.

    python benchmarks/formats.py [--formats BF16,Q8_0,Q6_K,Q5_K,Q4_K,Q4_K_M] [--batches 1,8] [--tokens 64] [--rounds 3]
                                  [--threads N]

A llama of 138 million random weights whose rows are all whole K-quant blocks; Q4_K_M is llama.cpp's mixture: Q4_K, but
Q6_K for the vocabulary and, in half of the layers, for attn_v and ffn_down. Rounds take turns, the best one counts.
With one thread, as is best on a busy machine, CPU time is taken: others do not stretch it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from shoal.runtime.build import build_replica
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest, SamplingParams

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 768, 2048, 16, 12, 4, 49152, 512
HALVES = {  # bytes of a block at which it has float16 numbers
    "Q8_0": (0,), "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82), "Q5_0": (0,),
    "Q5_1": (0, 2), "Q4_0": (0,), "Q4_1": (0, 2),
}  # fmt: skip
MORE_BITS = ("token_embd", "attn_v", "ffn_down")  # in Q4_K_M


def random_tensor(rng: np.random.Generator, format: str, rows: int, columns: int) -> np.ndarray:
    if format == "BF16":
        bits = (rng.standard_normal((rows, columns), np.float32) * 0.02).view(np.uint32)
        return (bits >> 16).astype(np.uint16).view(np.uint8)
    length, size = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    blocks = rng.integers(0, 256, (rows, columns // length, size), dtype=np.uint8)
    scale = rng.uniform(1e-6, 2e-5, (rows, columns // length, 1)).astype(np.float16)
    for at in HALVES[format]:
        blocks[..., at : at + 2] = scale.view(np.uint8).reshape(*scale.shape[:2], 2)
    return blocks.reshape(rows, -1)


def format_of(mixture: str, layer: int, part: str) -> str:
    if mixture != "Q4_K_M":
        return mixture
    return "Q6_K" if part in MORE_BITS and layer % 2 == 0 else "Q4_K"


def write_model(path: Path, mixture: str) -> None:
    rng, writer = np.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    dim = HIDDEN // HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (KV_HEADS * dim, HIDDEN), "attn_v": (KV_HEADS * dim, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, MLP)}
    parts = [(0, "token_embd", "token_embd", (VOCAB, HIDDEN))]
    parts += [(i, f"blk.{i}.{part}", part, shape) for i in range(LAYERS) for part, shape in shapes.items()]
    for layer, name, part, shape in parts:
        format = format_of(mixture, layer, part)
        values = random_tensor(rng, format, *shape)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=GGMLQuantizationType[format])
    norms = ["output_norm", *(f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens_a_second(engine: Engine, clock: Callable[[], float], *, batch: int, tokens: int) -> float:
    """Of decoding alone: from the first step that gave every sequence a token."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for i in range(batch):
        engine.add(GenerationRequest(id=str(i), prompt=[1000 + i, 5, 7, 9], params=params, seed=0))
    given, began, at = 0, 0.0, 0
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            given += len(event.tokens)
        if began == 0.0 and given >= batch:
            began, at = clock(), given
    return (given - at) / (clock() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="BF16,Q8_0,Q6_K,Q5_K,Q4_K,Q4_K_M")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="1: CPU time is taken")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    engines: dict[str, Engine] = {}
    memory: dict[str, int] = {}
    best: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for format in options.formats.split(","):
            path = Path(folder) / f"{format}.gguf"
            write_model(path, format)
            fields = {"device": "cpu", "dtype": "bfloat16", "kv_cache_memory_gb": 0.1, "num_threads": options.threads}
            replica = build_replica(EngineConfig(model=str(path), max_num_seqs=max(batches), **fields))
            engines[format] = replica.engine
            memory[format] = int(replica.engine.ranks()[0].details["weight_bytes"])
        for _ in range(options.rounds):
            for format, engine in engines.items():
                for batch in batches:
                    speed = tokens_a_second(engine, clock, batch=batch, tokens=options.tokens)
                    best[format, batch] = max(best.get((format, batch), 0.0), speed)
    print("format    weights MB" + "".join(f"  batch {batch:3d}" for batch in batches) + "   (tok/s)")
    for format, engine in engines.items():
        engine.close()
        speeds = "".join(f"{best[format, batch]:11.1f}" for batch in batches)
        print(f"{format:8s}{memory[format] / 1e6:12.1f}{speeds}")


if __name__ == "__main__":
    main()
