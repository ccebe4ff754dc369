"""Prompts -> rollouts: sampling with keyed noise, scores, log-probs of the reference, values of the critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from policylab.data.rollout import Completion, Prompt, Rollout
from policylab.distributed.sharding import gathered
from policylab.functional.behaviour import Behaviour
from policylab.models.policy import Policy
from policylab.rewards.base import Scores
from policylab.rewards.scorer import ScoreFuture
from policylab.rollouts.noise import PREFLIGHT, VALIDATION, uniforms
from policylab.rollouts.row_limit import EVERY_ROW, RowLimit
from policylab.training.means import SAMPLED
from policylab.training.parts import Parts
from policylab.training.passes import Passes
from policylab.training.run_state import Progress


class Sampler:
    """Samples from the policy, and adds the reference's log-probs and the critic's values to rollouts.

    Args:
        reference: frozen or moving reference; None without one.

    Attributes:
        behaviour: noise stream -> distribution that its tokens are drawn from; None for the policy itself.
        reward_is_loaded: whether the reward has its state, so that a checkpoint's state is ignored.
        scorer: holds the reward. It is not an ``nn.Module``, so that a network in the reward is not registered here.
    """

    def __init__(self, parts: Parts, reference: Policy | None, passes: Passes, progress: Progress) -> None:
        self.policy = parts.policy
        self.reference = reference
        self.engine = parts.engine
        self.scorer = parts.scorer
        self.seed = parts.seed
        self.passes = passes
        self.runtime = passes.runtime
        self.recorder = passes.recorder
        self.progress = progress
        self.row_limit = RowLimit(parts.max_rows)
        self.behaviour: Callable[[int], Behaviour | None] = lambda stream: None
        # iteration of the last validation, and the reward's state before it
        self._reward_before: tuple[int, Any] | None = None
        self.reward_is_loaded = False

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        stream: int,
        samples: Sequence[int],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """Completions of the prompts, ``group_size`` each.

        Args:
            stream: noise stream. Validation's noise is the same in every iteration.
            samples: index of each row among all rows of the iteration, which keys its noise.
            behaviour: replaces the stream's.
        """
        iteration = self.progress.iteration if stream != VALIDATION else 0
        noise = uniforms(self.seed, stream, iteration, samples, self.engine.max_new_tokens)
        behaviour = behaviour or self.behaviour(stream)
        with gathered(self.policy) as policy:
            rollout = self.row_limit.sample(self.engine, policy, prompts, group_size, noise, behaviour)
        if stream not in (VALIDATION, PREFLIGHT):
            self.recorder.add(SAMPLED, rollout.action_mask.sum())
        return rollout

    def score(self, rollout: Rollout, prompts: Sequence[Prompt]) -> tuple[list[Completion], ScoreFuture]:
        """The rollout's completions as text, and a future of their scores.

        Args:
            prompts: one for each row.
        """
        completions = self.completions(rollout, prompts)
        # in the reward's own precision, as in a worker process
        with torch.autocast(self.runtime.device.type, enabled=False):
            return completions, self.scorer.begin(completions)

    def completions(self, rollout: Rollout, prompts: Sequence[Prompt]) -> list[Completion]:
        """The completions as text, with one device-to-host copy. ``prompts``: one for each row."""
        if rollout.episodes:
            return conversations(rollout, prompts)
        table = torch.cat([rollout.lengths[:, None], rollout.ended[:, None], rollout.tokens], dim=1).tolist()
        return [
            Completion(
                prompt.text,
                self.policy.decode(row[:length]),
                prompt.reference,
                tuple(row[:length]),
                bool(ended),
            )
            for prompt, (length, ended, *row) in zip(prompts, table, strict=True)
        ]

    def add_ref_logprobs(self, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probs, if there is a reference."""
        reference, temperature = self.reference, self.engine.temperature
        if reference is None:
            return rollout
        return rollout.replace(
            ref_logprobs=self.passes.per_token(
                rollout, lambda piece: reference.logprobs_of(piece, temperature)
            )
        )

    def add_exact_kl(self, rollout: Rollout) -> Rollout:
        """The rollout with KL(policy | reference) over the vocabulary at each action, if there is a reference."""

        def evaluate(piece: Rollout) -> Tensor:
            evaluation = self.policy.evaluate(
                piece, self.engine.temperature, entropy_gradient=False, reference=self.reference
            )
            assert evaluation.exact_kl is not None
            return evaluation.exact_kl

        if self.reference is None:
            return rollout
        return rollout.replace(exact_kl=self.passes.per_token(rollout, evaluate))

    def add_values(self, rollout: Rollout) -> Rollout:
        """The rollout with the critic's values, if there is a critic and sampling did not record them."""
        if self.policy.critic is None or rollout.values is not None:
            return rollout
        return rollout.replace(values=self.passes.per_token(rollout, self.policy.values))

    def recompute(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the actions under the current policy and, with a critic, values; ``[B, T]`` each."""

        def evaluate(piece: Rollout) -> Tensor:
            now = self.policy.evaluate(piece, self.engine.temperature, entropy_gradient=False, reference=None)
            return torch.stack([x for x in (now.logprobs, now.values) if x is not None])

        logprobs, *values = self.passes.per_token(rollout, evaluate)
        return logprobs, values[0] if values else None

    @property
    def in_full_precision(self) -> bool:
        """Whether the forward passes of training are in fp32 throughout."""
        return self.runtime.full_precision and self.policy.dtype == torch.float32

    @property
    def records_exactly(self) -> bool:
        """Whether log-probs recorded while sampling equal those of a full forward pass, up to rounding."""
        return self.engine.exact and self.in_full_precision

    def agree_on_cuts(self) -> None:
        """All processes adopt the smallest micro-batch and row limit."""
        rows = self.row_limit.rows or EVERY_ROW
        tokens, rows = (-self.runtime.all_max(-torch.tensor([self.passes.tokens, rows]))).tolist()
        self.passes.tokens = tokens
        self.row_limit.rows = None if rows == EVERY_ROW else rows

    def begin_validation(self) -> None:
        """Keeps the reward's state from before this validation: a run that resumes here validates again."""
        self._reward_before = (self.progress.iteration, self.scorer.state())

    def state(self) -> dict[str, Any]:
        """The row limit, and the reward's state on each process."""
        if self._reward_before is not None and self._reward_before[0] == self.progress.iteration:
            reward = self._reward_before[1]
        else:
            reward = self.scorer.state()
        return {
            "max_rows": (self.row_limit.asked, self.row_limit.rows),
            "reward": self.runtime.gather(reward),
        }

    def load(self, state: dict[str, Any]) -> None:
        """If the number of processes has changed, each gets the first saved process's reward state.

        The reward's state is loaded once: Lightning loads a checkpoint before the first validation and again before
        training, and the reward has scored in between.
        """
        asked, found = state.get("max_rows", (None, None))
        if asked == self.row_limit.asked:
            self.row_limit.rows = found
        if not self.reward_is_loaded:
            saved = state.get("reward", [None])
            mine = saved[self.runtime.rank if len(saved) == self.runtime.world_size else 0]
            self.scorer.load_state(mine)
        self.reward_is_loaded = True


def conversations(rollout: Rollout, prompts: Sequence[Prompt]) -> list[Completion]:
    """The completion of each episode, with its turns."""
    rows = zip(
        *(prompts, rollout.episodes, rollout.ended.tolist()),
        *(rollout.tokens.tolist(), rollout.action_mask.tolist()),
        strict=True,
    )
    return [
        Completion(
            prompt.text + episode.observation,
            "\n".join(written for written, _ in episode.turns),
            prompt.reference,
            tuple(compress(tokens, chosen)),
            ended,
            episode.turns,
        )
        for prompt, episode, ended, tokens, chosen in rows
    ]


def rewarded(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout with the scores of its rows, and of their turns."""
    device = rollout.tokens.device
    table = torch.tensor([scores.total, *scores.parts.values()], dtype=torch.float32, device=device)
    if rollout.turn_ends is not None:
        of_turns = torch.tensor([x for row in scores.turns for x in row], device=device)
        grid = torch.zeros(rollout.tokens.shape, device=device)
        rollout = rollout.replace(turn_rewards=grid.masked_scatter(rollout.turn_ends, of_turns), episodes=())
    return rollout.replace(
        rewards=table[0],
        reward_parts=table[1:].T,
        part_names=tuple(scores.parts),
    )
