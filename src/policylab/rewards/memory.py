"""What a reward remembers from one call to the next goes into the checkpoints, where it says how."""

from __future__ import annotations

import io
from typing import Any

from policylab.errors import UserError
from policylab.rewards.base import Reward, reward_name
from policylab.rewards.networks import is_network
from policylab.user_code import call


def remembers(reward: Reward) -> bool:
    """Whether it has ``state_dict()`` and ``load_state_dict(state)``. The weights of a network are not meant: they come
    from where they came from."""
    says_how = all(hasattr(reward, name) for name in ("state_dict", "load_state_dict"))
    return says_how and not is_network(reward)


def memory_of(reward: Reward) -> Any:
    """A copy of what the reward remembers now; None where it says nothing of it.

    Raises:
        UserError: for a state that could not be read back.
    """
    if not remembers(reward):
        return None
    import torch

    state = call(f"the state_dict of reward {reward_name(reward)}", reward.state_dict)  # type: ignore[attr-defined]
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except Exception as error:  # pickle raises what it likes
        raise UserError(
            f"the state_dict of reward {reward_name(reward)} holds more than plain values and tensors, which is all "
            f"that checkpoints keep: {str(error).splitlines()[0]}"
        ) from error


def remind(reward: Reward, state: Any) -> None:
    """Has the reward go on from what it remembered.

    Raises:
        RunError: when it cannot.
    """
    if state is not None and remembers(reward):
        call(f"the load_state_dict of reward {reward_name(reward)}", reward.load_state_dict, state)  # type: ignore[attr-defined]
