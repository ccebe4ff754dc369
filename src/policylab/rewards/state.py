"""The state of rewards in checkpoints: for rewards that have `state_dict` and `load_state_dict`."""

from __future__ import annotations

import io
from typing import Any

from policylab.errors import UserError
from policylab.rewards.base import reward_name
from policylab.rewards.networks import is_network
from policylab.user_code import call


def state_of(reward: Any) -> Any:
    """A copy of the reward's state; None for a reward without one.

    The weights of a reward that is a network are not part of it: they are frozen, and loaded from their source.

    Raises:
        UserError: for a state that a checkpoint cannot hold.
    """
    methods = all(hasattr(reward, name) for name in ("state_dict", "load_state_dict"))
    if not methods or is_network(reward):
        return None
    import torch

    state = call(f"the state_dict of reward {reward_name(reward)}", reward.state_dict)
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except Exception as error:  # pickle raises errors of any type
        raise UserError(
            f"the state_dict of reward {reward_name(reward)} must hold only plain values and tensors, so that "
            f"checkpoints can save it: {str(error).splitlines()[0]}"
        ) from error


def load_state(reward: Any, state: Any) -> None:
    """Gives the reward a saved state; None: no change.

    Raises:
        RunError: when the reward's own code fails.
    """
    if state is not None:
        call(f"the load_state_dict of reward {reward_name(reward)}", reward.load_state_dict, state)
