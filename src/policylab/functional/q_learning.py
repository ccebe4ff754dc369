"""Q-learning on tokens: state values, advantages, targets.

The state is the prompt with the tokens so far, the action the next token. The LM head's scores ``z`` (logits over
the sampling temperature) rank the actions: ``scale * z`` is Q up to a term that depends on the state alone, so
``softmax(z)``, from which an LM is sampled anyway, is ``softmax(Q / scale)``. ``scale`` has the unit reward a nat.

Axes: ``N`` actions, ``V`` vocabulary, ``B`` sequences, ``T`` sampled positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policylab.functional.advantages import actions_ahead, discounted_returns


def best(scores: Float[Tensor, "N V"], scale: float) -> Float[Tensor, " N"]:
    """``max_a Q(s, a)``: the value of a state if the best action is taken."""
    return scores.amax(-1)


def soft_best(scores: Float[Tensor, "N V"], scale: float) -> Float[Tensor, " N"]:
    """``scale log sum_a exp(Q(s, a) / scale)``: the value of a state if actions are sampled from
    ``softmax(Q / scale)`` and each nat of entropy pays ``scale``.

    "Reinforcement Learning with Deep Energy-Based Policies", arXiv:1702.08165, eq. 4 to 6.
    """
    return scale * (scores / scale).logsumexp(-1)


def mean(scores: Float[Tensor, "N V"], scale: float) -> Float[Tensor, " N"]:
    """Mean over the vocabulary."""
    return scores.mean(-1)


#: What a dueling network subtracts from its scores, so that the value head alone sets the level of Q: "Dueling Network
#: Architectures for Deep Reinforcement Learning", arXiv:1511.06581, eq. 8 (max) and 9 (mean).
LEVELS = {"max": best, "mean": mean, "logsumexp": soft_best}


def taken(scores: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The score of each row's token."""
    return scores.gather(-1, tokens[:, None]).squeeze(-1)


def n_step_targets(
    token_rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    path: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    n: int | None,
) -> Float[Tensor, "B T"]:
    """``y_t = r_t + sum_{0<k<n} gamma^k (r_{t+k} - A_{t+k}) + gamma^n V_{t+n}``; zero outside the mask.

    Steps count true positions; the value after the last is zero. With ``A = 0`` these are the uncorrected
    n-step targets of "Rainbow", arXiv:1710.02298 ("Multi-step learning"). With ``A_t = Q(s_t, a_t) - V_t`` the sum
    is the one-step target plus later TD errors, correct for any policy that chose the tokens: "Q(lambda) with
    Off-Policy Corrections", arXiv:1602.04951, at lambda 1. With ``A = scale log(pi / prior)`` as well it is path
    consistency, "Bridging the Gap Between Value and Policy Based Reinforcement Learning", arXiv:1702.08892, section 4.

    Args:
        values: V of the state in which each action was taken.
        path: A of each action; zeros correct nothing.
        n: steps before V is used; None goes to the end of the sequence, without V.
    """
    returns = discounted_returns(token_rewards - path, mask, gamma)
    targets = returns + path
    if n is not None:
        # The whole return, less its part from t + n on, which V replaces.
        targets = targets + gamma**n * actions_ahead(values - returns, mask, n)
    return targets.masked_fill(~mask, 0.0)


def td_loss(errors: Float[Tensor, "*B"], huber: float | None) -> Float[Tensor, "*B"]:
    """``e^2 / 2``; with ``huber``, linear beyond it: ``huber (|e| - huber / 2)``.

    "Human-level control through deep reinforcement learning", Mnih et al., Nature 2015, clips the error this way.
    """
    if huber is None:
        return 0.5 * errors**2
    size = errors.abs()
    return torch.where(size <= huber, 0.5 * errors**2, huber * (size - 0.5 * huber))


def scale_gradient(x: Float[Tensor, "*B"], factor: float) -> Float[Tensor, "*B"]:
    """The same values, with their gradient multiplied by ``factor``."""
    return x.detach() + factor * (x - x.detach())
