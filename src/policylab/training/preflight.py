"""Before a run, checks that log-probs recorded while sampling equal those in training, and measures the time of a
sequence."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.data.plan import BatchPlan
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.functional.masks import masked_sum
from policylab.rollouts.noise import PREFLIGHT
from policylab.training.needs import Cost, Needs
from policylab.training.sampler import Sampler

#: Number of prompts sampled for the check.
PROMPTS = 32
#: Limits on the mean difference of two log-probs of the same token, in nats, in fp32 and in lower precision. The mean,
#: because rounding can move a single token of a confident policy by a nat or more. Measured on the embedded model,
#: logits times 1 to 30:
#: at most 0.025 in bf16 and below 5e-5 in fp32. Shifted masks, positions off by one and other weights gave 0.11 and
#: more, a temperature of 0.8 instead of 1 gave 0.42 and, at logits times 4, 0.10 (tests/test_preflight.py).
TOLERANCE = 1e-4
LOW_PRECISION_TOLERANCE = 0.05


@dataclass(frozen=True)
class Pace:
    """Measured cost of one sequence; an upper bound, as larger batches are cheaper."""

    sample: float  #: seconds
    forward: float  #: seconds
    tokens: float  #: sampled tokens

    def seconds(self, needs: Needs, cost: Cost, plan: BatchPlan) -> float:
        """Upper bound for an iteration; a backward pass costs about two forward passes."""
        sampled = self.sample * (needs.learns_from == "rollouts")
        a_sequence = sampled + (cost.forwards + 3 * cost.passes) * self.forward
        return a_sequence * plan.sequences / plan.processes


@torch.no_grad()
def preflight(sampler: Sampler, prompts: Sequence[Prompt]) -> Pace:
    """Samples a few completions and compares their recorded log-probs and values with recomputed ones.

    If the engine is not exact, log-probs are recomputed before each update, and a difference is only a warning.

    Raises:
        UserError: when log-probs or values differ, or when an untrained policy differs from its reference. Otherwise a
            run would train on ratios that are wrong from the first step.
    """
    precise = TOLERANCE if sampler.in_full_precision else LOW_PRECISION_TOLERANCE
    limit = precise if sampler.engine.exact else LOW_PRECISION_TOLERANCE
    sampler.generate(prompts[:1], 1, PREFLIGHT, [0])  # the first pass is slower than later ones
    start = time.perf_counter()
    rollout = sampler.add_values(sampler.generate(prompts, 1, PREFLIGHT, range(len(prompts))))
    sampled = time.perf_counter()
    logprobs, values = sampler.recompute(rollout)
    done = time.perf_counter()

    found = []
    if problem := difference(rollout.logprobs, logprobs, rollout.action_mask, limit):
        found.append(
            f"log-probs recorded while sampling differ from recomputed ones, {problem}; likely cause: the model's "
            "cached forward pass is not its full one (custom code, or attention that ignores positions), or the engine "
            "samples at another temperature or with other weights"
        )
    if rollout.values is not None and values is not None:
        scale = values.abs().max().clamp(min=1.0)
        if problem := difference(rollout.values / scale, values / scale, rollout.action_mask, limit):
            found.append(
                f"values recorded at sampling differ from recomputed ones, {problem}; likely cause: the critic read "
                "other hidden states than in training"
            )
    if found and sampler.engine.exact:
        raise UserError(f"preflight: {found[0]}")
    for line in found:
        warnings.warn(f"preflight: {line}; the log-probs are recomputed before training", stacklevel=2)

    reference = sampler.add_ref_logprobs(rollout).ref_logprobs if sampler.progress.iteration == 0 else None
    if reference is not None and (problem := difference(logprobs, reference, rollout.action_mask, precise)):
        raise UserError(
            f"preflight: the untrained policy differs from its reference, {problem}; likely cause: weights were "
            "changed after the reference was copied"
        )
    return Pace(
        sample=(sampled - start) / len(prompts),
        forward=(done - sampled) / len(prompts),
        tokens=float(rollout.action_mask.sum()) / len(prompts),
    )


def difference(
    recorded: Float[Tensor, "B T"], recomputed: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], limit: float
) -> str | None:
    """Mean difference over the actions, as text; None if within the limit."""
    apart = (recorded - recomputed).abs()
    mean = float(masked_sum(apart, mask).sum() / mask.sum())
    if mean <= limit:  # false for NaN
        return None
    return f"by {mean:.2g} a token on average (limit {limit:.2g})"
