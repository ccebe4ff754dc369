"""Refuses parts of an algorithm that do not go together, with the reason."""

from __future__ import annotations

from policylab.algorithms.advantage import Advantage
from policylab.algorithms.critic import Critic
from policylab.algorithms.critic_advantages import VTrace
from policylab.algorithms.importance import TruncatedImportance
from policylab.algorithms.kl import KLPenalty, NoPenalty
from policylab.algorithms.surrogate import CISPO, ClippedRatio, LogProb, SequenceRatio, Surrogate
from policylab.algorithms.trust_region import TrustRegion
from policylab.algorithms.update import MinibatchEpochs, SingleStep, Update
from policylab.errors import UserError


def check_combination(
    advantage: Advantage,
    surrogate: Surrogate,
    update: Update,
    kl: KLPenalty | NoPenalty,
    critic: Critic | None,
    importance: TruncatedImportance | None,
) -> None:
    """Refuses parts that do not go together.

    Raises:
        UserError: naming them, the reason, and what to take instead.
    """
    credit, loss = type(advantage).__name__, type(surrogate).__name__
    steps = update.epochs * update.minibatches
    critic_steps = steps
    # One epoch of one minibatch is allowed: it is an end point of common sweeps.
    first_and_last = isinstance(update, SingleStep)
    if isinstance(update, TrustRegion):
        first_and_last = update.line_search is None  # a line search evaluates the loss after the step
        critic_steps = update.critic_epochs * update.critic_minibatches
    refusals: list[tuple[bool, str]] = [
        (
            advantage.needs_values and critic is None,
            f"algo.advantage={credit} needs a critic, but algo.critic is none; "
            "take algo/critic=shared_trunk or another algo/advantage",
        ),
        (
            advantage.needs_values and critic is not None and critic.clip is not None and critic_steps == 1,
            f"algo.critic.clip={critic and critic.clip} limits the change of values after a rollout's first update, "
            "and there is only one; take algo.critic.clip=null or algo/update=minibatch_epochs",
        ),
        (
            surrogate.on_policy and steps > 1,
            f"algo.surrogate={loss} is right for only one update of a rollout, and algo.update makes {steps}; "
            "take algo/update=single_step or algo/surrogate=clipped_ratio",
        ),
        (
            isinstance(surrogate, ClippedRatio | SequenceRatio | CISPO) and first_and_last,
            f"algo.surrogate={loss} bounds the ratio to the policy before the update, which is 1 in the first step, "
            "and there is no second one; take algo/surrogate=ratio, whose gradient is the same there, or "
            "algo/update=minibatch_epochs",
        ),
        (
            isinstance(surrogate, LogProb | CISPO)
            and isinstance(update, TrustRegion)
            and update.line_search is not None,
            f"algo.surrogate={loss} does not measure the gain of a step, by which algo.update.line_search "
            "chooses its length; take algo/surrogate=ratio",
        ),
        (
            isinstance(surrogate, SequenceRatio) and not advantage.per_sequence,
            f"algo.surrogate={loss} has one ratio a sequence, and algo.advantage={credit} one credit for each "
            "token; take algo/advantage=group, group_mean, leave_one_out or best_of_group",
        ),
        (
            kl.exact_in_reward and advantage.per_sequence,
            f"algo.kl.estimator=exact in the reward penalizes each token for the KL of later ones, and "
            f"algo.advantage={credit} credits whole sequences, "
            "which would bias it; take algo.kl.estimator=k1 or algo/advantage=whitened_return",
        ),
        (
            isinstance(advantage, VTrace) and isinstance(update, MinibatchEpochs) and update.reestimate,
            "algo.update.reestimate=true makes algo.advantage=VTrace weight tokens by the current policy, which the "
            "surrogate's ratio already does; take algo.update.reestimate=false or algo/advantage=gae",
        ),
        (
            isinstance(surrogate, SequenceRatio) and importance is not None,
            f"algo.surrogate={loss} has one ratio a sequence, and algo/importance=truncated a weight for each token; "
            "take algo/importance=none",
        ),
        (
            isinstance(advantage, VTrace) and importance is not None,
            "algo.advantage=VTrace corrects for the sampler itself, and algo/importance=truncated would do so twice; "
            "take algo/importance=none",
        ),
        (
            isinstance(update, MinibatchEpochs) and update.reestimate and not advantage.needs_values,
            f"algo.update.reestimate=true, but algo.advantage={credit} uses no critic and would estimate the "
            "same again; take false or algo/advantage=gae",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise UserError(reason)
