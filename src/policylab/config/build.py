"""From the composed config to an experiment that is ready to run. Nothing else instantiates."""

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

from policylab.algorithms import Algorithm, MovingReference, QLearning, Supervised, TrustRegion
from policylab.callbacks.loggers import tolerated
from policylab.config.hardware import backend
from policylab.config.signatures import check_signatures
from policylab.data.plan import BatchPlan, ReplayPlan
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
from policylab.rewards.pool import pooled
from policylab.rollouts.engine import Engine
from policylab.rollouts.fitting import fitting
from policylab.rollouts.products import choose_products
from policylab.rollouts.row_limit import EVERY_ROW
from policylab.runs.saved_config import as_yaml
from policylab.tasks.base import Example, Task, data_fingerprint, examples, take_validation
from policylab.tasks.datamodule import PromptData
from policylab.training import PolicyGradient, QTraining, SupervisedTraining, TrustRegionUpdater
from policylab.training.module import TrainingModule
from policylab.training.parts import Parts
from policylab.user_code import is_theirs, place, said

#: Keys of ``rollout`` that say what is sampled at a time, and are not for the engine.
PLANNED = frozenset({"prompts", "group_size", "max_rows"})
#: Keys of ``task`` that are not for the task itself.
TAKEN_OVER = frozenset({"max_new_tokens", "too_long"})
#: Keys of ``model`` that say what becomes of it once it is loaded.
ADAPTED = frozenset({"adapter"})
#: Keys of ``reward`` that say who computes it.
POOLED = frozenset({"workers", "pool"})


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs."""

    module: TrainingModule
    data: PromptData
    trainer: Trainer
    config: DictConfig


def build(config: DictConfig, run_dir: Path) -> Experiment:
    """Builds the cheap parts first, so that a wrong config says so before a model loads.

    Raises:
        UserError: when a part refuses its values.
    """
    check_parts(config)
    choose_products(config.hardware.products)
    algorithm = instantiate(config.algo)
    if config.hardware.strategy == "fsdp":
        demand_shardable(config.hardware, algorithm, adapted=config.model.get("adapter") is not None)
    plan = batch_plan(config, algorithm)
    optim = instantiate(config.optim)
    demand_one_process(config)
    engine = instantiate(without(config.rollout, PLANNED))
    reward = pooled(
        instantiate(without(config.reward, POOLED)), config.reward.get("workers"), config.reward.get("pool")
    )
    task = instantiate(without(config.task, TAKEN_OVER))
    train, val = examples(task, "train"), take_validation(task, config.validation.prompts)
    if isinstance(algorithm, Supervised):
        demand_no_budget(config)
        demand_completions(task, train)

    policy = build_policy(config, algorithm)
    too_long = config.task.get("too_long", "refuse")
    train_prompts = prompts(policy, task, train, "train", engine, too_long)
    val_prompts = prompts(policy, task, val, "val", engine, too_long)
    if isinstance(algorithm, QLearning):
        algorithm.replay.demand_room(plan.sequences, longest(train_prompts, engine))
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
        reward=reward,
        task=task,
        optim=optim,
        plan=plan,
        train=train_prompts,
        val=val_prompts,
        max_rows=config.rollout.get("max_rows", EVERY_ROW),
        seed=config.seed,
        iterations=config.iterations,
        max_tokens=config.max_tokens,
        resolved_config=as_yaml(config),
        data=data_fingerprint(train_prompts, examples(task, "val")),
    )
    module = module_for(algorithm, parts)
    module.compiles_layers = config.hardware.compile
    return Experiment(module, data, trainer(config, run_dir), config)


def module_for(algorithm: Algorithm | QLearning | Supervised, parts: Parts) -> TrainingModule:
    """The module that trains with this kind of algorithm."""
    if isinstance(algorithm, Supervised):
        return SupervisedTraining(algorithm, parts)
    if isinstance(algorithm, QLearning):
        return QTraining(algorithm, parts)
    if isinstance(algorithm.update, TrustRegion):
        return PolicyGradient(algorithm, parts, TrustRegionUpdater)
    return PolicyGradient(algorithm, parts)


def instantiate(config: DictConfig) -> Any:
    """The object that a config node describes; lists and dicts inside become plain ones.

    Raises:
        UserError, RunError: whatever a part says about its values, without Hydra's wrapping.
        RunError: for whatever else the user's own code raises.
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


def without(config: DictConfig, keys: frozenset[str]) -> DictConfig:
    """A group without the keys that are not for its target; what it refers to elsewhere is filled in."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return OmegaConf.create({key: value for key, value in values.items() if key not in keys})


def check_parts(config: DictConfig) -> None:
    """Holds each group against what it builds.

    Raises:
        UserError: naming the first key that does not fit.
    """
    for group in ("algo", "optim", "callbacks", "logger"):
        check_signatures(config[group], group, frozenset())
    check_signatures(config.model, "model", ADAPTED)
    check_signatures(config.reward, "reward", POOLED)
    check_signatures(config.rollout, "rollout", PLANNED)
    check_signatures(config.task, "task", TAKEN_OVER)


def build_policy(config: DictConfig, algorithm: Algorithm | QLearning | Supervised) -> Policy:
    """The model, with a critic where the algorithm uses one."""
    loaded = instantiate(model_config(config))
    adapter = adapter_for(config, algorithm)
    if adapter is not None:
        adapter.adapt(loaded.lm, config.optim.frozen_layers)
    policy = Policy(loaded, critic_for(loaded, algorithm, adapter))
    if config.optim.frozen_layers and adapter is None:
        freeze_below(loaded.lm, config.optim.frozen_layers)
    policy.recomputes_layers = config.hardware.gradient_checkpointing
    if policy.recomputes_layers or config.hardware.strategy == "fsdp":
        decoder_layers(loaded.lm)  # says now where it cannot be
    return policy


def model_config(config: DictConfig) -> DictConfig:
    """What loads the model: ``config.model`` without its adapter, in bf16 where the hardware wants that throughout."""
    node = without(config.model, ADAPTED)
    if config.hardware.precision == "bf16-true":
        node.dtype = "bfloat16"
    return node


def adapter_for(config: DictConfig, algorithm: Algorithm | QLearning | Supervised) -> LoRA | None:
    """What trains in place of the model's own weights, if anything does.

    Raises:
        UserError: when the algorithm cannot do with it.
    """
    node = config.model.get("adapter")
    if node is None:
        return None
    if isinstance(algorithm, Algorithm) and isinstance(algorithm.kl.reference, MovingReference):
        raise UserError(
            "algo/reference=moving averages weights, and the average of adapters is not that of the weights they make; "
            "with model/adapter=lora take algo/reference=frozen"
        )
    return instantiate(node)


def critic_for(
    loaded: LoadedModel, algorithm: Algorithm | QLearning | Supervised, adapter: LoRA | None
) -> ValueModel | None:
    """The critic that the algorithm uses, if any. Next to an adapted policy, all that it is made of is adapted."""
    if isinstance(algorithm, QLearning):
        value = algorithm.dueling
        return value_model(loaded.lm, value.own_layers, init=None) if value else None
    if isinstance(algorithm, Supervised) or not algorithm.uses_critic:
        return None
    assert algorithm.critic is not None
    critic = value_model(loaded.lm, algorithm.critic.own_layers, algorithm.critic.init)
    if adapter is not None and algorithm.critic.init is not None:
        adapter.adapt(critic.backbone)
    return critic


def batch_plan(config: DictConfig, algorithm: Algorithm | QLearning | Supervised) -> BatchPlan:
    """How the sequences of an iteration are cut."""
    processes = config.hardware.devices * config.hardware.num_nodes
    if isinstance(algorithm, Supervised):
        return BatchPlan(algorithm.batch_size, 1, 1, 1, processes)
    prompts, group_size = config.rollout.prompts, config.rollout.group_size
    if isinstance(algorithm, QLearning):
        replay = algorithm.replay
        return ReplayPlan(prompts, group_size, 1, 1, processes, replay.batch_size, replay.updates)
    update = algorithm.update
    if group_size < algorithm.min_group_size:
        part = "sampling=dynamic" if algorithm.advantage.min_group_size == 1 else "advantage"
        raise UserError(
            f"algo/{part} compares completions of the same prompt, but rollout.group_size is {group_size}; "
            f"take rollout.group_size={algorithm.min_group_size} or more"
        )
    plan = BatchPlan(prompts, group_size, update.epochs, update.minibatches, processes)
    if isinstance(update, TrustRegion) and algorithm.uses_critic:
        update.demand_shares(plan.sequences)
    return plan


def prompts(
    policy: Policy, task: Task, examples: Sequence[Example], split: str, engine: Engine, too_long: str
) -> list[Prompt]:
    """Examples as the policy reads them, numbered in order; what becomes of those too long is for ``too_long``."""
    texts = [(example.text, example.completion, example.reference) for example in examples]
    return fitting(
        policy,
        policy.prompts(texts, task.instruction),
        examples,
        new_tokens=engine.max_new_tokens,
        instruction=task.instruction,
        split=split,
        too_long=too_long,
    )


def demand_shardable(
    hardware: DictConfig, algorithm: Algorithm | QLearning | Supervised, *, adapted: bool
) -> None:
    """Sharded weights are not for everything.

    Raises:
        UserError: saying what to take instead.
    """
    if isinstance(algorithm, Algorithm) and isinstance(algorithm.update, TrustRegion):
        raise UserError(
            "hardware.strategy=fsdp: a trust region works on all weights as one vector, which no process has; take "
            "hardware=ddp, or algo/update=minibatch_epochs"
        )
    if adapted:
        raise UserError(
            "model/adapter=lora with hardware.strategy=fsdp cannot export the policy yet; take hardware=ddp: what LoRA "
            "trains is small, and the frozen weights have neither gradients nor moments"
        )
    if hardware.compile:
        raise UserError(
            "hardware.compile=true has not been tried with hardware.strategy=fsdp; take hardware.compile=false"
        )
    if hardware.cpu_offload and hardware.accelerator == "cpu":
        raise UserError(
            "hardware.cpu_offload=true moves weights out of a GPU's memory, and hardware.accelerator is cpu; take "
            "hardware.cpu_offload=false"
        )


def demand_one_process(config: DictConfig) -> None:
    """vLLM in the training process takes the first GPU, whichever process it is.

    Raises:
        UserError: when several processes would sample by vLLM.
    """
    count = config.hardware.devices * config.hardware.num_nodes
    if count > 1 and config.rollout["_target_"] == "policylab.rollouts.vllm.VllmEngine":
        raise UserError(
            f"rollout=vllm runs in one process, on its first GPU, and hardware means {count} processes; take "
            "hardware.devices=1, or rollout=cached"
        )


def demand_no_budget(config: DictConfig) -> None:
    """Supervised training samples nothing that a budget could count.

    Raises:
        UserError: when it has one.
    """
    if config.max_tokens is not None:
        raise UserError(
            f"max_tokens={config.max_tokens} counts tokens sampled in training, and algo={config.algo.name} samples "
            "none; take max_tokens=null, and iterations for its length"
        )


def demand_completions(task: Task, train: Sequence[Example]) -> None:
    """Supervised training needs something to imitate.

    Raises:
        UserError: naming the first example without a completion.
    """
    for number, example in enumerate(train):
        if not example.completion:
            raise UserError(
                f"example {number} of task {task.name} ({example.text!r}) has no completion, and algo=sft trains on "
                "completions; take a task.source that has them (the reviews' own openings have none: task.source=vader)"
            )


def longest(prompts: Sequence[Prompt], engine: Engine) -> int:
    """Positions that the longest sequence of the run may take."""
    return max(len(prompt.tokens) + max(engine.max_new_tokens, len(prompt.target)) for prompt in prompts)


def trainer(config: DictConfig, run_dir: Path) -> Trainer:
    """Lightning's trainer: one epoch is the whole run, one batch an iteration."""
    hardware = config.hardware
    if hardware.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "hardware=gpu, but torch sees no GPU; take hardware=cpu, or install a CUDA build of torch"
        )
    # Not Lightning's own "auto", which takes Apple's GPU: that has no float64, which sampling needs.
    here_cpu = hardware.accelerator == "auto" and not torch.cuda.is_available()
    return Trainer(
        accelerator="cpu" if here_cpu else hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategy(hardware),
        plugins=[Cluster()],
        # weights that are bf16 throughout come from model.dtype, and take nothing of Lightning's
        precision="32-true" if hardware.precision == "bf16-true" else hardware.precision,
        logger=list(map(tolerated, named_parts(config.logger, Logger))) if world().main else False,
        callbacks=named_parts(config.callbacks, Callback),
        max_epochs=1,
        val_check_interval=min(config.validation.every, config.iterations),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,  # the datamodule shares prompts among processes itself
        inference_mode=False,  # rollouts of a validation go through the same code as those of training
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        detect_anomaly=config.detect_anomaly,
        deterministic=hardware.deterministic,
    )


def strategy(hardware: DictConfig) -> str | Strategy:
    """How processes share the work; "auto" for one alone."""
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
        UserError: when one is not of its kind.
    """
    built = {name: instantiate(node) for name, node in (group or {}).items() if node is not None}
    for name, part in built.items():
        if not isinstance(part, kind):
            raise UserError(f"{name!s} is a {type(part).__name__}; its group holds {kind.__name__}s only")
    return list(built.values())
