"""What a reward remembers from one call to the next goes into the checkpoints, where it says how."""

from __future__ import annotations

import io
from typing import Any

from policylab.errors import UserError
from policylab.rewards.base import Reward, reward_name


def remembers(reward: Reward) -> bool:
    """Whether it has ``state_dict()`` and ``load_state_dict(state)``. The weights of a network are not meant: they come
    from where they came from."""
    if not all(hasattr(reward, name) for name in ("state_dict", "load_state_dict")):
        return False
    from torch import nn  # not before: processes that score start without it

    return not isinstance(reward, nn.Module)


def memory_of(reward: Reward) -> Any:
    """A copy of what the reward remembers now; None where it says nothing of it.

    Raises:
        UserError: for a state that could not be read back.
    """
    if not remembers(reward):
        return None
    import torch

    state = reward.state_dict()  # type: ignore[attr-defined]
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
    """Has the reward go on from what it remembered."""
    if state is not None and remembers(reward):
        reward.load_state_dict(state)  # type: ignore[attr-defined]
