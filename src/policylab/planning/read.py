"""Computes the numbers of a `Job` from a composed config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from policylab.cli.messages import dotted_keys
from policylab.config.build import (
    PLANNED,
    TAKEN_OVER,
    adapter_for,
    check_parts,
    instantiate,
    model_config,
    without,
)
from policylab.config.hardware import AUTO, check_hardware
from policylab.distributed.allocator import main_memory
from policylab.distributed.machine import gpus
from policylab.distributed.world import world
from policylab.errors import UserError
from policylab.models.encoding import encode, encode_chats
from policylab.models.loading import ASSETS, read_tokenizer
from policylab.models.meta import Outline, outline
from policylab.models.size import BF16, FP32, critic_size, size_of
from policylab.planning.job import Hardware, Job
from policylab.planning.memory import GIB
from policylab.rollouts.engine import check_positions
from policylab.rollouts.memory import Kind
from policylab.rollouts.row_limit import EVERY_ROW
from policylab.tasks.base import Example, Task, examples, take_validation
from policylab.training.methods import method_of

#: Number of texts whose tokens are counted, evenly spread over the task's.
READ = 512
#: Engine by class; any other engine is planned like Hugging Face's generate.
ENGINES: dict[str, Kind] = {"CachedEngine": "cached", "VllmEngine": "vllm"}


@dataclass(frozen=True)
class Described:
    """A run in numbers, and labels for the printed plan."""

    job: Job
    source: str  #: where the model comes from
    stand_in: bool  #: whether prompts were counted with a tokenizer that is not the model's


def describe(config: DictConfig) -> Described:
    """The numbers of a run, from its config alone.

    Raises:
        UserError: as the run would, as far as this can be checked without weights.
    """
    check_parts(config)
    method, (hardware, processes) = method_of(instantiate(config.algo)), hardware_of(config)
    settled = config.copy()
    settled.hardware.devices, settled.hardware.num_nodes = hardware.local, processes // hardware.local
    method.check(settled)
    check_hardware(settled)
    needs, plan = method.needs(), method.plan(config.rollout, processes)
    engine = instantiate(without(config.rollout, PLANNED))
    task = instantiate(without(config.task, TAKEN_OVER))
    train, val = examples(task, "train"), take_validation(task, config.validation.prompts)
    settings: Any = OmegaConf.to_container(model_config(config), resolve=True)
    model = outline(settings)
    size = size_of(model.lm, adapter_for(config), config.optim.frozen_layers)
    prompts, targets = lengths(model, task, [*train, *val])
    new_tokens = max([engine.max_new_tokens, *(targets if needs.learns_from == "completions" else [])])
    if size.context is not None and config.task.get("too_long", "refuse") != "refuse":
        prompts = [min(tokens, max(1, size.context - new_tokens)) for tokens in prompts]
    check_positions(max(prompts) + new_tokens, size.context, "the model")
    low_products = config.rollout.get("dtype") == "bfloat16" or config.hardware.precision == "bf16-mixed"
    full = config.hardware.precision == "32-true" and size.weight_bytes == FP32
    critic = needs.critic
    job = Job(
        size=size,
        critic_size=None if critic is None else critic_size(model.lm, size, critic.own_layers),
        hardware=hardware,
        plan=plan,
        prompt_tokens=sum(prompts) / len(prompts),
        longest_prompt=max(prompts),
        new_tokens=new_tokens,
        needs=needs,
        cost=method.cost(plan, exact=full and engine.exact),
        engine=ENGINES.get(config.rollout["_target_"].rsplit(".", 1)[-1], "generate"),
        engine_share=config.rollout.get("gpu_memory", 0.0),
        sampling_bytes=BF16 if low_products else size.weight_bytes,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        max_rows=config.rollout.get("max_rows", EVERY_ROW),
        validation=min(config.validation.batch_size, config.validation.prompts),
        checkpoints=bool(config.callbacks and config.callbacks.get("checkpoint")),
        keys=frozenset(dotted_keys(config)),
    )
    return Described(job, model.source, model.tokenizer is None)


def hardware_of(config: DictConfig) -> tuple[Hardware, int]:
    """The configured hardware, whether or not this machine has it, and the number of processes.

    Raises:
        UserError: when a number is neither configured nor known from this machine.
    """
    hardware = config.hardware
    gpu = hardware.accelerator == "gpu" or (hardware.accelerator == AUTO and gpus() > 0)
    local, nodes = hardware.devices, hardware.num_nodes
    if world().size > 1:
        local, nodes = world().local_size, world().nodes
    if local == AUTO:
        local = gpus() if gpu else 1
        if local == 0:
            raise UserError(
                f"hardware.devices={AUTO}, and there is no GPU here to count; say hardware.devices=8 to plan for eight "
                "a machine"
            )
    if nodes == AUTO:
        raise UserError(
            f"hardware.num_nodes={AUTO} is known under SLURM alone; say how many machines to plan for"
        )
    memory = None if config.plan_memory is None else config.plan_memory * GIB
    if gpu and memory is None:
        if not gpus():
            raise UserError(
                "there is no GPU here to look at; say what to plan for: plan_memory=80 (GiB of a GPU) and "
                "plan_flops=4e14 (operations a second that one reaches)"
            )
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    here = float(main_memory())
    settings = Hardware(
        gpu=gpu,
        memory=memory if gpu and memory else (memory or here) / local,
        host_memory=here if gpu and config.plan_memory is None else None,
        local=local,
        sharded=hardware.strategy == "fsdp",
        offload=hardware.cpu_offload,
        precision=hardware.precision,
        gradient_checkpointing=hardware.gradient_checkpointing,
    )
    return settings, local * nodes


def lengths(model: Outline, task: Task, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Token counts of a sample of the prompts, and of their completions if they have any."""
    some = examples[:: max(1, len(examples) // READ)]
    tokenizer: Any = model.tokenizer
    if tokenizer is None:  # for English, about as many tokens as with other tokenizers, or slightly more
        tokenizer = read_tokenizer(ASSETS / "tiny", local_files_only=True, trust_remote_code=False)
    texts = [example.text for example in some]
    if model.chat:
        asked = [task.instruction.replace("{text}", text) if task.instruction else text for text in texts]
        read = encode_chats(tokenizer, asked)
    else:
        read = encode(tokenizer, texts, special=True)
    targets = [example.completion for example in some if example.completion]
    written = encode(tokenizer, targets, special=False)
    return [max(1, len(tokens)) for tokens in read], [len(tokens) + 1 for tokens in written]
