"""Reward models: a causal LM with a linear layer that maps its last hidden state to a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from policylab.errors import UserError
from policylab.models.loading import read_weights, with_fused_gelu, without_dropout
from policylab.models.refusals import check_finite, refusal


def reward_model(path: str, dtype: torch.dtype, attn_implementation: str) -> Any:
    """A model for sequence classification with one output, a linear ``score`` of its last hidden state.

    Raises:
        UserError: when the folder has no such model, or lacks some of its weights.
    """
    name, folder = f"algo.critic.init={path}", Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no folder with a config.json there (looked in {Path.cwd()})")
    try:
        config = without_dropout(AutoConfig.from_pretrained(folder, local_files_only=True))
        if config.num_labels != 1:
            raise UserError(f"{name} has {config.num_labels} outputs; a critic takes a reward model with 1")
        kwargs = {"dtype": dtype, "attn_implementation": attn_implementation, "local_files_only": True}
        model = read_weights(AutoModelForSequenceClassification, folder, config=config, **kwargs)
    except UserError:
        raise
    except Exception as error:  # any exception while loading
        raise UserError(f"{name} cannot be loaded: {refusal(folder, error, attn_implementation)}") from error
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(
            f"{name} is a {type(model).__name__}, which has no linear score of a causal LM's states"
        )
    check_finite(model, name)
    with_fused_gelu(model)
    return model.eval()
