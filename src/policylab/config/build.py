"""Builds an experiment from the composed config. No other module instantiates parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf

from policylab.callbacks.loggers import tolerated
from policylab.config.beside import BESIDE
from policylab.config.hardware import backend, check_hardware, processes
from policylab.config.signatures import check_signatures, target_of
from policylab.contracts import check_members, check_state, refuse_state, returned
from policylab.data.rollout import Prompt
from policylab.distributed.cluster import Cluster
from policylab.distributed.sharded_strategy import ShardedStrategy
from policylab.distributed.world import world
from policylab.errors import RunError, UserError
from policylab.models.adapter import LoRA
from policylab.models.critic import ValueModel, value_model
from policylab.models.layers import decoder_layers, freeze_below
from policylab.models.loading import LoadedModel
from policylab.models.policy import Policy
from policylab.rewards.scorer import Scorer
from policylab.rollouts.engine import Engine, check_processes
from policylab.rollouts.episodes import Episodes
from policylab.rollouts.fitting import fitting
from policylab.rollouts.products import choose_products
from policylab.rollouts.row_limit import EVERY_ROW
from policylab.runs.saved_config import as_yaml
from policylab.tasks.base import Example, Task, data_fingerprint, examples, take_validation
from policylab.tasks.datamodule import PromptData
from policylab.training.methods import CriticNeed, Method, method_of
from policylab.training.module import TrainingModule
from policylab.training.parts import Parts
from policylab.user_code import is_theirs, place, said

#: Keys of ``task`` that limit the episodes of a task with an environment.
EPISODE_LIMITS = ("turns", "answer_tokens")


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs."""

    module: TrainingModule
    data: PromptData
    trainer: Trainer
    config: DictConfig


def build(config: DictConfig, run_dir: Path, *, trains: bool = True) -> Experiment:
    """Checks the config and builds the cheap parts first, so that a wrong config fails before a model loads.

    Args:
        trains: whether the experiment will train; if not, prompts need no completions.

    Raises:
        UserError: when a part refuses its values.
    """
    check_parts(config)
    choose_products(config.hardware.products)
    method = method_of(instantiate(config.algo))
    method.check(config)
    check_hardware(config)
    check_processes(target_of(config.rollout, "rollout"), processes(config))
    plan = method.plan(config.rollout, processes(config))
    optim = instantiate(config.optim)
    engine = engine_of(config)
    scorer = scorer_of(config)
    task = instantiate(without(config, "task"))
    engine = with_environment(engine, task, config.task, method)
    train, val = examples(task, "train"), take_validation(task, config.validation.prompts)
    if trains and method.needs().learns_from == "completions":
        check_completions(task, train, config.algo.name)

    policy = build_policy(config, method.needs().critic)
    too_long = config.task.get("too_long", "refuse")
    train_prompts = prompts(policy, task, train, "train", engine, too_long)
    val_prompts = prompts(policy, task, val, "val", engine, too_long)
    method.check_lengths(plan, longest(train_prompts, engine))
    data = PromptData(
        train=train_prompts,
        val=val_prompts,
        batch_size=plan.prompts,
        val_batch_size=config.validation.batch_size,
        seed=config.seed,
        iterations=config.iterations,
    )
    parts = Parts(
        policy=policy,
        engine=engine,
        scorer=scorer,
        task=task,
        optim=optim,
        plan=plan,
        needs=method.needs(),
        cost=lambda exact: method.cost(plan, exact=exact),
        train=train_prompts,
        val=val_prompts,
        max_rows=config.rollout.get("max_rows", EVERY_ROW),
        seed=config.seed,
        iterations=config.iterations,
        max_tokens=config.max_tokens,
        resolved_config=as_yaml(config),
        data=data_fingerprint(train_prompts, examples(task, "val")),
    )
    module = method.trainer(parts)
    module.compiles_layers = config.hardware.compile
    return Experiment(module, data, trainer(config, run_dir), config)


def instantiate(config: DictConfig) -> Any:
    """The object that a config node describes. Lists and dicts in it are passed as plain ones.

    Raises:
        UserError, RunError: those that a part raises, without Hydra's wrapping.
        RunError: for any other exception of the user's own code.
    """
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError | RunError):
            raise cause from None
        if cause is not None and is_theirs(cause):
            raise RunError(
                f"{config._target_} could not be built: it failed{place(cause)}: {said(cause)}"
            ) from cause
        raise


def engine_of(config: DictConfig) -> Engine:
    """The rollout engine.

    Raises:
        UserError: when it lacks a member, or keeps state.
    """
    engine: Engine = instantiate(without(config, "rollout"))
    check_members("engine", engine, Engine)
    refuse_state(f"engine {type(engine).__name__}", engine)
    return engine


def with_environment(engine: Engine, task: Task, config: DictConfig, method: Method[Any]) -> Engine:
    """An engine that samples episodes, if the task has an environment; else the engine itself.

    Raises:
        UserError: when a limit of episodes is missing, or given without an environment; or when the method does not
            support episodes.
    """
    environment = getattr(task, "environment", None)
    limits = {key: config[key] for key in EPISODE_LIMITS if config.get(key) is not None}
    if environment is None:
        if limits:
            raise UserError(
                f"task.{min(limits)} is for a task with an environment, and task {task.name} has none; leave it out"
            )
        return engine
    if missing := sorted(set(EPISODE_LIMITS) - set(limits)):
        raise UserError(f"task.{missing[0]} is missing; task {task.name} has an environment, which needs it")
    method.check_episodes()
    return Episodes(engine, environment, instruction=task.instruction, **limits)


def scorer_of(config: DictConfig) -> Scorer:
    """The reward and its workers; a config may leave their keys out."""
    reward = config.reward
    workers = {key: reward[key] for key in sorted(BESIDE["reward"]) if reward.get(key) is not None}
    return Scorer(instantiate(without(config, "reward")), **workers)


def without(config: DictConfig, group: str) -> DictConfig:
    """A config group without the keys for other parts, and with its interpolations resolved."""
    values = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(values, dict)
    return OmegaConf.create({key: value for key, value in values.items() if key not in BESIDE[group]})


def check_parts(config: DictConfig) -> None:
    """Checks each config group against the signature of what it builds.

    Raises:
        UserError: naming the first key that does not fit.
    """
    for group in ("algo", "optim", "callbacks", "logger", *BESIDE):
        check_signatures(config[group], group, BESIDE.get(group, frozenset()))


def build_policy(config: DictConfig, critic: CriticNeed | None) -> Policy:
    """The model, with a critic where one is needed."""
    loaded = returned(config.model._target_, instantiate(model_config(config)), LoadedModel)
    adapter = adapter_for(config)
    if adapter is not None:
        adapter.adapt(loaded.lm, config.optim.frozen_layers)
    policy = Policy(loaded, critic_for(loaded, critic, adapter))
    if config.optim.frozen_layers and adapter is None:
        freeze_below(loaded.lm, config.optim.frozen_layers)
    policy.recomputes_layers = config.hardware.gradient_checkpointing
    if policy.recomputes_layers or config.hardware.strategy == "fsdp":
        decoder_layers(loaded.lm)  # raises early if the layers cannot be found
    return policy


def model_config(config: DictConfig) -> DictConfig:
    """The config that loads the model: ``config.model`` without its adapter, in bf16 with ``precision=bf16-true``."""
    node = without(config, "model")
    if config.hardware.precision == "bf16-true":
        node.dtype = "bfloat16"
    return node


def adapter_for(config: DictConfig) -> LoRA | None:
    """The adapter that trains instead of the model's own weights; None without one."""
    node = config.model.get("adapter")
    return None if node is None else instantiate(node)


def critic_for(loaded: LoadedModel, need: CriticNeed | None, adapter: LoRA | None) -> ValueModel | None:
    """The critic, if the method needs one. With an adapted policy, the critic's own backbone is adapted as well."""
    if need is None:
        return None
    critic = value_model(loaded.lm, need.own_layers, need.init)
    if adapter is not None and need.init is not None:
        adapter.adapt(critic.backbone)
    return critic


def prompts(
    policy: Policy, task: Task, examples: Sequence[Example], split: str, engine: Engine, too_long: str
) -> list[Prompt]:
    """Encoded prompts of examples, numbered in order. ``too_long`` decides about prompts that do not fit the model."""
    texts = [(example.text, example.completion, example.reference) for example in examples]
    return fitting(
        policy,
        policy.prompts(texts, task.instruction),
        examples,
        new_tokens=engine.max_new_tokens,
        instruction=task.instruction,
        split=split,
        too_long=too_long,
        limits=getattr(engine, "limits", None),
    )


def check_completions(task: Task, train: Sequence[Example], algo: str) -> None:
    """Checks that each example has a completion, for methods that learn from completions.

    Raises:
        UserError: naming the first example without a completion.
    """
    for number, example in enumerate(train):
        if not example.completion:
            raise UserError(
                f"example {number} of task {task.name} ({example.text!r}) has no completion, and algo={algo} trains on "
                "completions; take a task.source that has them (the reviews' own openings have none: task.source=vader)"
            )


def longest(prompts: Sequence[Prompt], engine: Engine) -> int:
    """Largest number of tokens in a sequence of the run."""
    return max(len(prompt.tokens) + max(engine.max_new_tokens, len(prompt.target)) for prompt in prompts)


def trainer(config: DictConfig, run_dir: Path) -> Trainer:
    """Lightning's trainer: one epoch is the whole run, one batch is an iteration."""
    hardware = config.hardware
    if hardware.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "hardware=gpu, but torch sees no GPU; take hardware=cpu, or install a CUDA build of torch"
        )
    # Lightning's own "auto" would take Apple's GPU, which has no float64. Sampling needs float64.
    auto_cpu = hardware.accelerator == "auto" and not torch.cuda.is_available()
    return Trainer(
        accelerator="cpu" if auto_cpu else hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategy(hardware),
        plugins=[Cluster()],
        # bf16-true: the weights are loaded as bf16 (model.dtype); Lightning need not convert anything
        precision="32-true" if hardware.precision == "bf16-true" else hardware.precision,
        logger=list(map(tolerated, named_parts(config.logger, Logger))) if world().main else False,
        callbacks=named_parts(config.callbacks, Callback),
        max_epochs=1,
        val_check_interval=min(config.validation.every, config.iterations),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,  # the datamodule shares prompts among processes itself
        inference_mode=False,  # validation and training use the same code for rollouts
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        detect_anomaly=config.detect_anomaly,
        deterministic=hardware.deterministic,
    )


def strategy(hardware: DictConfig) -> str | Strategy:
    """Lightning's strategy: DDP or sharded (FSDP); "auto" for a single process."""
    if hardware.devices * hardware.num_nodes == 1:
        return "auto"
    settings: dict[str, Any] = {
        "process_group_backend": backend(hardware),
        "timeout": timedelta(seconds=hardware.timeout),
    }
    if hardware.strategy == "fsdp":
        return ShardedStrategy(cpu_offload=hardware.cpu_offload, **settings)
    return DDPStrategy(gradient_as_bucket_view=True, **settings)


def named_parts(group: DictConfig | None, kind: type) -> list[Any]:
    """The named parts of a config group; a part set to null is off.

    Raises:
        UserError: when one is not of its kind, or would lose its state at a resume.
    """
    built = {name: instantiate(node) for name, node in (group or {}).items() if node is not None}
    for name, part in built.items():
        if not isinstance(part, kind):
            raise UserError(f"{name!s} is a {type(part).__name__}; its group holds {kind.__name__}s only")
        check_state(f"{kind.__name__.lower()} {name!s}", part, kind)
    return list(built.values())
