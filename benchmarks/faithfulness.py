"""How far every fast path is from the plain fp32 forward and backward pass.

    python benchmarks/faithfulness.py --model tiny|gpt2|smollm2|llama [--device cuda] [--out FILE.csv]

The plain pass is the model's own code: a padded row for each sequence, PyTorch's own products, whole
log-distributions, autograd's gradient. It gets the tokens that a path sampled, or else those of the default engine.
Log-probs are compared per token (nats), gradients as whole vectors; the gradient is that of the sum of log-probs
with random signs. Prompts are random ids of 4 to 32 tokens. gpt2 and llama have random weights.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from policylab.data.rollout import Prompt, Rollout
from policylab.functional.linear_head import head_figures
from policylab.functional.logprobs import completion_slice
from policylab.functional.masks import length_mask
from policylab.models import policy as policy_module
from policylab.models.policy import Policy
from policylab.models.readers import PackedCausal, PaddedCausal
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.runs.environment import describe_environment
from race import weights

ROOT = Path(__file__).parents[1]
PROMPTS, GROUP, NEW_TOKENS = 8, 4, 32

Figures = tuple[Tensor, Tensor]  #: log-probs on the rollout's grid, and the gradient


def policy_of(model: str, device: str = "cpu") -> Policy:
    """The model as a run would load it."""
    return Policy(weights.load(model), critic=None).eval().to(device)


def sampled(policy: Policy, engine: Any) -> Rollout:
    """Completions of unequal lengths: those without an end are cut at different lengths."""
    generator = torch.Generator().manual_seed(0)
    words = policy.lm.config.vocab_size
    lengths = torch.linspace(4, 32, PROMPTS).long().tolist()
    ids = [torch.randint(1, words, (n,), generator=generator).tolist() for n in lengths]
    prompts = [Prompt(i, "", tuple(tokens), None, ()) for i, tokens in enumerate(ids)]
    rows = PROMPTS * GROUP
    rollout = engine.sample(policy, prompts, GROUP, uniforms(0, TRAIN, 0, range(rows), NEW_TOKENS))
    cuts = torch.randint(8, NEW_TOKENS + 1, (rows,), generator=generator).to(policy.device)
    kept = torch.minimum(rollout.lengths, cuts)
    mask = length_mask(kept, rollout.tokens.shape[1])
    return rollout.replace(
        lengths=kept, action_mask=mask, tokens=rollout.tokens * mask, logprobs=rollout.logprobs * mask
    )


def backward(policy: Policy, logprobs: Tensor) -> Tensor:
    """The gradient of the sum of log-probs with random signs."""
    signs = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1)).sign().to(policy.device)
    policy.zero_grad(set_to_none=True)
    (logprobs * signs).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.lm.parameters() if p.grad is not None])


def plainly(policy: Policy, rollout: Rollout) -> Figures:
    """The model's own code, from tokens to gradient."""
    prompt_width, width = rollout.prompt_tokens.shape[1], rollout.tokens.shape[1]
    real = [length_mask(rollout.prompt_lengths, prompt_width).flip(-1), length_mask(rollout.lengths, width)]
    attention = torch.cat(real, dim=1)
    logits = policy.lm(
        input_ids=torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1),
        attention_mask=attention.long(),
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).logits[:, completion_slice(prompt_width, width)]
    logprobs = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
    logprobs = logprobs.masked_fill(~rollout.action_mask, 0.0)
    return logprobs.detach(), backward(policy, logprobs)


def by_update(policy: Policy, rollout: Rollout) -> Figures:
    """Log-probs and gradient as in an update."""
    logprobs = policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None).logprobs
    return logprobs.detach(), backward(policy, logprobs)


def bf16(policy: Policy) -> AbstractContextManager[Any]:
    """The autocast of ``hardware.precision=bf16-mixed``."""
    return torch.autocast(policy.device.type, torch.bfloat16, cache_enabled=False)


def in_chunks() -> AbstractContextManager[Any]:
    """The head on a few positions at a time, recomputed in the backward pass."""
    chunked = functools.partial(head_figures, chunk=2**18)
    return mock.patch.object(policy_module, "head_figures", chunked)


@dataclass(frozen=True)
class Errors:
    """The errors of one path."""

    path: str
    mean: float  #: of log-probs, nats a token
    largest: float
    gradient: float | None  #: length of the difference over that of the plain gradient; None for sampling


def errors(path: str, rollout: Rollout, found: Tensor, plain: Figures, gradient: Tensor | None) -> Errors:
    apart = (found - plain[0]).abs()[rollout.action_mask]
    share = None if gradient is None else float((gradient - plain[1]).norm() / plain[1].norm())
    return Errors(path, float(apart.mean()), float(apart.max()), share)


def measure(policy: Policy) -> list[Errors]:
    """Compares every path with the plain pass."""
    found = []
    engines: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]] = {
        "rollout=cached": (CachedEngine(1.0, NEW_TOKENS), nullcontext),
        "rollout=generate": (GenerateEngine(1.0, NEW_TOKENS), nullcontext),
        "rollout.dtype=bfloat16": (CachedEngine(1.0, NEW_TOKENS, "bfloat16"), nullcontext),
    }
    for path, (engine, context) in engines.items():
        with context():
            rollout = sampled(policy, engine)
        found.append(errors(path, rollout, rollout.logprobs, plainly(policy, rollout), None))
    rollout = sampled(policy, CachedEngine(1.0, NEW_TOKENS))
    plain = plainly(policy, rollout)
    packed, padded = {"reader": PackedCausal(policy.lm)}, {"reader": PaddedCausal(policy.lm)}
    paths: dict[str, tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]] = {
        "update": (nullcontext, packed),
        "update, head in chunks": (in_chunks, packed),
        "update, rows apart": (nullcontext, padded),
        "update, gradient checkpointing": (nullcontext, {"recomputes_layers": True}),
        "update, bf16-mixed": (functools.partial(bf16, policy), packed),
    }
    for path, (context, settings) in paths.items():
        with context(), mock.patch.multiple(policy, **settings):
            logprobs, gradient = by_update(policy, rollout)
        found.append(errors(path, rollout, logprobs, plain, gradient))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(weights.MODELS), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="a CSV to add rows to")
    chosen = parser.parse_args()
    rows = measure(policy_of(chosen.model, chosen.device))
    print(f"{chosen.model:32} {'mean':>9} {'largest':>9} {'gradient':>9}")
    for row in rows:
        gradient = "" if row.gradient is None else f"{row.gradient:9.1e}"
        print(f"{row.path:32} {row.mean:9.1e} {row.largest:9.1e} {gradient:>9}")
    if chosen.out is None:
        return
    about = describe_environment(ROOT)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not chosen.out.exists()
    with chosen.out.open("a", newline="") as file:
        table = csv.writer(file)
        if fresh:
            table.writerow(
                [
                    "model",
                    "path",
                    "logprob_mean",
                    "logprob_largest",
                    "gradient",
                    "cpu",
                    "torch",
                    "commit",
                    "date",
                ]
            )
        for row in rows:
            gradient = "" if row.gradient is None else f"{row.gradient:.2e}"
            table.writerow([
                chosen.model, row.path, f"{row.mean:.2e}", f"{row.largest:.2e}", gradient,
                about["cpu"] if chosen.device == "cpu" else about["gpus"][0],
                about["packages"]["torch"], about["git"]["commit"], datetime.date.today().isoformat(),
            ])  # fmt: skip


if __name__ == "__main__":
    main()
