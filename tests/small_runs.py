"""Trains in this process, so small that a preset takes a quarter of a second, and returns metrics and weights.

All presets share one base config and differ only in ``algo``, so comparisons do not depend on numbers that are tuned
for a pair of algorithm and model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.nn.functional import pad

from policylab.config import resolvers
from policylab.data.rollout import Completion, Rollout
from policylab.rewards.base import Reward

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "algo").glob("*.yaml"))
resolvers.register(ROOT)
#: One of each kind: a critic and minibatches, groups sampled anew, a trust region, a replay memory, imitation.
OF_EACH_KIND = ("ppo", "dapo", "trpo", "dqn", "sft")


def quick(values: Iterable[str], in_all_runs: Iterable[str] = OF_EACH_KIND) -> list[Any]:
    """Values for ``parametrize``; those that are not named run only in the slow tests."""
    named = set(in_all_runs)
    return [value if value in named else pytest.param(value, marks=pytest.mark.slow) for value in values]


#: A policy of 4,000 weights on 22 letters. About half of its completions end, the others are cut. With so large an
#: epsilon, Adam's step depends on the size of the gradient, so a factor of the loss has an effect.
SMALL = {
    "iterations": 3,
    "seed": 0,
    "task.walks": 40,
    "task.held_out": 1,
    "model.architecture.n_layer": 1,
    "model.architecture.n_embd": 16,
    "model.architecture.n_head": 2,
    "rollout.prompts": 4,
    "rollout.group_size": 3,
    "rollout.max_new_tokens": 8,
    "rollout.temperature": 1.0,
    "optim.lr": 0.3,
    "optim.critic_lr": None,
    "optim.betas": [0.9, 0.95],
    "optim.eps": 0.1,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": None,
    "optim.schedule": "constant",
    "optim.warmup": 0,
    "optim.micro_batch_tokens": None,
}


@dataclass(frozen=True)
class Trace:
    """The results of a run.

    Attributes:
        metrics: metrics of each iteration, without timings.
        policy: all weights of the language model after the last iteration, flat.
        critic: all weights of the critic, flat; empty without a critic.
        passes: number of forward passes of the language model.
    """

    metrics: list[dict[str, float]]
    policy: Tensor
    critic: Tensor
    passes: int

    def distance(self, other: Self) -> float:
        """The largest difference between the policies' weights."""
        return float((self.policy - other.policy).abs().max())


@cache
def algo(preset: str, *overrides: str) -> DictConfig:
    """The ``algo`` of a preset, with other options of its axes, such as ``algo/kl=none``."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(f"algo/{preset}", list(overrides)).algo


@cache
def base(*overrides: str) -> DictConfig:
    """A training config without its ``algo``, and without callbacks and loggers, so that it writes no file."""
    quiet = ["callbacks=none", "callbacks.checkpoint=null", "logger.csv=null", "hardware=cpu", "~algo_model"]
    nowhere = ["paths.run=nowhere", "validation.prompts=1"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*overrides, *quiet, *nowhere])


def assemble(start: DictConfig, algo: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    """A copy of ``start`` with this ``algo``, and then with these values, by dotted path."""
    config = copy.deepcopy(start)
    with open_dict(config):
        config.algo = copy.deepcopy(algo)
        if "replay" in algo:  # 64 sequences per update would be most of a small run's time
            config.algo.replay.batch_size = 12
        for path, value in changes.items():
            OmegaConf.update(config, path, value, merge=False)
    return config


def small(algo: DictConfig, changes: Mapping[str, Any], task: str = "random_walks") -> DictConfig:
    """The small config with this ``algo``; the changes come last."""
    settings = {k: v for k, v in SMALL.items() if task == "random_walks" or not k.startswith("task.")}
    return assemble(base(f"task={task}", "model=walker_scratch"), algo, settings | dict(changes))


def levels(completions: Sequence[Completion]) -> list[float]:
    """A reward with three levels, by the sum of token ids: most groups have different rewards, some have equal ones."""
    return [(0.0, 0.0, 1.0, 0.3)[sum(completion.tokens) % 4] for completion in completions]


class Changed:
    """An engine that changes its rollouts."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def sample(self, *args: Any, **kwargs: Any) -> Rollout:
        return self.change(self._engine.sample(*args, **kwargs))

    def change(self, rollout: Rollout) -> Rollout:
        raise NotImplementedError


class Drifting(Changed):
    """Records log-probs that are wrong by up to 0.7 nats, as if the sampler differed from the policy."""

    def change(self, rollout: Rollout) -> Rollout:
        place = torch.arange(rollout.logprobs.numel()).reshape(rollout.logprobs.shape)
        drifted = rollout.logprobs + 0.7 * torch.sin(place)
        return rollout.replace(logprobs=drifted.masked_fill(~rollout.action_mask, 0.0))


class Broken(Changed):
    """Records log-probs that are not finite, so that no update can be made."""

    def change(self, rollout: Rollout) -> Rollout:
        return rollout.replace(logprobs=rollout.logprobs / 0.0)


class Padded(Changed):
    """Adds three columns of padding to completions and two to prompts, with tokens that are not pad tokens."""

    def change(self, rollout: Rollout) -> Rollout:
        present = [
            f for f in ("tokens", "action_mask", "logprobs", "values") if getattr(rollout, f) is not None
        ]
        wide = {field: pad(getattr(rollout, field), (0, 3)) for field in present}
        behind = torch.arange(wide["tokens"].shape[1]) >= rollout.lengths[:, None]
        prompt = pad(rollout.prompt_tokens, (2, 0))
        before = torch.arange(prompt.shape[1]) < prompt.shape[1] - rollout.prompt_lengths[:, None]
        wide["tokens"] = wide["tokens"].masked_fill(behind, 5)
        return rollout.replace(**wide, prompt_tokens=prompt.masked_fill(before, 7))


def train(
    config: DictConfig, reward: Reward | None = levels, engine: Callable[[Any], Any] = lambda engine: engine
) -> Trace:
    """Trains in this process, without validation and preflight.

    Args:
        reward: None for the config's.
        engine: wraps the config's engine.

    Raises:
        UserError: when the config is refused.
    """
    from policylab.config.build import build

    with quiet():
        experiment = build(config, Path("nowhere"))
    module, trainer = experiment.module, experiment.trainer
    trainer.limit_val_batches = 0
    module._checked = True
    module.sampler.engine = engine(module.sampler.engine)
    module.sampler.scorer.reward = module.sampler.scorer.reward if reward is None else reward
    metrics = list[dict[str, float]]()
    passes = list[None]()
    module.record = lambda new: metrics.append({k: v for k, v in new.items() if not k.startswith("perf/")})
    module.policy.lm.register_forward_pre_hook(lambda *_: passes.append(None))
    with quiet():
        trainer.fit(module, datamodule=experiment.data)
    critic = module.policy.critic
    return Trace(
        metrics=metrics,
        policy=flat(module.policy.lm.parameters()),
        critic=flat([] if critic is None else critic.parameters()),
        passes=len(passes),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's output about each trainer; the tests create hundreds."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def flat(parameters: Iterable[nn.Parameter]) -> Tensor:
    """All parameters in one vector; sharded ones are gathered from all processes."""
    from policylab.distributed.sharding import whole

    return torch.cat([torch.zeros(0), *(whole(parameter.detach()).flatten() for parameter in parameters)])
