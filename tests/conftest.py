"""Shared by all tests: shape checks, no network, one thread, composed configs, small policies."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Must be set before the import of the libraries that read them.
os.environ.update(
    {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
)
os.environ["POLICYLAB_PRODUCTS"] = (
    "onednn"  # fixed: golden metrics depend on it, and no test should measure the machine
)

from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

# The shapes in signatures are checked only in tests, because the checks take time.
install_import_hook(
    ["policylab.functional", "policylab.algorithms", "policylab.data.rollout"], "typecheck.check"
)

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict, read_write

from policylab.config import resolvers
from policylab.functional import products

if TYPE_CHECKING:
    from policylab.models.loading import LoadedModel
    from policylab.models.policy import Policy

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # small tensors are slower with threads, and sums must keep their order
resolvers.register(ROOT)
products.use(products.ONEDNN)

Compose = Callable[..., DictConfig]
Train = Callable[[Sequence[str]], Path]


#: Tests of pure functions.
OF_FUNCTIONS = {
    *("test_functional", "test_advantages", "test_surrogates", "test_q_learning", "test_trust_region"),
    *("test_training", "test_enumeration"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Checks shapes in slow tests and in tests of functions only: in whole runs the checks take a fifth of the time."""
    checks = "slow" in item.keywords or item.path.stem in OF_FUNCTIONS
    shape_checks.update("jaxtyping_disable", not checks)


def pytest_collection_finish() -> None:
    """Imported modules are never freed, so the garbage collector may skip them."""
    gc.freeze()


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """``compose(["algo=ppo", "seed=1"], config_name="train")`` gives the config that the script would get.

    The run folder is ``tmp_path / "run"``, and ``logs/`` lies beside it.
    """

    def compose_config(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
        resolvers.run_dir.cache_clear()
        config = composed(config_name, tuple(overrides))
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.run.dir = config.hydra.runtime.output_dir = str(tmp_path / "run")
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config.hydra
            if "paths" in config:
                config.paths.logs = str(tmp_path / "logs")
        return config

    return compose_config


def composed(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    """The config as Hydra composes it. For speed, it composes the same choices once, and sets values in a copy."""
    choices = tuple(word for word in overrides if is_choice(word))
    config = deepcopy(chosen(config_name, choices))
    values = [word for word in overrides if not is_choice(word)]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return config


@lru_cache(maxsize=64)
def chosen(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    """Hydra's config of these choices, composed once."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra_compose(config_name, list(choices), return_hydra_config=True)


def is_choice(override: str) -> bool:
    """Whether an override selects a file or is one of Hydra's own; all others set a value."""
    key = override.partition("=")[0].lstrip("+~")
    folders = ROOT / "configs" / key, ROOT / key
    return key.startswith("hydra.") or "@" in key or any(folder.is_dir() for folder in folders)


@pytest.fixture
def train_briefly(compose: Compose, tmp_path: Path) -> Train:
    """``train_briefly(["algo=ppo"])`` trains two small iterations in this process and returns the run folder."""

    def train(overrides: Sequence[str]) -> Path:
        from policylab.config.settle import settle
        from policylab.launch import run

        folder = tmp_path / "run"
        folder.mkdir()
        run.train(settle(brief(compose(overrides))), folder, list(overrides))
        return folder

    return train


def brief(config: DictConfig) -> DictConfig:
    """Reduces a training config to two iterations of four prompts, with completions of eight tokens."""
    config.iterations = 2
    config.validation.every = 2
    config.validation.prompts = 4
    config.rollout.prompts = 4
    config.rollout.max_new_tokens = min(config.rollout.max_new_tokens, 8)
    return config


def evaluated(run: Path, *words: str, checkpoint: str | Path = "last") -> dict[str, Any]:
    """The content of the file that ``evaluate.py run=RUN`` writes."""
    from policylab.launch.evaluate import evaluate
    from policylab.runs.find import find_checkpoint

    return evaluate(run, find_checkpoint(run, checkpoint), composed("evaluate", words))


def generated(run: Path, *words: str, policy: str = "final") -> list[str]:
    """The completions of ``generate.py run=RUN prompt="the film"``."""
    from policylab.launch.generate import completions, load_trained

    return completions(load_trained(run, policy), "the film", composed("generate", words))


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """The smallest GPT-2 with several heads and layers, with random weights and the tiny tokenizer."""
    return scratch_model(model_type="gpt2", n_layer=2, n_embd=32, n_head=2, n_positions=64)


@pytest.fixture(scope="session")
def llama() -> LoadedModel:
    """A Llama of the same size: rotary positions, grouped keys, no position table."""
    return scratch_model(
        model_type="llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def scratch_model(attention: str = "sdpa", /, **architecture: object) -> LoadedModel:
    """A model with random weights that are the same in every test."""
    from policylab.models.scratch import from_scratch

    return from_scratch(
        name="test",
        tokenizer="tiny",
        architecture=architecture,
        vocab_size=None,
        seed=0,
        dtype="float32",
        attn_implementation=attention,
    )


@pytest.fixture
def tiny_policy(tiny: LoadedModel) -> Policy:
    """A fresh policy with a value head around `tiny`; a test may train it."""
    return fresh_policy(tiny)


@pytest.fixture
def llama_policy(llama: LoadedModel) -> Policy:
    """A fresh policy with a value head around `llama`; a test may train it."""
    return fresh_policy(llama)


def fresh_policy(loaded: LoadedModel, own_layers: int | str = 0) -> Policy:
    """A policy on a copy of the model, with a random value head, so that values differ."""
    from dataclasses import replace

    from policylab.models.critic import value_model
    from policylab.models.policy import Policy

    lm = deepcopy(loaded.lm)
    policy = Policy(replace(loaded, lm=lm), value_model(lm, own_layers, init=None)).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(policy.critic.head.weight, std=0.2)
    return policy
