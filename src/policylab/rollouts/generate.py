"""The reference engine: Hugging Face ``generate``, which draws the same tokens as our engine.

It uses the library's own caches, positions and batches, so it runs every causal LM, and other engines are tested
against it. It is the slowest engine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from policylab.data.rollout import Prompt, Rollout
from policylab.functional.behaviour import Behaviour
from policylab.functional.logprobs import log_distribution, token_logprobs
from policylab.models.policy import Policy
from policylab.rollouts.engine import assemble, check_context, check_settings, pad_left
from policylab.rollouts.sampling import inverse_cdf


@dataclass(frozen=True)
class GenerateEngine:
    """Samples completions (see `policylab.rollouts.engine.Engine`).

    Args:
        temperature: divides the logits, above 0; the same in training.
        max_new_tokens: length limit of completions.
    """

    temperature: float
    max_new_tokens: int

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.max_new_tokens)

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """As `policylab.rollouts.engine.Engine.sample`. Values are computed afterwards."""
        tokens, lengths = pad_left([prompt.tokens for prompt in prompts], policy.device)
        width = tokens.shape[1]
        check_context(policy, width + self.max_new_tokens)
        attention = torch.arange(width, device=policy.device) >= width - lengths[:, None]
        draw = KeyedDraw(self.temperature, noise.to(policy.device), behaviour, width)
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,  # KeyedDraw leaves only one token possible
            eos_token_id=list(policy.eos_ids),
            pad_token_id=policy.eos_id,
        )
        written = with_settings(policy.lm, settings).generate(
            tokens.repeat_interleave(group_size, 0),
            attention_mask=attention.long().repeat_interleave(group_size, 0),
            generation_config=settings,
            logits_processor=[draw],
        )[:, width:]
        is_eos = policy.ends(written)
        ended = is_eos.any(-1)
        first_eos = is_eos.int().argmax(-1)
        return assemble(
            prompts,
            group_size,
            tokens=written,
            lengths=torch.where(ended, first_eos + 1, written.shape[1]),
            ended=ended,
            logprobs=torch.stack(draw.logprobs, dim=1),
        )


@dataclass
class KeyedDraw(LogitsProcessor):
    """Draws the token of this step by our noise, makes it the only possible one for ``generate``, and records its
    log-prob."""

    temperature: float
    noise: Float[Tensor, "B T"]  #: of the completions, one column per step
    behaviour: Behaviour | None
    prompt_width: int  #: columns before the first step
    logprobs: list[Float[Tensor, " B"]] = field(default_factory=list)

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """``scores``: the logits of the next token."""
        logp = log_distribution(scores, self.temperature)
        logp = logp if self.behaviour is None else self.behaviour(logp)
        drawn = inverse_cdf(logp, self.noise[:, input_ids.shape[1] - self.prompt_width])
        self.logprobs.append(token_logprobs(logp, drawn))
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn[:, None], 0.0)


def with_settings(lm: Any, settings: GenerationConfig) -> Any:
    """A shallow copy of the model without the checkpoint's generation defaults, such as top-k and penalties, which
    ``generate`` would apply. The model itself is not changed, as it may be saved at the same time.
    """
    view = copy.copy(lm)
    view.generation_config = settings
    return view
