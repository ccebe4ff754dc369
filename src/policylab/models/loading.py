"""Pretrained policies: a folder, the package's own models, or the Hugging Face hub.

Each public function is a ``_target_`` of ``configs/model/*.yaml`` and gives a `LoadedModel`. None of them
falls back to random weights: if a weight is missing from the checkpoint, an error names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

import policylab
from policylab.errors import UserError
from policylab.models import hub
from policylab.models.encoding import takes_chat
from policylab.models.folder import check_folder
from policylab.models.readers import Reader
from policylab.models.refusals import check_finite, check_whole, first_line, refusal

#: Files that a tokenizer may be read from, in addition to those of its class.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")
ASSETS = Path(policylab.__file__).parent / "assets"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode without dropout, its tokenizer, and where it came from."""

    lm: PreTrainedModel
    #: has an EOS token; need not have a pad token. None only on the meta device, for a folder without one
    tokenizer: PreTrainedTokenizerBase
    chat: bool  #: prompts go through the tokenizer's chat template
    source: str  #: where the weights came from, for display and for the run's record
    reader: Callable[[Any], Reader] | None = None  #: its own; None: one of `policylab.models.readers`


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model, from a folder or the hub.

    Args:
        dtype: name of a torch dtype for the weights, such as ``float32``.
        attn_implementation: ``sdpa``, ``eager``, or another of transformers' names.
        trust_remote_code: whether to run Python code that comes with the checkpoint.
        chat: whether to use the chat template; None: if the tokenizer has one.
    """

    dtype: str
    attn_implementation: str
    trust_remote_code: bool
    chat: bool | None


def from_folder(path: str | Path, options: LoadOptions, source: str) -> LoadedModel:
    """Loads a folder in Hugging Face format.

    Raises:
        UserError: when the folder, a file or a weight is missing, or tokenizer and model do not fit.
    """
    folder = check_folder(path)
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder}: no config.json, so no model in Hugging Face format; it holds {found}")
    try:
        return load(str(folder), options, source, local_only=True)
    except OSError as error:
        raise refusal(folder, error) from error


def embedded(
    *,
    name: str,
    path: str | None,
    dtype: str,
    attn_implementation: str,
    trust_remote_code: bool,
    chat: bool | None,
) -> LoadedModel:
    """A model that comes with the package (``policylab/assets/<name>``); ``path`` replaces it by another folder."""
    options = LoadOptions(dtype, attn_implementation, trust_remote_code, chat)
    if path is not None:
        return from_folder(path, options, source=f"folder {path}")
    return from_folder(ASSETS / name, options, source=f"embedded model {name}")


def from_hub(
    *,
    name: str,
    path: str | None,
    dtype: str,
    attn_implementation: str,
    trust_remote_code: bool,
    chat: bool | None,
) -> LoadedModel:
    """The hub's model ``name``: from the folder ``path`` if given, else from the local cache, else downloaded.

    Raises:
        UserError: when it is in none of these places, or the hub does not answer a three-second probe.
    """
    options = LoadOptions(dtype, attn_implementation, trust_remote_code, chat)
    if path is not None:
        return from_folder(path, options, source=f"folder {path}")
    return from_cache(name, options) or download(name, options)


def from_cache(name: str, options: LoadOptions) -> LoadedModel | None:
    """The hub's model ``name`` from the local cache; None when it, or a file of it, is not there."""
    try:
        return load(name, options, source=f"{name} in {hub.cache_folder()}", local_only=True)
    except OSError:
        return None


def download(name: str, options: LoadOptions) -> LoadedModel:
    """Downloads the hub's model ``name``, if a short probe reaches the hub."""
    hub.check_reachable(name)
    try:
        return load(name, options, source=f"{name} from the hub", local_only=False)
    except OSError as error:
        raise UserError(
            f"model {name} is not in the local cache ({hub.cache_folder()}) and the hub did not give it: "
            f"{first_line(error)}"
        ) from error


def on_meta() -> bool:
    """Whether ``torch.device("meta")`` is active: models are then built from their config alone, without weights, and a
    folder with only ``config.json`` is enough. So a run can be planned before its model is downloaded."""
    return torch.get_default_device().type == "meta"


def load(where: str, options: LoadOptions, source: str, *, local_only: bool, **gguf: str) -> LoadedModel:
    """Loads tokenizer and weights from a folder or hub id, and checks them.

    Args:
        gguf: ``gguf_file``, a file to read the config from; on the meta device alone.

    Raises:
        OSError: when the model or a file of it is not there.
        UserError: when the model cannot be used.
    """
    common = {"trust_remote_code": options.trust_remote_code, "local_files_only": local_only}
    try:
        config = without_dropout(AutoConfig.from_pretrained(where, **common, **gguf))
        tokenizer: Any = None
        with suppress(Exception) if on_meta() else nullcontext():  # without weights, it is optional
            tokenizer = read_tokenizer(where, **common)
        kwargs = {"dtype": torch_dtype(options.dtype), "attn_implementation": options.attn_implementation}
        if on_meta():
            code = options.trust_remote_code
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=code, **kwargs)
        else:
            lm = read_weights(AutoModelForCausalLM, where, config=config, **kwargs, **common)
    except (OSError, UserError):
        raise
    except Exception as error:  # any exception while loading
        raise refusal(where, error, options.attn_implementation) from error
    return finished(lm, tokenizer, options.chat, source)


def read_weights(kind: Any, where: str | Path, **settings: Any) -> Any:
    """A model of a folder or hub id, by one of transformers' auto classes.

    Raises:
        UserError: when weights are missing or have another size than the config says.
    """
    with quiet_bars(settings["local_files_only"]):
        # weights of other sizes are refused below, by name
        model, report = kind.from_pretrained(
            where, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    check_whole(where, report)
    return model


def finished(lm: PreTrainedModel, tokenizer: Any, chat: bool | None, source: str) -> LoadedModel:
    """Checks that model and tokenizer fit, and combines them. On the meta device the tokenizer may be None.

    Raises:
        UserError: when a weight is not finite, the tokenizer has no EOS or more ids than the model, or its chat
            template cannot be used.
    """
    embedding: Any = lm.get_input_embeddings()
    if tokenizer is not None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{source}: the tokenizer has no EOS token, so no completion could ever end")
        if len(tokenizer) > (rows := embedding.num_embeddings):
            raise UserError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens but the model embeds {rows}"
            )
    if not on_meta():
        check_finite(lm, source)
    # the pad token may also be a real one, such as EOS: masks come from lengths, so its embedding needs a gradient
    embedding.padding_idx = None
    with_fused_gelu(lm)
    chats = tokenizer is not None and takes_chat(tokenizer, chat, source)
    return LoadedModel(lm.eval(), tokenizer, chats, source)


def with_fused_gelu(model: torch.nn.Module) -> None:
    """Replaces transformers' ``gelu_new`` (eight kernels and saved tensors) by torch's (one)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def read_tokenizer(
    where: str | Path, *, local_files_only: bool, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Saving it writes the same files again.

    Raises:
        OSError: when there is none.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        where, local_files_only=local_files_only, trust_remote_code=trust_remote_code
    )
    files = sorted({*VOCABULARIES, *tokenizer.vocab_files_names.values()})
    if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in files):
        # transformers would create an empty one
        raise OSError(f"no tokenizer there: none of {', '.join(files)}")
    for how_it_was_loaded in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def torch_dtype(name: str) -> torch.dtype:
    """The floating-point torch dtype with this name.

    Raises:
        UserError: when there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            f"model.dtype={name} is not a floating-point dtype; take float32, bfloat16 or float16"
        )
    return dtype


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Sets every dropout probability to zero, in place.

    Log-probs recorded while sampling must equal those recomputed in training. GPT-2's default is 0.1.
    """
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


@contextmanager
def quiet_bars(quiet: bool) -> Iterator[None]:
    """Hides transformers' progress bars, which are useful for downloads only."""
    if not quiet or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
