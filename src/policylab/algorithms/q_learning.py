"""Q-learning on tokens, a choice of ``algo``: frozen parts, like those of the policy-gradient methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.errors import UserError, check_range
from policylab.functional.behaviour import Behaviour, epsilon_greedy, greedy
from policylab.functional.masks import last_position
from policylab.functional.q_learning import (
    LEVELS,
    best,
    n_step_targets,
    scale_gradient,
    soft_best,
    taken,
    td_loss,
)


@dataclass(frozen=True)
class QEstimate:
    """A network's estimates for states and the tokens chosen there."""

    scores: Float[Tensor, "N V"]  #: Q of every token, up to a term that depends only on the state
    values: Float[Tensor, " N"]  #: V of the state
    advantages: Float[Tensor, " N"]  #: A = Q - V of the chosen token

    @property
    def q(self) -> Float[Tensor, " N"]:
        """Q of the chosen tokens."""
        return self.values + self.advantages


@dataclass(frozen=True)
class HardBackup:
    """The value of a state is that of its best action: Q-learning.

    Args:
        double: the online network selects the best action, the target network evaluates it ("Deep
            Reinforcement Learning with Double Q-learning", arXiv:1509.06461, eq. 4); false lets the target network
            do both.
        corrected: n-step targets are corrected for actions that were not the best (arXiv:1602.04951); false leaves
            them uncorrected (Rainbow, arXiv:1710.02298).
    """

    double: bool
    corrected: bool
    needs_reference: ClassVar[bool] = False

    def value(self, scores: Float[Tensor, "N V"], scale: float) -> Float[Tensor, " N"]:
        return best(scores, scale)

    def bootstrap(
        self, target: QEstimate, online: QEstimate
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """V of each state, and Q - V of its action (zero without correction)."""
        values = target.values
        if self.double:
            picked = online.scores.argmax(-1)
            values = values - target.scores.amax(-1) + taken(target.scores, picked)
        return values, target.q - values if self.corrected else torch.zeros_like(values)


@dataclass(frozen=True)
class SoftBackup:
    """The value of a state is the return of the policy ``softmax(Q / scale)`` from it on, entropy included.

    Args:
        prior: ``uniform`` adds ``scale`` a nat of entropy ("Reinforcement Learning with Deep Energy-Based
            Policies", arXiv:1702.08165); ``reference`` subtracts ``scale`` a nat of KL to the reference policy instead
            ("Trust-PCL", arXiv:1707.01891), and the optimum is ``reference * exp(reward / scale)``.
    """

    prior: Literal["uniform", "reference"]

    @property
    def needs_reference(self) -> bool:
        """Whether the advantage is a ratio to the reference's probability."""
        return self.prior == "reference"

    def value(self, scores: Float[Tensor, "N V"], scale: float) -> Float[Tensor, " N"]:
        return soft_best(scores, scale)

    def bootstrap(
        self, target: QEstimate, online: QEstimate
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """V of each state, and Q - V of its action."""
        return target.values, target.advantages


Backup = HardBackup | SoftBackup


@dataclass(frozen=True)
class EpsilonGreedy:
    """The best token or, with probability epsilon, a random one. Validation takes the best.

    Args:
        others: distribution of the random token: ``uniform`` over all tokens; ``policy`` is ``softmax(Q / scale)``,
            which prefers likely tokens.
        start: epsilon in the first iteration.
        end: epsilon from iteration ``decay`` on; linear in between.
        decay: iterations.
    """

    others: Literal["uniform", "policy"]
    start: float
    end: float
    decay: int

    def __post_init__(self) -> None:
        check_range("algo.exploration.start", self.start, 0, 1)
        check_range("algo.exploration.end", self.end, 0, 1)
        check_range("algo.exploration.decay", self.decay, 1)

    def epsilon(self, iteration: int) -> float:
        """The epsilon of an iteration, counted from 0."""
        return self.start + (self.end - self.start) * min(iteration / self.decay, 1.0)

    def behaviour(self, iteration: int, *, validation: bool) -> Behaviour | None:
        """The distribution that tokens are drawn from; None: the language model itself."""
        if validation:
            return greedy
        return partial(epsilon_greedy, epsilon=self.epsilon(iteration), others=self.others)

    def metrics(self, iteration: int) -> dict[str, float]:
        """Metrics of an iteration."""
        return {"train/epsilon": self.epsilon(iteration)}


@dataclass(frozen=True)
class Boltzmann:
    """A token of probability ``softmax(Q / scale)``: ordinary sampling from the language model."""

    def behaviour(self, iteration: int, *, validation: bool) -> Behaviour | None:
        return None

    def metrics(self, iteration: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Dueling:
    """A value head sets the level of Q in each state; the LM head gives the differences between tokens
    (arXiv:1511.06581).

    Args:
        level: what is subtracted from the LM head's scores. ``max`` (eq. 8) makes the head's value that of the best
            token, which then has no gradient of its own; ``mean`` (eq. 9) the mean over all tokens; ``logsumexp``
            leaves ``scale log pi``.
        coef: size of the value's gradient relative to that of the logits; 1 / scale gives the plain squared error.
        own_layers: 0: reads the policy's last hidden state. Above 0: own copies of its last layers; ``all``: a whole
            network. With either, the value's gradient never trains the policy.
    """

    level: Literal["max", "mean", "logsumexp"]
    coef: float
    own_layers: int | Literal["all"]

    def __post_init__(self) -> None:
        check_range("algo.dueling.coef", self.coef, 0, above=True)
        if self.own_layers != "all":
            check_range("algo.dueling.own_layers", self.own_layers, 0)


@dataclass(frozen=True)
class TargetNetwork:
    """The slower copy of the network, which computes the targets.

    Args:
        every: optimizer steps between two updates of the copy.
        rate: share of the way to the online network in an update; 1 copies it.
    """

    every: int
    rate: float

    def __post_init__(self) -> None:
        check_range("algo.target.every", self.every, 1)
        check_range("algo.target.rate", self.rate, 0, 1, above=True)
        if self.every == self.rate == 1:
            raise UserError(
                "algo.target.every=1 and algo.target.rate=1 keep the target network equal to the online one; take "
                "algo/target=none, which saves it, or another number"
            )


@dataclass(frozen=True)
class Replay:
    """The replay memory of finished sequences, and the updates from it in an iteration.

    Args:
        capacity: tokens, prompts included; the oldest sequences are removed first.
        warmup: sequences in the memory before the first update.
        updates: optimizer steps an iteration.
        batch_size: sequences drawn for each, over all processes.
    """

    capacity: int
    warmup: int
    updates: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("capacity", "warmup", "updates", "batch_size"):
            check_range(f"algo.replay.{name}", getattr(self, name), 1)

    def check_room(self, sequences: int, longest: int) -> None:
        """Refuses a memory that may be too small for an iteration or for ``warmup``.

        Args:
            sequences: number in an iteration.
            longest: largest number of tokens of a sequence.

        Raises:
            UserError: with the arithmetic.
        """
        needed = max(sequences, self.warmup) * longest
        if self.capacity < needed:
            raise UserError(
                f"algo.replay.capacity={self.capacity} tokens may not hold {max(sequences, self.warmup)} sequences "
                f"(the larger of an iteration and algo.replay.warmup) of up to {longest} tokens; take at least {needed}"
            )


@dataclass(frozen=True)
class QLearning:
    """Learns Q of each next token; the policy follows from Q.

    Args:
        name: names the run.
        backup: the value of a state, given Q.
        scale: reward a nat: Q is ``scale`` times the logits (over the sampling temperature), up to V.
        dueling: a value head for V; None computes V from the logits.
        gamma: discount a token.
        n_step: number of rewards before the target network's value is used; None: all.
        huber: TD error (reward) beyond which the loss grows linearly; None: squared throughout.
        conservative: weight of ``logsumexp(Q / scale) - Q_a / scale``, which lowers Q of tokens that were never tried
            ("Conservative Q-Learning", arXiv:2006.04779, eq. 4; for language models ILQL, arXiv:2206.11871), in
            units of the TD error; 0: none.
        exploration: how rollouts explore.
        target: the target network; None computes targets with the online one.
        replay: the memory, and the updates from it.
    """

    name: str
    backup: Backup
    scale: float
    dueling: Dueling | None
    gamma: float
    n_step: int | None
    huber: float | None
    conservative: float
    exploration: EpsilonGreedy | Boltzmann
    target: TargetNetwork | None
    replay: Replay

    def __post_init__(self) -> None:
        check_range("algo.scale", self.scale, 0, above=True)
        check_range("algo.gamma", self.gamma, 0, 1)
        check_range("algo.n_step", self.n_step, 1)
        check_range("algo.huber", self.huber, 0, above=True)
        check_range("algo.conservative", self.conservative, 0)
        if self.backup.needs_reference and self.dueling is None:
            raise UserError(
                "algo.backup.prior=reference makes Q a ratio of two probabilities, which does not set the level of Q, "
                "and algo.dueling is null; take algo/dueling=value_head or algo.backup.prior=uniform"
            )
        if isinstance(self.backup, SoftBackup) and self.dueling and self.dueling.level != "logsumexp":
            raise UserError(
                f"algo.dueling.level={self.dueling.level} does not make the value head that of the soft policy; with "
                "algo/backup=soft take algo.dueling.level=logsumexp"
            )
        if isinstance(self.backup, SoftBackup) and isinstance(self.exploration, EpsilonGreedy):
            raise UserError(
                "algo/backup=soft learns the values of the policy softmax(Q / scale), and algo/exploration=epsilon "
                "never follows it; take algo/exploration=boltzmann or algo/backup=hard"
            )
        if isinstance(self.backup, HardBackup):
            self.check_use(self.backup)

    def check_use(self, backup: HardBackup) -> None:
        """Refuses an unused target network, and double Q-learning without a target network."""
        if self.n_step is None and not backup.corrected:
            if backup.double:
                raise UserError(
                    "algo.backup.double=true, but algo.n_step=null uses no network's values; take a "
                    "number for algo.n_step or algo.backup.double=false"
                )
            if self.target is not None:
                raise UserError(
                    "algo.n_step=null without algo.backup.corrected learns from whole returns, which use no network, "
                    "so algo.target would do nothing; take algo/target=none or a number for algo.n_step"
                )
        if backup.double and self.target is None:
            raise UserError(
                "algo.backup.double=true needs two networks, but algo.target is null; take algo/target=periodic or "
                "algo.backup.double=false"
            )

    def estimate(
        self, z: Float[Tensor, "N V"], rollout: Rollout, values: Float[Tensor, " N"] | None
    ) -> QEstimate:
        """A network's estimates for the actions of a rollout, in row-major order.

        Args:
            z: logits over the sampling temperature.
            values: those of the value head; None without one.
        """
        scores, mask = self.scale * z, rollout.action_mask
        state_values = self.backup.value(scores, self.scale)
        advantages = taken(scores, rollout.tokens[mask]) - state_values
        if self.backup.needs_reference:
            assert rollout.ref_logprobs is not None
            advantages = advantages - self.scale * rollout.ref_logprobs[mask]
        if self.dueling is not None:
            assert values is not None
            # The loss is divided by scale: the value's share of the gradient becomes coef x the error.
            values = scale_gradient(values, self.scale * self.dueling.coef)
            state_values = values + (state_values - LEVELS[self.dueling.level](scores, self.scale))
        return QEstimate(scores, state_values, advantages)

    def targets(self, target: QEstimate, online: QEstimate, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Targets of Q of each action, by the target network (and the online one, if double)."""
        assert rollout.rewards is not None
        mask = rollout.action_mask
        values, path = self.backup.bootstrap(target, online)
        rewards = torch.where(last_position(mask), rollout.rewards[:, None], 0.0)
        return n_step_targets(
            rewards, rollout.on_grid(values), rollout.on_grid(path), mask, self.gamma, self.n_step
        )

    def errors(
        self, estimate: QEstimate, targets: Float[Tensor, "B T"], rollout: Rollout
    ) -> Float[Tensor, "B T"]:
        """TD errors: Q minus its target."""
        return rollout.on_grid(estimate.q) - targets

    def loss(
        self, estimate: QEstimate, errors: Float[Tensor, "B T"], rollout: Rollout
    ) -> Float[Tensor, "B T"]:
        """Loss of TD errors, plus the conservative penalty.

        Divided by ``scale``, so that the gradient of the logits is weighted by the error itself, as by the advantage in
        a policy gradient ("Equivalence Between Policy Gradients and Soft Q-Learning", arXiv:1704.06440).
        """
        loss = td_loss(errors, self.huber) / self.scale
        if self.conservative:
            chosen = taken(estimate.scores, rollout.tokens[rollout.action_mask])
            gap = (soft_best(estimate.scores, self.scale) - chosen) / self.scale
            loss = loss + self.conservative * rollout.on_grid(gap)
        return loss
