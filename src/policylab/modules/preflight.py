"""Checks before a run that what is sampled is what will be trained on; and how long an iteration takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policylab.errors import UserError
from policylab.rollouts.noise import PREFLIGHT
from policylab.rollouts.types import Prompt

if TYPE_CHECKING:
    from policylab.modules.experiment import ExperimentModule

#: Prompts that are tried.
PROMPTS = 32
#: Largest difference of two log-probs of the same token, in nats, in fp32 and in lower precision. fp32 decoding
#: agrees with the full forward pass to a few 1e-5; bf16 drifts by up to 0.2.
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.5


@dataclass(frozen=True)
class Pace:
    """What a sequence costs, measured on a few: in seconds an upper bound, as larger batches cost less."""

    sample: float  #: seconds
    forward: float  #: seconds
    tokens: float  #: sampled


@torch.no_grad()
def preflight(module: ExperimentModule, prompts: list[Prompt]) -> Pace:
    """Samples a few completions and holds the recorded figures against recomputed ones.

    Raises:
        UserError: when log-probs or values differ, or when an untrained policy is not at its reference. A run
            would otherwise train on ratios that are wrong from the first step.
    """
    tolerance = TOLERANCE if module.in_full_precision and module.engine.exact else LOW_PRECISION_TOLERANCE
    module.generate(prompts[:1], 1, PREFLIGHT, [0])  # the first pass through a model is not typical
    start = time.perf_counter()
    rollout = module.estimate_values(module.generate(prompts, 1, PREFLIGHT, range(len(prompts))))
    sampled = time.perf_counter()
    logprobs, values = module.recompute(rollout)
    done = time.perf_counter()

    _demand(
        rollout.logprobs,
        logprobs,
        tolerance,
        "log-probs recorded while sampling differ from recomputed ones",
        "the model's cached forward pass is not its full one (custom code, or attention that ignores positions)",
    )
    if rollout.values is not None and values is not None:
        scale = max(1.0, float(values.abs().max()))
        _demand(
            rollout.values / scale,
            values / scale,
            tolerance,
            "values recorded at sampling differ from recomputed ones",
            "the critic read other hidden states than in training",
        )
    referred = module.refer(rollout)
    if referred.ref_logprobs is not None and module.iteration == 0:
        _demand(
            rollout.logprobs,
            referred.ref_logprobs,
            tolerance,
            "the untrained policy is not at its reference",
            "weights were changed after the reference was copied",
        )
    return Pace(
        sample=(sampled - start) / len(prompts),
        forward=(done - sampled) / len(prompts),
        tokens=float(rollout.action_mask.sum()) / len(prompts),
    )


def _demand(recorded: Tensor, recomputed: Tensor, tolerance: float, what: str, cause: str) -> None:
    difference = float((recorded - recomputed).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"preflight: {what}, by up to {difference:.2g} (limit {tolerance:.2g}); likely cause: {cause}"
        )
