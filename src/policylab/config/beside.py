"""Keys of a config group that are not for what the group builds."""

from __future__ import annotations

BESIDE = {
    "model": frozenset({"adapter"}),  # what becomes of it once it is loaded
    "reward": frozenset({"workers", "pool"}),  # who computes it
    "rollout": frozenset({"prompts", "group_size", "max_rows"}),  # what is sampled at a time
    "task": frozenset({"max_new_tokens", "too_long", "turns", "answer_tokens"}),  # lengths
}
