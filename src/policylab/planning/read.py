"""Computes the numbers of a `Job` from a composed config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from policylab.cli.messages import dotted_keys
from policylab.config.build import (
    adapter_for,
    check_parts,
    engine_of,
    instantiate,
    model_config,
    with_environment,
    without,
)
from policylab.config.hardware import AUTO, processes, with_devices
from policylab.config.signatures import target_of
from policylab.distributed.allocator import main_memory
from policylab.distributed.machine import gpus
from policylab.errors import UserError
from policylab.models.encoding import encode, encode_prompts
from policylab.models.loading import ASSETS, LoadedModel, read_tokenizer
from policylab.models.shape import context_of
from policylab.models.size import BF16, FP32, CriticSize, critic_size, size_of
from policylab.planning.job import Hardware, Job
from policylab.planning.memory import GIB
from policylab.rollouts.engine import check_positions, check_processes
from policylab.rollouts.row_limit import EVERY_ROW
from policylab.tasks.base import Example, Task, examples, take_validation
from policylab.training.methods import method_of

#: Number of texts whose tokens are counted, evenly spread over the task's.
READ = 512


def describe(config: DictConfig) -> Job:
    """The numbers of a run, from its config alone.

    Raises:
        UserError: as the run would, as far as this can be checked without weights.
    """
    check_parts(config)
    method, config = method_of(instantiate(config.algo)), with_devices(config, start=False)
    method.check(config)
    check_processes(target_of(config.rollout, "rollout"), processes(config))
    needs, plan = method.needs(), method.plan(config.rollout, processes(config))
    engine = engine_of(config)
    task = instantiate(without(config, "task"))
    played = with_environment(engine, task, config.task, method)
    train, val = examples(task, "train"), take_validation(task, config.validation.prompts)
    model = outline(config)
    size = size_of(model.lm, adapter_for(config), config.optim.frozen_layers)
    prompts, targets = lengths(model, task, [*train, *val])
    new_tokens = max([played.max_new_tokens, *(targets if needs.learns_from == "completions" else [])])
    limit = context_of(model.lm)
    if limit is not None and config.task.get("too_long", "refuse") != "refuse":
        prompts = [min(tokens, max(1, limit - new_tokens)) for tokens in prompts]
    check_positions(max(prompts) + new_tokens, limit, "the model")
    low_products = config.rollout.get("dtype") == "bfloat16" or config.hardware.precision == "bf16-mixed"
    full = config.hardware.precision == "32-true" and size.weight_bytes == FP32
    critic = needs.critic
    return Job(
        source=model.source,
        stand_in=model.tokenizer is None,
        size=size,
        critic_size=CriticSize() if critic is None else critic_size(model.lm, size, critic.own_layers),
        hardware=hardware_of(config),
        plan=plan,
        prompt_tokens=sum(prompts) / len(prompts),
        longest_prompt=max(prompts),
        new_tokens=new_tokens,
        needs=needs,
        cost=method.cost(plan, exact=full and engine.exact),
        engine=engine,
        sampling_bytes=BF16 if low_products else size.weight_bytes,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        max_rows=config.rollout.get("max_rows", EVERY_ROW),
        validation=min(config.validation.batch_size, config.validation.prompts),
        checkpoints=bool(config.callbacks and config.callbacks.get("checkpoint")),
        keys=frozenset(dotted_keys(config)),
    )


def outline(config: DictConfig) -> LoadedModel:
    """The model on torch's meta device, built from its config without weights.

    Raises:
        UserError: when the config cannot be read, or other code loads the model, which may read weights.
    """
    target = config.model["_target_"]
    if not target.startswith("policylab."):
        raise UserError(
            f"plan=true supports PolicyLab's own models, and model._target_ is {target}; save the model's config.json "
            "in a folder and take model=hf model.path=FOLDER model.name=LABEL"
        )
    with torch.device("meta"):
        return instantiate(model_config(config))


def hardware_of(config: DictConfig) -> Hardware:
    """The configured hardware, also if this machine does not have it. The config's devices must be numbers.

    Raises:
        UserError: when the memory is neither configured nor known from this machine.
    """
    hardware, here = config.hardware, float(main_memory())
    gpu = hardware.accelerator == "gpu" or (hardware.accelerator == AUTO and gpus() > 0)
    if config.plan_memory is not None:
        memory = float(config.plan_memory * GIB)
    elif not gpu:
        memory = here
    elif gpus():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        raise UserError(
            "there is no GPU here; set the one to plan for: plan_memory=80 (GiB of a GPU) and plan_flops=4e14 "
            "(operations a second that it reaches)"
        )
    return Hardware(
        gpu=gpu,
        memory=memory if gpu else memory / hardware.devices,
        host_memory=here if gpu and config.plan_memory is None else None,
        local=hardware.devices,
        sharded=hardware.strategy == "fsdp",
        offload=hardware.cpu_offload,
        precision=hardware.precision,
        gradient_checkpointing=hardware.gradient_checkpointing,
    )


def lengths(model: LoadedModel, task: Task, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Token counts of a sample of the prompts, and of their completions if they have any."""
    some = examples[:: max(1, len(examples) // READ)]
    tokenizer: Any = model.tokenizer
    if tokenizer is None:  # for English, about as many tokens as with other tokenizers, or slightly more
        tokenizer = read_tokenizer(ASSETS / "tiny", local_files_only=True, trust_remote_code=False)
    texts = [example.text for example in some]
    read = encode_prompts(tokenizer, texts, chat=model.chat, instruction=task.instruction)
    written = encode(tokenizer, [e.completion for e in some if e.completion], special=False)
    return [max(1, len(tokens)) for tokens in read], [len(tokens) + 1 for tokens in written]
