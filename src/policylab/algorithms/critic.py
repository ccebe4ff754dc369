"""The critic: estimates of the reward still to come, used as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from policylab.errors import UserError, check_range


@dataclass(frozen=True)
class Critic:
    """How much the critic shares with the policy, and how it is trained.

    Args:
        coef: weight of the value loss relative to the policy's.
        clip: largest change of a value in an iteration; None: no clipping.
        own_layers: 0: a linear head on the policy's last hidden state, whose loss also trains the trunk. Above 0: the
            critic's own copies of the policy's last layers; ``all``: a whole network. With either, the value loss never
            trains the policy.
        init: folder of a reward model in Hugging Face format (sequence classification with one output) that the
            critic starts as; None: starts from the policy, with values of zero.
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
                    f"algo.critic.init={self.init} needs a separate network, but algo.critic.own_layers is "
                    f"{self.own_layers}: the policy's trunk cannot be that of a reward model; take "
                    "algo.critic.own_layers=all, or algo.critic.init=null"
                )
