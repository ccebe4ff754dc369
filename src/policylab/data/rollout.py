"""The data of one iteration: prompts, and a rollout on one ``[B, T]`` grid.

Axes: ``B`` sequences, ``T`` sampled positions, ``P`` prompt length, ``K`` parts of a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from policylab.data.text import Completion, Episode, Prompt, Sample

__all__ = ["Completion", "Evaluation", "Prompt", "PromptBatch", "Rollout", "Sample"]


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one iteration, as the DataLoader yields them."""

    prompts: tuple[Prompt, ...]

    def to(self, device: Any, **_: Any) -> Self:
        """Called by Lightning. Does nothing, because the engine makes the tensors."""
        return self


@dataclass(frozen=True)
class Rollout:
    """Sampled sequences with their log-probs, rewards and advantages.

    Position ``t`` of row ``b`` is the ``t``-th token after the prompt. Masks come from lengths, never
    from comparing ids with a padding id. With ``T = 4``, a completion of two words and an EOS reads::

        tokens       [ 17,  9,  0,  0]     0 is EOS *and* padding
        lengths        3
        action_mask  [  1,  1,  1,  0]     the first EOS was chosen by the policy: true

    Float fields are zero wherever ``action_mask`` is false.
    """

    prompt_tokens: Int[Tensor, "B P"]  #: left-padded
    prompt_lengths: Int[Tensor, " B"]
    tokens: Int[Tensor, "B T"]  #: right-padded
    lengths: Int[Tensor, " B"]  #: positions in use, an environment's words included
    action_mask: Bool[Tensor, "B T"]  #: true where the policy chose the token
    ended: Bool[Tensor, " B"]  #: false when cut at the length limit, or when its episode was cut
    group_ids: Int[Tensor, " B"]  #: rows of one group answer the same prompt
    prompt_ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, "B T"]  #: log-prob of each token under the distribution it was sampled from
    policy_logprobs: Float[Tensor, "B T"] | None = None  #: under the training policy, if they were recomputed
    #: importance weight of each token; None without a correction for the sampler
    importance: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None  #: of the critic at sampling time; None without a critic
    ref_logprobs: Float[Tensor, "B T"] | None = None  #: under the reference; None without one
    exact_kl: Float[Tensor, "B T"] | None = None  #: KL(policy | reference) over the vocabulary, if requested
    rewards: Float[Tensor, " B"] | None = None  #: the task's reward of each sequence
    greedy_rewards: Float[Tensor, " B"] | None = None  #: of the likeliest completion of the same prompt
    reward_parts: Float[Tensor, "B K"] | None = None
    part_names: tuple[str, ...] = ()
    episodes: tuple[
        Episode, ...
    ] = ()  #: of each row; dropped once it is scored; empty without an environment
    turn_ends: Bool[Tensor, "B T"] | None = (
        None  #: true at the last action of a turn; None without an environment
    )
    turn_rewards: Float[Tensor, "B T"] | None = None  #: the part of `rewards` that is given to single turns
    token_rewards: Float[Tensor, "B T"] | None = None  #: rewards at the last actions, plus shaping
    advantages: Float[Tensor, "B T"] | None = None  #: of each action
    returns: Float[Tensor, "B T"] | None = None  #: the critic's target
    kept: Bool[Tensor, " B"] | None = None  #: false for sequences left out of training; None keeps all

    @property
    def loss_mask(self) -> Bool[Tensor, "B T"]:
        """True at the actions that are trained on."""
        return self.action_mask if self.kept is None else self.action_mask & self.kept[:, None]

    @property
    def old_logprobs(self) -> Float[Tensor, "B T"]:
        """The old log-probs, for probability ratios."""
        return self.logprobs if self.policy_logprobs is None else self.policy_logprobs

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def select(self, rows: Int[Tensor, " N"]) -> Self:
        """The given rows, without columns that are padding in all of them."""
        width, prompt_width = torch.stack([self.lengths, self.prompt_lengths])[:, rows].amax(1).tolist()
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            value = value[rows]
            if field.name == "prompt_tokens":
                value = value[:, value.shape[1] - prompt_width :]
            elif value.ndim == 2 and field.name != "reward_parts":
                value = value[:, :width]
            changes[field.name] = value
        if self.episodes:
            changes["episodes"] = tuple(self.episodes[row] for row in rows.tolist())
        return replace(self, **changes)

    @classmethod
    def concatenate(cls, rollouts: Sequence[Self]) -> Self:
        """The rows of several rollouts, one after the other, on a grid that fits all. All must have the same fields.

        They need not have the same parts of the reward.
        """
        names = tuple(dict.fromkeys(name for rollout in rollouts for name in rollout.part_names))
        rollouts = [rollout.with_parts(names) for rollout in rollouts]
        width = max(rollout.tokens.shape[1] for rollout in rollouts)
        prompt_width = max(rollout.prompt_tokens.shape[1] for rollout in rollouts)
        changes: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(rollout, field.name) for rollout in rollouts]
            if not isinstance(values[0], Tensor):
                continue
            if field.name == "prompt_tokens":
                values = [pad(value, (prompt_width - value.shape[1], 0)) for value in values]
            elif values[0].ndim == 2 and field.name != "reward_parts":
                values = [pad(value, (0, width - value.shape[1])) for value in values]
            changes[field.name] = torch.cat(values)
        changes["episodes"] = tuple(chain.from_iterable(rollout.episodes for rollout in rollouts))
        return replace(rollouts[0], **changes)

    def with_parts(self, names: tuple[str, ...]) -> Self:
        """With these parts of the reward, in this order; one that it lacks is zero."""
        if self.reward_parts is None or self.part_names == names:
            return self
        columns = dict(zip(self.part_names, self.reward_parts.T, strict=True))
        zero = self.reward_parts.new_zeros(len(self))
        table = torch.stack([columns.get(name, zero) for name in names], dim=1)
        return replace(self, part_names=names, reward_parts=table)

    def on_grid(self, x: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values of the ``N`` actions, in row-major order, at their positions; zero elsewhere."""
        return x.new_zeros(self.action_mask.shape).masked_scatter(self.action_mask, x)

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Evaluation:
    """Values of the current policy for the tokens of a rollout. Zero where there is no action."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None  #: None without a critic
    exact_kl: Float[Tensor, "B T"] | None  #: KL(policy | reference) over the vocabulary, if requested
