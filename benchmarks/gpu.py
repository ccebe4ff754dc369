"""Measurements on one GPU, in parts; each figure is saved at once. `benchmarks/gpu.sh` runs all.

    python benchmarks/gpu.py rates decode syncs tf32 runs --out benchmarks/results/gpu
    python benchmarks/gpu.py decode --models gpt2 --batch 16
    python benchmarks/gpu.py --device cpu --quick          the same code on a CPU, to see that it runs

Models have random weights, because the cost of a token does not depend on them. Parts:

rates      bytes a second of a copy, operations a second of large products in fp32, TF32 and bf16
decode     tokens a second of our engine and of Hugging Face's `generate` (static cache), compared with the floor: the
           weights and the cache read once a step, or the arithmetic, whichever takes longer
syncs      how often the CPU waits for the GPU, per sampled position
tf32       how much log-probs and gradients change when fp32 products may use TF32
runs       peak bytes of a run, compared with ``plan=true``, and seconds of an iteration's phases
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import GenerationConfig

import faithfulness
from policylab.cli.logs import silence_noise
from policylab.config import resolvers
from policylab.data.rollout import Prompt
from policylab.distributed.machine import cpu_name
from policylab.models.policy import Policy
from policylab.models.scratch import from_scratch
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.runs.environment import git_state, package_versions
from race.weights import ARCHITECTURES
from rollout import Endless

ROOT = Path(__file__).parents[1]
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 512}, 2048),
    "gpt2": ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024}, 50257),
    "llama": (ARCHITECTURES["llama"], 151936),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_TOKENS, GROUP = 64, 4
#: Runs of the part `runs`: name, model, overrides.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ppo": ("gpt2", ("algo=ppo",)),
    "ppo-separate": ("gpt2", ("algo=ppo", "algo/critic=separate")),
    "grpo-bf16-mixed": ("gpt2", ("algo=grpo", "hardware.precision=bf16-mixed")),
    "grpo-lora": ("gpt2", ("algo=grpo", "model/adapter=lora")),
    "grpo-llama-bf16-mixed": ("llama", ("algo=grpo", "hardware.precision=bf16-mixed")),
    "grpo-llama-bf16-true": ("llama", ("algo=grpo", "hardware.precision=bf16-true")),
}


class Bench:
    """The device, the size of the measurements, and the file for the figures."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.device = torch.device(chosen.device)
        self.quick = chosen.quick
        self.models = ["tiny"] if chosen.quick else chosen.models
        self.batches = [4] if chosen.quick else chosen.batch
        self.new_tokens = 8 if chosen.quick else 128
        self.runs = 1 if chosen.quick else 3
        self.file = None if chosen.out is None else chosen.out / "figures.csv"
        cuda = self.device.type == "cuda"
        self.about = {
            "device": torch.cuda.get_device_name() if cuda else cpu_name(),
            "torch": package_versions()["torch"],
            "transformers": package_versions()["transformers"],
            "commit": str(git_state(ROOT)["commit"])[:10],
            "date": datetime.date.today().isoformat(),
        }

    def say(self, part: str, case: str, quantity: str, value: float, unit: str) -> None:
        """Prints a figure and adds it to the file."""
        row = {"part": part, "case": case, "quantity": quantity, "value": f"{value:.4g}", "unit": unit}
        print(f"{part:10} {case:34} {quantity:28} {value:12,.4g} {unit}", flush=True)
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.file.exists()
        with self.file.open("a", newline="") as out:
            writer = csv.DictWriter(out, [*row, *self.about], lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row | self.about)

    def seconds(self, work: Callable[[], object], runs: int | None = None) -> float:
        """Median seconds of ``work``, after one warm-up run."""
        laps = []
        for _ in range((runs or self.runs) + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            laps.append(time.perf_counter() - start)
        return statistics.median(laps[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def policy(self, model: str, dtype: str = "float32") -> Policy:
        architecture, vocabulary = MODELS[model]
        loaded = from_scratch(
            name=model,
            tokenizer="tiny",
            architecture=architecture,
            vocab_size=vocabulary,
            seed=0,
            dtype=dtype,
            attn_implementation="sdpa",
        )
        return Endless(loaded).eval().to(self.device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 products may round their factors to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measured_rates(bench: Bench) -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a large product, on random numbers."""
    gib, n = (2**24, 256) if bench.quick else (2**30, 8192)
    x = torch.empty(gib // 4, device=bench.device).normal_()
    y = torch.empty_like(x)
    found = {"bytes": 2 * gib / bench.seconds(lambda: y.copy_(x), 10)}
    del x, y
    for name, dtype, fast in (
        ("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", torch.bfloat16, False),
    ):  # fmt: skip
        a = torch.randn(n, n, device=bench.device, dtype=dtype)
        b = torch.randn(n, n, device=bench.device, dtype=dtype)
        with tf32(fast):
            found[name] = 2 * n**3 / bench.seconds(lambda a=a, b=b: a @ b, 10)
    return found


def rates(bench: Bench) -> None:
    for name, value in measured_rates(bench).items():
        if name == "bytes":
            bench.say("rates", "copy", "memory", value / 1e9, "GB/s")
        else:
            bench.say("rates", name, "product", value / 1e12, "TFLOP/s")


def prompts_of(bench: Bench, policy: Policy, batch: int) -> tuple[list[Prompt], int]:
    """Distinct prompts of random ids, and how many completions of each make the batch."""
    group = min(GROUP, batch)
    generator = torch.Generator().manual_seed(0)
    width = 8 if bench.quick else PROMPT_TOKENS
    ids = torch.randint(1, policy.lm.config.vocab_size, (batch // group, width), generator=generator)
    return [Prompt(n, "", tuple(row), None, ()) for n, row in enumerate(ids.tolist())], group


def floor_seconds(
    policy: Policy, batch: int, width: int, new: int, size: int, rate: dict[str, float]
) -> float:
    """Least seconds of a rollout's decoding steps: weights and cache read once a step, or the products' arithmetic."""
    config = policy.lm.config
    head = policy.lm.get_output_embeddings().weight.numel()
    tables = {
        id(m.weight): m.weight.numel() for m in policy.lm.modules() if isinstance(m, torch.nn.Embedding)
    }
    weights = sum(p.numel() for p in policy.lm.parameters() if p.ndim == 2)
    read = weights - sum(tables.values()) + head
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv = 2 * config.num_hidden_layers * kv_heads * config.hidden_size // config.num_attention_heads * size
    flops = rate["fp32" if size == 4 else "bf16"]
    group = min(GROUP, batch)
    total = 0.0
    for written in range(1, new):
        moved = read * size + (batch // group * width + batch * written) * kv
        total += max(moved / rate["bytes"], 2 * batch * read / flops)
    return total


def decode(bench: Bench) -> None:
    rate = measured_rates(bench)
    for model in bench.models:
        for precision, dtype in DTYPES.items():
            policy = bench.policy(model, str(dtype).removeprefix("torch."))
            for batch in bench.batches:
                prompts, group = prompts_of(bench, policy, batch)
                noise = uniforms(0, TRAIN, 0, range(batch), bench.new_tokens)
                engine = CachedEngine(1.0, bench.new_tokens)
                ours = bench.seconds(partial(engine.sample, policy, prompts, group, noise))
                theirs = bench.seconds(partial(generated, policy, prompts, group, bench.new_tokens))
                width = len(prompts[0].tokens)
                floor = floor_seconds(policy, batch, width, bench.new_tokens, dtype.itemsize, rate)
                case, tokens = f"{model} {precision} batch {batch}", batch * bench.new_tokens
                bench.say("decode", case, "cached", tokens / ours, "tokens/s")
                bench.say("decode", case, "generate, static cache", tokens / theirs, "tokens/s")
                bench.say("decode", case, "floor", tokens / floor, "tokens/s")
                bench.say("decode", case, "cached, a step", 1e3 * ours / bench.new_tokens, "ms")
                bench.say("decode", case, "share of the floor", floor / ours, "")
            del policy


@torch.no_grad()
def generated(policy: Policy, prompts: Sequence[Prompt], group: int, new_tokens: int) -> None:
    """Hugging Face's own loop at its fastest, with TRL's sampling settings."""
    tokens = torch.tensor([prompt.tokens for prompt in prompts], device=policy.device)
    tokens = tokens.repeat_interleave(group, 0)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, cache_implementation="static",
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    written = policy.lm.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, eos_token_id=None
    )
    assert written.shape[1] == tokens.shape[1] + new_tokens, "generate ended early"


def synchronizations(work: Callable[[], object]) -> int:
    """How often the CPU waits for the GPU in ``work``, as CUDA's debug mode counts."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def syncs(bench: Bench) -> None:
    if bench.device.type != "cuda":
        print("syncs      nothing waits on a CPU")
        return
    for model in bench.models:
        policy = bench.policy(model)
        prompts, group = prompts_of(bench, policy, 16)
        noise = uniforms(0, TRAIN, 0, range(16), bench.new_tokens)
        engine = CachedEngine(1.0, bench.new_tokens)
        engine.sample(policy, prompts, group, noise)
        count = synchronizations(partial(engine.sample, policy, prompts, group, noise))
        bench.say("syncs", f"{model} batch 16", "waits a position", count / bench.new_tokens, "")


def faithful_tf32(bench: Bench) -> None:
    for model in bench.models:
        policy = bench.policy(model)
        rollout = faithfulness.sampled(policy, CachedEngine(1.0, faithfulness.NEW_TOKENS))
        plain = faithfulness.plainly(policy, rollout)
        with tf32(True):
            logprobs, gradient = faithfulness.by_update(policy, rollout)
        row = faithfulness.errors("update, TF32", rollout, logprobs, plain, gradient)
        bench.say("tf32", model, "log-prob, mean", row.mean, "nats")
        bench.say("tf32", model, "log-prob, largest", row.largest, "nats")
        bench.say("tf32", model, "gradient", row.gradient or 0.0, "relative")


def config_of(bench: Bench, case: str) -> DictConfig:
    """A run of some iterations without callbacks and files."""
    model, words = RUNS[case]
    architecture, vocabulary = MODELS["tiny" if bench.quick else model]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [
            "model=gpt2_scratch", f"model.vocab_size={vocabulary}", *words, "callbacks=none",
            "callbacks.checkpoint=null", "logger.csv=null", "~algo_model", "paths.run=nowhere",
            f"hardware={'gpu' if bench.device.type == 'cuda' else 'cpu'}", "iterations=4", "validation.every=1000",
            "validation.prompts=1", f"rollout.prompts={2 if bench.quick else 32}", "rollout.group_size=4",
            f"rollout.max_new_tokens={8 if bench.quick else 128}",
        ])  # fmt: skip
    config.model.architecture = architecture
    return config


def trained(bench: Bench, config: DictConfig) -> list[dict[str, float]]:
    """Metrics of a run's iterations, without validation and preflight."""
    from policylab.config.build import build

    experiment = build(config, Path("nowhere"))
    module = experiment.module
    experiment.trainer.limit_val_batches = 0
    module._checked = True
    metrics: list[dict[str, float]] = []
    module.record = metrics.append  # type: ignore[method-assign]
    experiment.trainer.fit(module, datamodule=experiment.data)
    return metrics


def runs(bench: Bench) -> None:
    from policylab.planning.memory import peak
    from policylab.planning.read import describe

    cuda = bench.device.type == "cuda"
    for case in RUNS:
        config = config_of(bench, case)
        planned = peak(describe(config)).total
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows = trained(bench, config)
        bench.say("runs", case, "memory, planned", planned / 2**30, "GiB")
        if cuda:
            taken = torch.cuda.max_memory_reserved() + context_bytes()
            bench.say("runs", case, "memory, measured", taken / 2**30, "GiB")
        for name in sorted(key for key in rows[-1] if key.startswith("perf/")):
            value = statistics.median(row[name] for row in rows[1:])
            unit = "tokens/s" if name == "perf/tokens_per_s" else "s"
            bench.say("runs", case, name.removeprefix("perf/"), value, unit)


def context_bytes() -> int:
    """Bytes of the driver's context, outside torch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


PARTS: dict[str, Callable[[Bench], None]] = {
    "rates": rates,
    "decode": decode,
    "syncs": syncs,
    "tf32": faithful_tf32,
    "runs": runs,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["gpt2", "llama"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="a folder; figures are added to figures.csv there")
    chosen = parser.parse_args(argv)
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --quick runs the same code on a CPU")
    resolvers.register(ROOT)
    silence_noise()
    bench = Bench(chosen)
    for part in chosen.parts or PARTS:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
