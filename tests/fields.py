"""Every field of a config node, with another value for it and the settings under which that value has an effect."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from small_runs import Broken, Drifting

Engine = Callable[[Any], Any]


def part(name: str, **fields: Any) -> dict[str, Any]:
    """The node of a part of an algorithm."""
    return {"_target_": f"policylab.algorithms.{name}", **fields}


@dataclass(frozen=True)
class Field:
    """A field of a part: ``Field("algo.advantage", "GAE", "lam", float, 0.95)``."""

    node: str
    part: str
    name: str
    hint: Any
    value: Any

    @property
    def path(self) -> str:
        """Dotted path of the field in the config."""
        return f"{self.node}.{self.name}"

    @property
    def kind(self) -> str:
        """``GAE.lam``: the same in all presets."""
        return f"{self.part}.{self.name}"


@dataclass(frozen=True)
class Variation:
    """How to change a field for which the rule of :func:`values` is not enough.

    Attributes:
        value: the other value; ``None`` leaves it to the rule.
        given: settings of both runs, with the old and with the new value, without which the field has no effect.
        engine: wraps the engine of the rollouts.
        seen_in: where the difference must show: in the policy's weights; or, if these must stay the same, in the
            metrics, in the number of forward passes, or in the weights' last digits.
    """

    value: Any = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    engine: Engine | None = None
    seen_in: Literal["weights", "metrics", "passes", "rounding"] = "weights"


def variations(reward_model: Path) -> dict[str, Variation]:
    """Fields for which the rule is not enough, by :attr:`Field.kind`.

    Args:
        reward_model: folder of a reward model, to initialize a critic from.
    """
    critic = part("Critic", coef=0.1, clip=None, own_layers=0, init=None)
    needs_critic = {
        "algo.advantage": part("GAE", gamma=1.0, lam=0.9, whiten=False),
        "algo.surrogate": part("Ratio"),
    }
    far = {
        "algo.update.max_kl": 30.0
    }  # so far that the quadratic model is wrong, so the line search has to shorten steps
    return {
        # Without a critic, an advantage that needs values is refused.
        "Algorithm.critic": Variation(critic, given=needs_critic),
        "Algorithm.sampling": Variation(part("DynamicSampling", rounds=2)),
        "Algorithm.truncation": Variation(part("MaskTruncated")),
        "Algorithm.importance": Variation(part("TruncatedImportance", cap=2.0), engine=Drifting),
        "TruncatedImportance.cap": Variation(1.1, engine=Drifting),
        "VTrace.rho_clip": Variation(engine=Drifting),
        "VTrace.c_clip": Variation(engine=Drifting),
        "NStep.n": Variation(1),
        # Pairs have equal rewards more often than groups of three: some still have after one round.
        "DynamicSampling.rounds": Variation(1, given={"rollout.prompts": 6, "rollout.group_size": 2}),
        # Ratios stay below 3 in so short a training.
        "ClippedRatio.dual_clip": Variation(1.3),
        "CISPO.clip_low": Variation(0.1),
        "CISPO.clip_high": Variation(0.1),
        # Hardly any ratio of a whole sequence lies between the paper's bounds and half of them.
        "SequenceRatio.clip_low": Variation(0.3),
        "SequenceRatio.clip_high": Variation(0.3),
        # If only the best of a group counts, only a large coefficient changes which one it is.
        "FixedCoefficient.initial": Variation(1.0),
        # k1 is allowed only in the reward, k3 only in the loss.
        "KLPenalty.place": Variation(given={"algo.kl.estimator": "exact"}),
        # Each iteration changes the coefficient by 20 % x sequences / horizon at most, whatever the target.
        "AdaptiveCoefficient.target": Variation(1e-3, given={"algo.kl.controller.horizon": 20}),
        "AdaptiveCoefficient.horizon": Variation(20),
        # A reference without a penalty changes only the metrics.
        "NoPenalty.reference": Variation(part("FrozenReference"), seen_in="metrics"),
        "MinibatchEpochs.kl_stop": Variation(1e-4),
        # Refused where the advantage reads neither critic nor policy.
        "MinibatchEpochs.reestimate": Variation(True, given={**needs_critic, "algo.critic": critic}),
        "Critic.clip": Variation(0.01),
        "Critic.init": Variation(str(reward_model), given={"algo.critic.own_layers": "all"}),
        # Both ways give the same product, up to rounding.
        "TrustRegion.products": Variation(seen_in="rounding"),
        "TrustRegion.line_search": Variation(part("LineSearch", max_steps=5, shrink=0.5), given=far),
        "TrustRegion.cg_iterations": Variation(1),
        "TrustRegion.cg_tolerance": Variation(0.9),
        # 12 sequences cannot be cut into 5 parts.
        "TrustRegion.critic_minibatches": Variation(2),
        "LineSearch.max_steps": Variation(1, given=far),
        "LineSearch.shrink": Variation(given=far),
        # Completions have 8 tokens: with n_step of 8 or more, no target network is used.
        "QLearning.n_step": Variation(1),
        "QLearning.huber": Variation(0.01),
        "QLearning.dueling": Variation(part("Dueling", level="logsumexp", coef=0.1, own_layers=0)),
        "QLearning.target": Variation(part("TargetNetwork", every=1, rate=0.1)),
        "HardBackup.double": Variation(given={"algo.n_step": 2}),
        "TargetNetwork.every": Variation(given={"algo.n_step": 2}),
        "TargetNetwork.rate": Variation(given={"algo.n_step": 2}),
        "EpsilonGreedy.end": Variation(0.9, given={"algo.exploration.decay": 2}),
        "EpsilonGreedy.decay": Variation(1),
        # An iteration adds 12 sequences of at most 10 tokens.
        "Replay.capacity": Variation(150),
        "Replay.warmup": Variation(20),
        "AdamW.critic_lr": Variation(0.01),
        "AdamW.max_grad_norm": Variation(0.1),
        "AdamW.betas": Variation([0.5, 0.95]),
        "AdamW.frozen_layers": Variation(1, given={"model.architecture.n_layer": 2}),
        "AdamW.max_skipped": Variation(1000, engine=Broken),
        # Changes memory, never results.
        "AdamW.micro_batch_tokens": Variation(12, seen_in="passes"),
    }


def fields(node: DictConfig, path: str) -> Iterator[Field]:
    """All fields of a node and of the nodes below it, also those that are null; without ``algo.name``."""
    name = target(node)
    hints = type_hints(node)
    for key in map(str, node):
        if key.startswith("_") or (path == "algo" and key == "name"):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            yield from fields(value, f"{path}.{key}")
        else:
            plain = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
            yield Field(path, name, key, hints.get(key), plain)


def target(node: DictConfig) -> str:
    """Name of the class that a node builds."""
    return str(node["_target_"]).rsplit(".", 1)[-1]


def type_hints(node: DictConfig) -> dict[str, Any]:
    """Type hints of the class or function that a node builds, by argument."""
    built = get_object(node["_target_"])
    return get_type_hints(built.__init__ if inspect.isclass(built) else built)


def values(field: Field) -> list[Any]:
    """Other values to try: the other choices of a Literal, the other bool, half of a number.

    Raises:
        AssertionError: for a null that is not in :func:`variations`.
    """
    old, choices = field.value, list(literals(field.hint))
    if choices:
        return [choice for choice in choices if choice != old] + ([1] if old == "all" else [])
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int) and field.hint is int:
        return [old + 1]
    if isinstance(old, int | float):
        return [old / 2 if old else 0.1]
    raise AssertionError(f"{field.kind} is {old!r}; tests/fields.py must say what else it may be")


def literals(hint: Any) -> Iterator[Any]:
    """Choices of a Literal, also inside a union."""
    origin = get_origin(hint)
    if origin is Literal:
        yield from get_args(hint)
    elif origin in (Union, types.UnionType):
        for option in get_args(hint):
            yield from literals(option)


def save_reward_model(folder: Path, seed: int) -> None:
    """Saves a reward model with the small policy's size and vocabulary."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from policylab.models.scratch import find_tokenizer

    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "num_labels": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=len(find_tokenizer("walker")), **size, **tokens)
        )
    model.save_pretrained(folder)
