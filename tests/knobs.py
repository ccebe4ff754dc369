"""Every field of a config node, another value for it, and the settings under which that value acts."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
class Knob:
    """A field of a part: ``Knob("algo.advantage", "GAE", "lam", float, 0.95)``."""

    node: str
    part: str
    field: str
    hint: Any
    value: Any

    @property
    def path(self) -> str:
        """Of the field in the config."""
        return f"{self.node}.{self.field}"

    @property
    def kind(self) -> str:
        """``GAE.lam``: the same in all presets."""
        return f"{self.part}.{self.field}"


@dataclass(frozen=True)
class Turn:
    """How a knob is turned where the rule of :func:`values` will not do.

    Attributes:
        value: the other value; ``None`` leaves it to the rule.
        given: what must hold for the knob to act, in the run with the old value and in that with the new one.
        engine: that rollouts come from.
        seen_in: where the difference shows: in the weights of the policy; or, where these are to stay the same, in
            metrics or forward passes, or in their last digits.
    """

    value: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    seen_in: Literal["weights", "metrics", "passes", "rounding"] = "weights"


def turns(reward_model: Path) -> dict[str, Turn]:
    """What needs more than the rule, by kind of knob.

    Args:
        reward_model: folder of a reward model, for a critic to start as.
    """
    critic = part("Critic", coef=0.1, clip=None, own_layers=0, init=None)
    needs_critic = {
        "algo.advantage": part("GAE", gamma=1.0, lam=0.9, whiten=False),
        "algo.surrogate": part("Ratio"),
    }
    far = {
        "algo.update.max_kl": 30.0
    }  # beyond where the quadratic model is right, so that the search has work
    return {
        # Without one, an advantage that needs values is refused.
        "Algorithm.critic": Turn(critic, given=needs_critic),
        "Algorithm.sampling": Turn(part("DynamicSampling", rounds=2)),
        "Algorithm.truncation": Turn(part("MaskTruncated")),
        "Algorithm.importance": Turn(part("TruncatedImportance", cap=2.0), engine=Drifting),
        "TruncatedImportance.cap": Turn(1.1, engine=Drifting),
        "VTrace.rho_clip": Turn(engine=Drifting),
        "VTrace.c_clip": Turn(engine=Drifting),
        "NStep.n": Turn(1),
        # Pairs are flat more often than groups of three: some still are after a round.
        "DynamicSampling.rounds": Turn(1, given={"rollout.prompts": 6, "rollout.group_size": 2}),
        # Ratios stay below 3 in so short a training.
        "ClippedRatio.dual_clip": Turn(1.3),
        "CISPO.clip_low": Turn(0.1),
        "CISPO.clip_high": Turn(0.1),
        # Of the ratios of whole sequences, hardly one lies between the paper's bounds and half of them.
        "SequenceRatio.clip_low": Turn(0.3),
        "SequenceRatio.clip_high": Turn(0.3),
        # Where only the best of a group counts, the KL must be dear to change which one it is.
        "FixedCoefficient.initial": Turn(1.0),
        # k1 goes into the reward only, k3 into the loss only.
        "KLPenalty.place": Turn(given={"algo.kl.estimator": "exact"}),
        # Each iteration changes the coefficient by 20 % x sequences / horizon at most, whatever the target.
        "AdaptiveCoefficient.target": Turn(1e-3, given={"algo.kl.controller.horizon": 20}),
        "AdaptiveCoefficient.horizon": Turn(20),
        # Which costs nothing and is measured only.
        "NoPenalty.reference": Turn(part("FrozenReference"), seen_in="metrics"),
        "MinibatchEpochs.kl_stop": Turn(1e-4),
        # Refused where the advantage reads neither critic nor policy.
        "MinibatchEpochs.reestimate": Turn(True, given={**needs_critic, "algo.critic": critic}),
        "Critic.clip": Turn(0.01),
        "Critic.init": Turn(str(reward_model), given={"algo.critic.own_layers": "all"}),
        # Both give the same product: the other way round, to rounding.
        "TrustRegion.products": Turn(seen_in="rounding"),
        "TrustRegion.line_search": Turn(part("LineSearch", max_steps=5, shrink=0.5), given=far),
        "TrustRegion.cg_iterations": Turn(1),
        "TrustRegion.cg_tolerance": Turn(0.9),
        # 12 sequences cannot be cut into 5 parts.
        "TrustRegion.critic_minibatches": Turn(2),
        "LineSearch.max_steps": Turn(1, given=far),
        "LineSearch.shrink": Turn(given=far),
        # Completions are of 8 tokens: with as many rewards counted, no network is asked for the rest.
        "QLearning.n_step": Turn(1),
        "QLearning.huber": Turn(0.01),
        "QLearning.dueling": Turn(part("Dueling", level="logsumexp", coef=0.1, own_layers=0)),
        "QLearning.target": Turn(part("TargetNetwork", every=1, rate=0.1)),
        "HardBackup.double": Turn(given={"algo.n_step": 2}),
        "TargetNetwork.every": Turn(given={"algo.n_step": 2}),
        "TargetNetwork.rate": Turn(given={"algo.n_step": 2}),
        "EpsilonGreedy.end": Turn(0.9, given={"algo.exploration.decay": 2}),
        "EpsilonGreedy.decay": Turn(1),
        # An iteration brings 12 sequences of 10 tokens at most.
        "Replay.capacity": Turn(150),
        "Replay.warmup": Turn(20),
        "AdamW.critic_lr": Turn(0.01),
        "AdamW.max_grad_norm": Turn(0.1),
        "AdamW.betas": Turn([0.5, 0.95]),
        "AdamW.frozen_layers": Turn(1, given={"model.architecture.n_layer": 2}),
        "AdamW.max_skipped": Turn(1000, engine=Broken),
        # Memory, never results.
        "AdamW.micro_batch_tokens": Turn(12, seen_in="passes"),
    }


def knobs(node: DictConfig, path: str) -> Iterator[Knob]:
    """All fields of a node and of the nodes below it, those that are null included; not what names the run."""
    name = target(node)
    hints = type_hints(node)
    for key in map(str, node):
        if key.startswith("_") or (path == "algo" and key == "name"):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            yield from knobs(value, f"{path}.{key}")
        else:
            plain = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
            yield Knob(path, name, key, hints.get(key), plain)


def target(node: DictConfig) -> str:
    """Name of the class that a node builds."""
    return str(node["_target_"]).rsplit(".", 1)[-1]


def type_hints(node: DictConfig) -> dict[str, Any]:
    """Types of what a node builds, by field."""
    built = get_object(node["_target_"])
    return get_type_hints(built.__init__ if inspect.isclass(built) else built)


def values(knob: Knob) -> list[Any]:
    """Other values, one of which should be accepted: choices of a Literal, the other bool, half a number.

    Raises:
        AssertionError: for a null that :func:`turns` knows nothing of.
    """
    old, choices = knob.value, list(literals(knob.hint))
    if choices:
        return [choice for choice in choices if choice != old] + ([1] if old == "all" else [])
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int) and knob.hint is int:
        return [old + 1]
    if isinstance(old, int | float):
        return [old / 2 if old else 0.1]
    raise AssertionError(f"{knob.kind} is {old!r}; tests/knobs.py must say what else it may be")


def literals(hint: Any) -> Iterator[Any]:
    """Choices of a Literal, alone or in a union."""
    origin = get_origin(hint)
    if origin is Literal:
        yield from get_args(hint)
    elif origin in (Union, types.UnionType):
        for option in get_args(hint):
            yield from literals(option)


def save_reward_model(folder: Path, seed: int) -> None:
    """A reward model of the small policy's size and letters."""
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
