"""The critic: estimates of the reward still to come, which serve as baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from policylab.errors import UserError, check_range


@dataclass(frozen=True)
class Critic:
    """How much of the critic is its own, and how it is trained beside the policy.

    Args:
        coef: weight of the value loss beside the policy's.
        clip: largest move of a value from its old one in an iteration; None does not clip.
        own_layers: 0 is a linear head on the policy's last hidden state, whose loss trains the trunk as well. A
            number above takes copies of the policy's last layers for the critic alone, and ``all`` a whole
            network; then the value loss never moves the policy.
        init: folder of a reward model in Hugging Face format (sequence classification with one output) that the
            critic starts as; None starts from the policy, with values of zero.
    """

    coef: float
    clip: float | None
    own_layers: int | Literal["all"]
    init: str | None

    def __post_init__(self) -> None:
        check_range("algo.critic.coef", self.coef, 0)
        check_range("algo.critic.clip", self.clip, 0, above=True)
        if self.own_layers != "all":
            check_range("algo.critic.own_layers", self.own_layers, 0)
            if self.init is not None:
                raise UserError(
                    f"algo.critic.init={self.init} needs a network of its own, but algo.critic.own_layers is "
                    f"{self.own_layers}: the policy's trunk below cannot be a reward model's; take "
                    "algo.critic.own_layers=all, or algo.critic.init=null"
                )
