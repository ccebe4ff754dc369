"""Pretrained policies: a folder, the package's own models, or the Hugging Face hub.

Each public function is a ``_target_`` of ``configs/model/*.yaml`` and gives a `LoadedModel`. None of them
ever falls back to random weights: what the checkpoint lacks is an error that names it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
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
from policylab.models.folder import demand_folder
from policylab.models.readers import Reader

#: Files that a tokenizer is read from, beside those that its class names.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")
#: What each Git LFS pointer begins with.
LFS = b"version https://git-lfs"
ASSETS = Path(policylab.__file__).parent / "assets"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode without dropout, and how to talk to it."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  #: has an EOS; a pad token is neither needed nor assumed
    chat: bool  #: prompts go through the tokenizer's chat template
    source: str  #: where the weights came from, for people and for the run's record
    reader: Callable[[Any], Reader] | None = None  #: of its own; None takes one of `policylab.models.readers`


@dataclass(frozen=True)
class LoadOptions:
    """How to load, whatever the place.

    Args:
        dtype: name of a torch dtype for the weights, such as ``float32``.
        attn_implementation: ``sdpa``, ``eager``, or another that transformers knows.
        trust_remote_code: run Python code that comes with the checkpoint.
        chat: use the chat template; None: if the tokenizer has one.
    """

    dtype: str
    attn_implementation: str
    trust_remote_code: bool
    chat: bool | None


def from_folder(path: str | Path, options: LoadOptions, source: str) -> LoadedModel:
    """Load a folder in Hugging Face format.

    Raises:
        UserError: when the folder, a file or a weight is missing, or tokenizer and model do not fit.
    """
    folder = demand_folder(path)
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
    """A model that comes with the package (``policylab/assets/<name>``), or the folder ``path`` instead."""
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
    """The hub's model ``name``: the folder ``path`` if given, else the local cache, else a download.

    Raises:
        UserError: when it is in neither place, or the hub does not answer a three-second probe.
    """
    options = LoadOptions(dtype, attn_implementation, trust_remote_code, chat)
    if path is not None:
        return from_folder(path, options, source=f"folder {path}")
    return from_cache(name, options) or download(name, options)


def from_cache(name: str, options: LoadOptions) -> LoadedModel | None:
    """The hub's model ``name`` from the local cache, or None when it is not (wholly) there."""
    try:
        return load(name, options, source=f"{name} in {hub.cache_folder()}", local_only=True)
    except OSError:
        return None


def download(name: str, options: LoadOptions) -> LoadedModel:
    """The hub's model ``name``, fetched now, if one short probe says that the hub is there."""
    hub.demand_reachable(name)
    try:
        return load(name, options, source=f"{name} from the hub", local_only=False)
    except OSError as error:
        raise UserError(
            f"model {name} is not in the local cache ({hub.cache_folder()}) and the hub did not give it: "
            f"{first_line(error)}"
        ) from error


def load(where: str, options: LoadOptions, source: str, *, local_only: bool) -> LoadedModel:
    """Load tokenizer and weights from a folder or hub id and check them.

    Raises:
        OSError: when there is nothing (whole) at that place.
        UserError: when what is there cannot be used.
    """
    common = {"trust_remote_code": options.trust_remote_code, "local_files_only": local_only}
    dtype = torch_dtype(options.dtype)
    try:
        config = without_dropout(AutoConfig.from_pretrained(where, **common))
        tokenizer = read_tokenizer(where, **common)
        with quiet_bars(local_only):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                attn_implementation=options.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **common,
            )
    except OSError:
        raise
    except Exception as error:  # whatever the libraries raise at what they find there
        raise refusal(where, error, options.attn_implementation) from error
    lm, report = loaded
    demand_whole(where, report)
    return finished(lm, tokenizer, options.chat, source)


def demand_whole(where: str | Path, report: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another model than its config describes.

    Args:
        report: transformers' own of the loading.

    Raises:
        UserError: naming weights that are missing or of another size.
    """
    if report["missing_keys"]:
        raise UserError(f"{where} lacks weights: {_some(report['missing_keys'])}; take a whole checkpoint")
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise UserError(
            f"{where}: weights of other sizes than config.json says, such as {name}: {list(found)} for "
            f"{list(wanted)} ({len(report['mismatched_keys'])} in all); take the config that belongs to the weights"
        )


def refusal(where: str | Path, error: Exception, attention: str | None = None) -> UserError:
    """Why a model cannot be loaded, in one line.

    Args:
        where: a folder or hub id.
        error: what the libraries said.
        attention: the implementation that was asked for.
    """
    folder, words = Path(where), str(error)
    files = sorted(file for file in folder.glob("*") if file.is_file())
    if pointers := [file.name for file in files if is_lfs_pointer(file)]:
        return UserError(
            f"{folder}: {_some(set(pointers))}: a Git LFS pointer, not the file itself; run git lfs pull where it was "
            "cloned, or download the file"
        )
    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
        weights = [file.name for file in files if file.suffix in (".safetensors", ".bin")]
        what = f"a file of weights ({_some(set(weights))})" if weights else "a file of weights"
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        return UserError(
            f"{where}: {what} is damaged or holds more than tensors{reason}; copy or download it again"
        )
    if "trust_remote_code" in words:
        return UserError(
            f"{where} comes with Python code of its own, which runs only if this command says so: with "
            "model.trust_remote_code=true (train.py), or trust_remote_code=true (evaluate.py, generate.py)"
        )
    if attention not in (None, "eager") and "does not support" in words and "ttention" in words:
        return UserError(
            f"{where}: {words.split(maxsplit=1)[0]} has no {attention} attention; take model.attn_implementation=eager"
        )
    kind = (
        ""
        if isinstance(error, OSError | ValueError | RuntimeError | ImportError)
        else f"{type(error).__name__}: "
    )
    return UserError(f"cannot load {where}: {kind}{first_line(error)}")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git leaves in the place of a large one that was not fetched."""
    with file.open("rb") as content:
        return content.read(len(LFS)) == LFS


def reward_model(path: str, dtype: torch.dtype, attn_implementation: str) -> Any:
    """A model for sequence classification with one output, a linear ``score`` of its last hidden state.

    Raises:
        UserError: when the folder holds no such model, or not all of its weights.
    """
    name, folder = f"algo.critic.init={path}", Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no folder with a config.json there (looked in {Path.cwd()})")
    try:
        config = without_dropout(AutoConfig.from_pretrained(folder, local_files_only=True))
        if config.num_labels != 1:
            raise UserError(f"{name} has {config.num_labels} outputs; a critic takes a reward model with 1")
        with quiet_bars(True):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                local_files_only=True,
            )
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise at what they find there
        raise UserError(f"{name} cannot be loaded: {refusal(folder, error, attn_implementation)}") from error
    demand_whole(name, report)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(
            f"{name} is a {type(model).__name__}, which has no linear score of a causal LM's states"
        )
    demand_finite(model, name)
    with_fused_gelu(model)
    return model.eval()


def finished(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool | None, source: str
) -> LoadedModel:
    """Check that model and tokenizer fit, and bundle them.

    Raises:
        UserError: when a weight is not finite, the tokenizer has no EOS or knows more ids than the model, or its chat
            template cannot be used.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no EOS token, so no completion could ever end")
    embedding: Any = lm.get_input_embeddings()
    if len(tokenizer) > (rows := embedding.num_embeddings):
        raise UserError(f"{source}: the tokenizer has {len(tokenizer)} tokens but the model embeds {rows}")
    demand_finite(lm, source)
    # A pad token may be a real one as well, such as EOS: masks come from lengths, and its embedding has a gradient.
    embedding.padding_idx = None
    with_fused_gelu(lm)
    return LoadedModel(lm.eval(), tokenizer, takes_chat(tokenizer, chat, source), source)


@torch.no_grad()
def demand_finite(model: torch.nn.Module, source: str) -> None:
    """Refuses weights that are no numbers, which would spoil every sample.

    Raises:
        UserError: naming them.
    """
    bad = {name for name, weight in model.named_parameters() if not weight.isfinite().all()}
    if bad:
        raise UserError(
            f"{source}: the weights hold NaN or infinity in {_some(bad)}; take a sound checkpoint, or a wider "
            "model.dtype where they are too large for this one"
        )


def with_fused_gelu(model: torch.nn.Module) -> None:
    """Puts torch's own kernel in the place of transformers' ``gelu_new``, which writes the same formula out in eight.

    Nor does it keep what each of the eight would need for its gradient.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def read_tokenizer(
    where: str | Path, *, local_files_only: bool, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Saved again, it gives the files that it came from.

    Raises:
        OSError: when there is none at that place.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        where, local_files_only=local_files_only, trust_remote_code=trust_remote_code
    )
    files = sorted({*VOCABULARIES, *tokenizer.vocab_files_names.values()})
    if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in files):
        raise OSError(f"no tokenizer there: none of {', '.join(files)}")  # transformers makes up an empty one
    for how_it_was_loaded in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def torch_dtype(name: str) -> torch.dtype:
    """The floating-point torch dtype of that name.

    Raises:
        UserError: when there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"model.dtype={name} is no floating-point dtype; take float32, bfloat16 or float16")
    return dtype


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout probability to zero, in place.

    Log-probs recorded while sampling must equal those recomputed in training. GPT-2's default is 0.1.
    """
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def first_line(error: Exception) -> str:
    """What an exception says, cut to one line; two where the first is but a heading."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return first or type(error).__name__


def _some(names: set[str]) -> str:
    """The first few of many names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(ordered[:4]) + more


@contextmanager
def quiet_bars(quiet: bool) -> Iterator[None]:
    """Hide transformers' progress bars: one for a download is welcome, one for reading a file is noise."""
    if not quiet or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
