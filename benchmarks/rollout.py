"""Tokens a second of each rollout engine, compared with this machine's limit.

    python benchmarks/rollout.py --model gpt2 --precision bf16 --batch 1 16 64
    python benchmarks/rollout.py --model tiny --engines cached --out benchmarks/results/rollout.csv

The floor is the least time: arithmetic over the rate of a large matrix product, or bytes over the memory's rate,
whichever takes longer; both rates are measured in the same run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from policylab.data.rollout import Prompt
from policylab.models.decoders.general import GeneralDecoder
from policylab.models.decoders.linear import Linear
from policylab.models.loading import LoadedModel
from policylab.models.policy import Policy
from policylab.models.scratch import from_scratch
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms

#: Random weights, because the cost of a token does not depend on them. SmolLM2-135M's and GPT-2's own sizes.
MODELS = {
    "tiny": ({"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 512}, 2048),
    "gpt2": ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024}, 50257),
    "smollm2": (
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        49152,
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENGINES = ("cached", "general", "generate")


@dataclass(frozen=True)
class Row:
    """One line of the table; each field is a column of the CSV."""

    model: str
    precision: str
    engine: str
    batch: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    seconds: float  #: median of the runs
    spread: float  #: slowest over fastest
    tokens_per_s: float
    floor_s: float
    share: float  #: floor over seconds
    gemm_gflops: float
    memory_gb_s: float


class Endless(Policy):
    """Ends only at a token that does not exist, so that all engines sample the same number of tokens."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded, None)
        self.eos_ids = (int(self.lm.config.vocab_size),)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = arguments(argv)
    torch.set_num_threads(chosen.threads)
    architecture, vocab = MODELS[chosen.model]
    loaded = from_scratch(
        name=chosen.model,
        tokenizer="tiny",
        architecture=architecture,
        vocab_size=vocab,
        seed=0,
        dtype="float32",
        attn_implementation="sdpa",
    )
    policy = Endless(loaded).eval()
    rates = measure_rates(policy, DTYPES[chosen.precision])
    print(
        f"{platform.processor() or platform.machine()}, {chosen.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}: {rates[0] / 1e9:.0f} GF/s, {rates[1] / 1e9:.1f} GB/s"
    )
    print(f"{chosen.model} {chosen.precision}, tokens/s (share of the floor)")
    print(f"{'batch':>6}{'floor':>12}" + "".join(f"{engine:>20}" for engine in chosen.engines))
    rows: list[Row] = []
    for batch in chosen.batch:
        rows += race(policy, chosen, batch, rates)
        of_batch = [row for row in rows if row.batch == batch]
        floor = batch * chosen.new_tokens / of_batch[0].floor_s
        cells = "".join(f"{f'{row.tokens_per_s:,.0f} ({row.share:.0%})':>20}" for row in of_batch)
        print(f"{batch:>6}{floor:>12,.0f}{cells}", flush=True)
    if chosen.out is not None:
        write(rows, chosen.out)
    print(
        json.dumps({"model": chosen.model, "precision": chosen.precision, "rows": [asdict(r) for r in rows]})
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="bf16: rollout.dtype")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument(
        "--group-size", type=int, default=4, help="completions of a prompt, at most the batch"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument(
        "--runs", type=int, default=3, help="timed runs of each engine, in turn, after a warm-up"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="a CSV to add rows to")
    chosen = parser.parse_args(argv)
    for name in ("group_size", "prompt_tokens", "new_tokens", "runs", "threads"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(chosen, name)}: at least 1")
    for batch in chosen.batch:
        if batch < 1 or batch % min(chosen.group_size, batch):
            parser.error(f"--batch {batch} is not a multiple of --group-size={chosen.group_size}")
    return chosen


def race(policy: Policy, chosen: argparse.Namespace, batch: int, rates: tuple[float, float]) -> Iterator[Row]:
    """Every engine on the same prompts, in turn."""
    group_size = min(chosen.group_size, batch)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 2000, (batch // group_size, chosen.prompt_tokens), generator=generator).tolist()
    prompts = [Prompt(n, "", tuple(tokens), None, ()) for n, tokens in enumerate(ids)]
    noise = uniforms(0, TRAIN, 0, range(batch), chosen.new_tokens)
    runs: dict[str, list[float]] = {engine: [] for engine in chosen.engines}
    for number in range(chosen.runs + 1):
        for engine, seconds in runs.items():
            with runner(engine, chosen.precision, chosen.new_tokens) as sample:
                start = time.perf_counter()
                rollout = sample(policy, prompts, group_size, noise)
                elapsed = time.perf_counter() - start
            assert int(rollout.lengths.sum()) == batch * chosen.new_tokens
            if number > 0:
                seconds.append(elapsed)
    floor = floor_seconds(policy, chosen, batch, len(prompts), rates)
    for engine, seconds in runs.items():
        median = statistics.median(seconds)
        yield Row(
            model=chosen.model,
            precision=chosen.precision,
            engine=engine,
            batch=batch,
            group_size=group_size,
            prompt_tokens=chosen.prompt_tokens,
            new_tokens=chosen.new_tokens,
            seconds=round(median, 4),
            spread=round(max(seconds) / min(seconds), 2),
            tokens_per_s=round(batch * chosen.new_tokens / median, 1),
            floor_s=round(floor, 5),
            share=round(floor / median, 3),
            gemm_gflops=round(rates[0] / 1e9, 1),
            memory_gb_s=round(rates[1] / 1e9, 1),
        )


@contextmanager
def runner(engine: str, precision: str, new_tokens: int) -> Iterator[Callable]:
    """``sample`` of an engine: ours, ours with the general decoder, or transformers' own loop."""
    low = precision == "bf16"
    if engine == "generate":
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            yield GenerateEngine(1.0, new_tokens).sample
        return
    sample = CachedEngine(1.0, new_tokens, "bfloat16" if low else None).sample
    if engine == "cached":
        yield sample
        return
    with patch("policylab.models.readers.padded.decoder_for", lambda lm, _: GeneralDecoder(lm)):
        yield sample


def floor_seconds(
    policy: Policy, chosen: argparse.Namespace, batch: int, prompts: int, rates: tuple[float, float]
) -> float:
    """Least seconds of a rollout, without attention's arithmetic, norms and sampling, which would add to it."""
    gemm, memory = rates
    config = policy.lm.config
    head = policy.lm.get_output_embeddings().weight.numel()
    weights = sum(p.numel() for p in policy.lm.parameters() if p.ndim == 2)
    tables = [m.weight for m in policy.lm.modules() if isinstance(m, torch.nn.Embedding)]
    body = weights - sum(table.numel() for table in tables)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * config.num_hidden_layers * kv_heads * head_dim * 4  # the cache is fp32
    size = DTYPES[chosen.precision].itemsize
    seconds = 2 * prompts * (chosen.prompt_tokens * body + head) / gemm
    for written in range(1, chosen.new_tokens):  # the first token comes with the prompt
        arithmetic = 2 * batch * (body + head) / gemm
        bytes_read = (body + head) * size + (prompts * chosen.prompt_tokens + batch * written) * kv_bytes
        seconds += max(arithmetic, bytes_read / memory)
    return seconds


@torch.no_grad()
def measure_rates(policy: Policy, dtype: torch.dtype) -> tuple[float, float]:
    """Flops a second of a large product, by the faster of the two libraries; bytes a second over as many bytes as
    the weights have (what fits a cache is read from there)."""
    x, weight = torch.randn(512, 1024), torch.randn(4096, 1024)
    low, cast, layer = x.to(dtype), weight.to(dtype), Linear(weight, None, dtype)
    product = min(fastest(lambda: low @ cast.T), fastest(lambda: layer(low)))
    numbers = torch.ones(sum(p.numel() * dtype.itemsize // 4 for p in policy.lm.parameters()))
    return 2 * 512 * 1024 * 4096 / product, numbers.numel() * 4 / fastest(numbers.sum)


def fastest(work: Callable[[], object], runs: int = 50) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write(rows: Sequence[Row], path: Path) -> None:
    """Appends the rows, and a header to a new file."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
