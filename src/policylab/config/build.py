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

from policylab.callbacks.loggers import tolerated
from policylab.config.hardware import backend, check_hardware, processes
from policylab.config.signatures import check_signatures
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
from policylab.rollouts.engine import Engine
from policylab.rollouts.fitting import fitting
from policylab.rollouts.products import choose_products
from policylab.rollouts.row_limit import EVERY_ROW
from policylab.runs.saved_config import as_yaml
from policylab.tasks.base import Example, Task, data_fingerprint, examples, take_validation
from policylab.tasks.datamodule import PromptData
from policylab.training.methods import CriticNeed, method_of
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
    """Checks the config and builds the cheap parts first, so that a wrong config says so before a model loads.

    Raises:
        UserError: when a part refuses its values.
    """
    check_parts(config)
    choose_products(config.hardware.products)
    method = method_of(instantiate(config.algo))
    method.check(config)
    check_hardware(config)
    plan = method.plan(config.rollout, processes(config))
    optim = instantiate(config.optim)
    engine = instantiate(without(config.rollout, PLANNED))
    scorer = scorer_of(config.reward)
    task = instantiate(without(config.task, TAKEN_OVER))
    train, val = examples(task, "train"), take_validation(task, config.validation.prompts)
    if method.needs().learns_from == "completions":
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
    if not isinstance(module, TrainingModule):
        raise UserError(
            f"{type(method).__name__}.trainer returned {type(module).__name__}; it must return a TrainingModule "
            "(docs/your_own_family.md)"
        )
    module.compiles_layers = config.hardware.compile
    return Experiment(module, data, trainer(config, run_dir), config)


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


def scorer_of(config: DictConfig) -> Scorer:
    """The reward and its workers; a config may leave their keys out."""
    workers = {key: config[key] for key in sorted(POOLED) if config.get(key) is not None}
    return Scorer(instantiate(without(config, POOLED)), **workers)


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


def build_policy(config: DictConfig, critic: CriticNeed | None) -> Policy:
    """The model, with a critic where one is needed."""
    loaded, adapter = instantiate(model_config(config)), adapter_for(config)
    if adapter is not None:
        adapter.adapt(loaded.lm, config.optim.frozen_layers)
    policy = Policy(loaded, critic_for(loaded, critic, adapter))
    if config.optim.frozen_layers and adapter is None:
        freeze_below(loaded.lm, config.optim.frozen_layers)
    policy.recomputes_layers = config.hardware.gradient_checkpointing
    if policy.recomputes_layers or config.hardware.strategy == "fsdp":
        decoder_layers(loaded.lm)  # refuses now a model whose layers it cannot find
    return policy


def model_config(config: DictConfig) -> DictConfig:
    """What loads the model: ``config.model`` without its adapter, in bf16 where the hardware wants that throughout."""
    node = without(config.model, ADAPTED)
    if config.hardware.precision == "bf16-true":
        node.dtype = "bfloat16"
    return node


def adapter_for(config: DictConfig) -> LoRA | None:
    """What trains in place of the model's own weights, if anything does."""
    node = config.model.get("adapter")
    return None if node is None else instantiate(node)


def critic_for(loaded: LoadedModel, need: CriticNeed | None, adapter: LoRA | None) -> ValueModel | None:
    """The critic. Next to an adapted policy, all that it is made of is adapted."""
    if need is None:
        return None
    critic = value_model(loaded.lm, need.own_layers, need.init)
    if adapter is not None and need.init is not None:
        adapter.adapt(critic.backbone)
    return critic


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


def check_completions(task: Task, train: Sequence[Example], algo: str) -> None:
    """What learns from completions needs one in each example.

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
