"""The default engine: our own decode loop, with the decoder of the policy's reader.

A prompt is read once for all its completions. Finished rows are removed from the batch. Log-probs and values are
recorded while sampling, so they need no second forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policylab.contracts import check_members
from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError
from policylab.functional.behaviour import Behaviour
from policylab.functional.logprobs import log_distribution
from policylab.models.decoders import Decoder
from policylab.models.policy import Policy
from policylab.models.size import Size
from policylab.rollouts.engine import assemble, check_context, check_settings, pad_left
from policylab.rollouts.memory import Piece, sampling_memory
from policylab.rollouts.sampling import check_finite, draw

#: Finished rows are removed once they are this fraction of the batch; about as many rows of the cache are then copied.
COMPACT_AT = 0.125
#: With MANY_ROWS or more, the number of rows left is a multiple of ROW_STEP.
MANY_ROWS, ROW_STEP = 32, 8
#: On an accelerator, steps between two checks of how many rows have ended: reading the number waits for all queued
#: work.
STEPS_BETWEEN_CHECKS = 8


@dataclass(frozen=True)
class CachedEngine:
    """Samples completions.

    Args:
        temperature: divides the logits, above 0; the same in training.
        max_new_tokens: length limit of completions.
        dtype: dtype of the products while sampling. None: the training precision; ``bfloat16`` is faster, but
            log-probs then differ from training's.
    """

    temperature: float
    max_new_tokens: int
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.max_new_tokens)
        if self.dtype not in (None, "bfloat16"):
            raise UserError(f"rollout.dtype is {self.dtype}; take null (the training precision) or bfloat16")

    @property
    def exact(self) -> bool:
        """Whether recorded log-probs are, up to rounding, those of a full forward pass in the training precision."""
        return self.dtype is None

    def memory(self, size: Size, piece: Piece) -> dict[str, float]:
        """For plans: bytes that sampling a piece allocates, by purpose."""
        return sampling_memory(size, piece, ours=size.network is not None)

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """As `policylab.rollouts.engine.Engine.sample`.

        Raises:
            FloatingPointError: when the policy's logits are not finite.
        """
        device = policy.device
        distinct = {tokens: n for n, tokens in enumerate(dict.fromkeys(p.tokens for p in prompts))}
        prompt_of = torch.tensor([distinct[p.tokens] for p in prompts], device=device)
        tokens, lengths = pad_left(list(distinct), device)
        check_context(policy, tokens.shape[1] + self.max_new_tokens)
        dtype = self._dtype(policy)
        decoder = policy.reader.decoder(dtype)
        check_members("decoder", decoder, Decoder, later=("logits", "hidden"))
        rows = prompt_of.repeat_interleave(group_size)
        # for decoders that use autocast
        with torch.autocast(device.type, dtype, enabled=dtype != policy.dtype):
            decoder.prefill(tokens, lengths, rows, room=self.max_new_tokens)
            check_members("decoder", decoder, Decoder)
            tokens, logprobs, values = self._write(decoder, policy, noise.to(device), behaviour)
        check_finite(logprobs)

        is_eos = policy.ends(tokens)
        ended = is_eos.any(-1)
        lengths = torch.where(ended, is_eos.long().argmax(-1) + 1, tokens.shape[1])
        rollout = assemble(prompts, group_size, tokens, lengths, ended, logprobs)
        if values is None:
            return rollout
        width = rollout.tokens.shape[1]
        return rollout.replace(values=values[:, :width].masked_fill(~rollout.action_mask, 0.0))

    def _write(
        self, decoder: Decoder, policy: Policy, noise: Float[Tensor, "B T"], behaviour: Behaviour | None
    ) -> tuple[Int[Tensor, "B S"], Float[Tensor, "B S"], Float[Tensor, "B S"] | None]:
        """Tokens, log-probs and values of all steps. Entries after a row's EOS are meaningless."""
        device, size = policy.device, len(noise)
        critic = policy.critic if policy.critic is not None and policy.critic.trains_trunk else None
        tokens = torch.zeros(self.max_new_tokens, size, dtype=torch.long, device=device)
        logprobs = torch.zeros(self.max_new_tokens, size, device=device)
        values = None if critic is None else torch.zeros_like(logprobs)
        rows = torch.arange(size, device=device)  #: rows of the rollout that are still in the decoder
        ended = torch.zeros_like(rows, dtype=torch.bool)  #: whether each of these rows has ended
        uniform = noise.T.contiguous()
        interval = 1 if device.type == "cpu" else STEPS_BETWEEN_CHECKS

        for t in range(self.max_new_tokens):
            drawn, logp = self._draw(decoder.logits, uniform[t], behaviour)
            tokens[t].index_copy_(0, rows, drawn)
            logprobs[t].index_copy_(0, rows, logp)
            if critic is not None and values is not None:
                values[t].index_copy_(0, rows, critic.score(decoder.hidden))
            ended |= policy.ends(drawn)
            if t + 1 == self.max_new_tokens:
                break
            if (t + 1) % interval == 0:
                done = int(ended.sum())
                if done == len(rows):
                    break
                if done >= COMPACT_AT * len(rows):
                    still = unfinished_first(ended)
                    if len(still) < len(rows):
                        decoder.keep(still)
                        rows, drawn, ended = rows[still], drawn[still], ended[still]
                        uniform = uniform[:, still]
            decoder.step(drawn)
        steps = t + 1
        return tokens[:steps].T, logprobs[:steps].T, None if values is None else values[:steps].T

    def _draw(
        self, logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], behaviour: Behaviour | None
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
        if behaviour is None:
            return draw(logits, self.temperature, uniform)
        return draw(behaviour(log_distribution(logits, self.temperature)), 1.0, uniform)

    def _dtype(self, policy: Policy) -> torch.dtype:
        """The dtype of the products: the configured one, else that of training."""
        if self.dtype is not None:
            return getattr(torch, self.dtype)
        kind = policy.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else policy.dtype


def unfinished_first(ended: Bool[Tensor, " B"]) -> Int[Tensor, " K"]:
    """The rows to keep: unfinished rows from the end replace finished ones, and the others stay in place.

    With many rows, some finished ones are kept, so that few different numbers of rows occur, because libraries cache
    kernels for each number.
    """
    count = int((~ended).sum())
    stay = count if count < MANY_ROWS else min(-(-count // ROW_STEP) * ROW_STEP, len(ended))
    rows = torch.arange(stay, device=ended.device)
    moving = stay + (~ended[stay:]).nonzero().squeeze(-1)
    rows[ended[:stay].nonzero().squeeze(-1)[: len(moving)]] = moving
    return rows
