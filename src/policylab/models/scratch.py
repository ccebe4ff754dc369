"""Policies with random weights, for configs whose name ends in ``_scratch`` (``model=gpt2_scratch``)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from policylab.errors import UserError
from policylab.models import hub
from policylab.models.loading import (
    ASSETS,
    LoadedModel,
    finished,
    read_tokenizer,
    torch_dtype,
    without_dropout,
)
from policylab.models.refusals import first_line, refusal


def from_scratch(
    *,
    name: str,
    tokenizer: str,
    architecture: Mapping[str, Any],
    vocab_size: int | None,
    seed: int,
    dtype: str,
    attn_implementation: str,
) -> LoadedModel:
    """A model with random weights that depend only on ``seed``, so they are the same in every process.

    Args:
        name: part of the run folder's name.
        tokenizer: an embedded one (``tiny``, ``walker``), a local folder, or a hub id.
        architecture: ``model_type`` as transformers calls it (``gpt2``, ``llama``) and fields of its config.
        vocab_size: None: the tokenizer's.
        seed: seed of the random weights.
        dtype: name of a torch dtype.
        attn_implementation: as transformers calls it.

    Raises:
        UserError: when the tokenizer is not found, a field is unknown, or ``vocab_size`` is below the tokenizer's.
    """
    config, text = architecture_of(tokenizer, architecture, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            lm = AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype(dtype), attn_implementation=attn_implementation
            )
        except UserError:
            raise
        except Exception as error:  # any exception of the architecture about these fields
            raise refusal("model.architecture", error, attn_implementation) from error
    return finished(lm, text, chat=None, source=f"random weights, seed {seed}")


def architecture_of(
    tokenizer: str, architecture: Mapping[str, Any], vocab_size: int | None
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a model with random weights; arguments and errors as of `from_scratch`."""
    text = find_tokenizer(tokenizer)
    size = len(text) if vocab_size is None else vocab_size
    if size < len(text):
        raise UserError(f"model.vocab_size={size} is below the {len(text)} tokens of tokenizer {tokenizer}")
    fields = dict(architecture) | {
        "vocab_size": size,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
    }
    config_class = _config_class(fields.pop("model_type", None))
    known = _fields(config_class)
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"model.architecture: {config_class.__name__} has no field {', '.join(unknown)}")
    try:
        return without_dropout(config_class(**fields)), text
    except Exception as error:  # any exception of the architecture about these fields
        raise refusal("model.architecture", error) from error


def find_tokenizer(where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an embedded model, of a local folder, or of a hub id (cache first).

    Raises:
        UserError: when it is in none of these places.
    """
    for folder in (ASSETS / where, Path(where).expanduser()):
        if (folder / "tokenizer_config.json").is_file():
            return read_tokenizer(folder, local_files_only=True, trust_remote_code=False)
    try:
        return read_tokenizer(where, local_files_only=True, trust_remote_code=False)
    except OSError:
        reason = hub.why_unreachable()
    if reason is not None:
        raise UserError(
            f"tokenizer {where} is neither an embedded one nor a folder, it is not in the local cache "
            f"({hub.cache_folder()}), and {reason}; without a network take model.tokenizer=tiny or a folder"
        )
    try:
        return read_tokenizer(where, local_files_only=False, trust_remote_code=False)
    except OSError as error:
        raise UserError(f"tokenizer {where}: the hub did not give it: {first_line(error)}") from error


def _fields(config_class: Any) -> set[str]:
    """Names of a config's fields; some are written only if they are set."""
    taken = config_class().to_dict().keys() | config_class.attribute_map.keys()
    return {*taken, *inspect.signature(config_class).parameters}


def _config_class(model_type: str | None) -> Any:
    if model_type is None or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.architecture.model_type={model_type} is not a model type of transformers, such as gpt2"
        )
    return CONFIG_MAPPING[model_type]
