"""Models without weights: the architecture of a model's config, on torch's meta device.

No weight file is read, and little memory is used. A folder with only ``config.json`` is enough, so a run can be
planned before its model is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from policylab.errors import UserError
from policylab.models import hub
from policylab.models.encoding import takes_chat
from policylab.models.loading import ASSETS, read_tokenizer, torch_dtype, with_fused_gelu
from policylab.models.refusals import first_line, refusal
from policylab.models.scratch import architecture_of
from policylab.models.smollm2 import GGUF_FILE, HUB_ID, find_gguf


@dataclass(frozen=True)
class Outline:
    """A model as its config describes it."""

    lm: Any  #: a causal language model on the meta device
    tokenizer: PreTrainedTokenizerBase | None  #: None if the folder has none
    chat: bool  #: prompts go through the tokenizer's chat template
    source: str  #: where the config came from, for display


def outline(settings: Mapping[str, Any]) -> Outline:
    """The model of ``config.model``, as plain data.

    Raises:
        UserError: when the config cannot be read, or the kind of model is unknown.
    """
    target = settings["_target_"]
    if target not in PLACES:
        raise UserError(
            f"plan=true supports the models of {', '.join(sorted(PLACES))}, and model._target_ is {target}; save the "
            "model's config.json in a folder and take model=hf model.path=FOLDER model.name=LABEL"
        )
    path = settings.get("path")
    found = _in_folder(Path(path), settings) if path else PLACES[target](settings)
    config, tokenizer, source = found
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                config,
                dtype=torch_dtype(settings["dtype"]),
                attn_implementation=settings["attn_implementation"],
                trust_remote_code=settings.get("trust_remote_code", False),
            )
    except UserError:
        raise
    except Exception as error:  # any exception while the architecture is built
        raise refusal(source, error, settings["attn_implementation"]) from error
    with_fused_gelu(lm)
    chat = tokenizer is not None and takes_chat(tokenizer, settings.get("chat"), source)
    return Outline(lm, tokenizer, chat, source)


Found = tuple[PretrainedConfig, PreTrainedTokenizerBase | None, str]


def _in_folder(path: Path, settings: Mapping[str, Any]) -> Found:
    """The config of a folder, and its tokenizer if it has one."""
    folder = path.expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json there (looked in {Path.cwd()})")
    return _read(str(folder), settings, str(folder))


def _embedded(settings: Mapping[str, Any]) -> Found:
    return _read(str(ASSETS / settings["name"]), settings, f"embedded model {settings['name']}")


def _from_hub(settings: Mapping[str, Any]) -> Found:
    name = settings["name"]
    if hub.is_cached(name):
        return _read(name, settings, f"{name} in {hub.cache_folder()}")
    hub.check_reachable(name)
    return _read(name, settings, f"{name} from the hub", local_only=False)


def _smollm2(settings: Mapping[str, Any]) -> Found:
    converted = Path(settings["cache_dir"]) / settings["name"]
    if hub.is_cached(HUB_ID):
        return _read(HUB_ID, settings, HUB_ID)
    if (converted / "config.json").is_file():
        return _read(str(converted), settings, str(converted))
    if (gguf := find_gguf()) is not None:
        return _read(str(gguf.parent), settings, GGUF_FILE, gguf_file=GGUF_FILE)
    return _from_hub({**settings, "name": HUB_ID})


def _scratch(settings: Mapping[str, Any]) -> Found:
    config, tokenizer = architecture_of(
        settings["tokenizer"], settings["architecture"], settings["vocab_size"]
    )
    return config, tokenizer, "random weights"


PLACES: dict[str, Callable[[Mapping[str, Any]], Found]] = {
    "policylab.models.loading.embedded": _embedded,
    "policylab.models.loading.from_hub": _from_hub,
    "policylab.models.smollm2.smollm2": _smollm2,
    "policylab.models.scratch.from_scratch": _scratch,
}


def _read(
    where: str, settings: Mapping[str, Any], source: str, *, local_only: bool = True, **extra: Any
) -> Found:
    """Config and tokenizer of a folder or hub id."""
    common = {"local_files_only": local_only, "trust_remote_code": settings["trust_remote_code"]}
    try:
        config = AutoConfig.from_pretrained(where, **common, **extra)
    except Exception as error:  # any exception while loading
        raise UserError(f"no model config in {where}: {first_line(error)}") from error
    try:
        tokenizer = None if extra else read_tokenizer(where, **common)
    except Exception:  # a tokenizer is optional
        tokenizer = None
    return config, tokenizer, source
