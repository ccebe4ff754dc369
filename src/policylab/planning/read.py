"""From a composed config to the numbers of a `Job`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from policylab.algorithms import Algorithm, MovingReference, QLearning, Supervised, TrustRegion
from policylab.config.build import (
    PLANNED,
    TAKEN_OVER,
    adapter_for,
    batch_plan,
    check_parts,
    instantiate,
    model_config,
    without,
)
from policylab.config.hardware import AUTO
from policylab.data.plan import BatchPlan
from policylab.distributed.allocator import main_memory
from policylab.distributed.machine import gpus
from policylab.distributed.world import world
from policylab.errors import UserError
from policylab.models.encoding import encode, encode_chats
from policylab.models.loading import ASSETS, read_tokenizer
from policylab.models.meta import Outline, outline
from policylab.planning.job import BF16, FP32, Batch, Critic, Hardware, Job, Method
from policylab.planning.memory import GIB
from policylab.planning.shape import Shape, after_layers, backbone, shape_of
from policylab.rollouts.row_limit import EVERY_ROW
from policylab.tasks.base import Example, Task, examples, take_validation

#: Texts whose tokens are counted, evenly spread over the task's.
READ = 512
#: Copies of the trained weights as one vector that conjugate gradients and the search hold.
VECTORS = 8


@dataclass(frozen=True)
class Described:
    """A run in numbers, and what people want to read of it."""

    job: Job
    plan: BatchPlan
    source: str  #: of the model
    stand_in: bool  #: prompts were counted with another tokenizer than the model's


def describe(config: DictConfig) -> Described:
    """The numbers of a run, from its config alone.

    Raises:
        UserError: as the run itself would, as far as can be told without weights.
    """
    check_parts(config)
    algorithm = instantiate(config.algo)
    hardware = hardware_of(config)
    settled = config.copy()
    settled.hardware.devices, settled.hardware.num_nodes = (
        hardware.local,
        hardware.processes // hardware.local,
    )
    plan = batch_plan(settled, algorithm)
    engine = instantiate(without(config.rollout, PLANNED))
    task = instantiate(without(config.task, TAKEN_OVER))
    train, val = examples(task, "train"), take_validation(task, config.validation.prompts)
    settings: Any = OmegaConf.to_container(model_config(config), resolve=True)
    model = outline(settings)
    shape = shape_of(model.lm, adapter_for(config, algorithm), config.optim.frozen_layers)
    prompts, targets = lengths(model, task, [*train, *val])
    new_tokens = (
        max(engine.max_new_tokens, max(targets, default=0))
        if isinstance(algorithm, Supervised)
        else (engine.max_new_tokens)
    )
    if shape.context is not None and config.task.get("too_long", "refuse") != "refuse":
        prompts = [min(tokens, max(1, shape.context - new_tokens)) for tokens in prompts]
    demand_context(shape, max(prompts) + new_tokens)
    full = config.hardware.precision == "32-true" and shape.weight_bytes == FP32
    job = Job(
        shape=shape,
        critic=critic_of(model.lm, shape, algorithm),
        hardware=hardware,
        batch=Batch(
            prompts=plan.prompts,
            group=plan.group_size,
            minibatch=plan.minibatch,
            updates=plan.updates,
            passes=passes(algorithm, plan),
            prompt_tokens=sum(prompts) / len(prompts),
            longest_prompt=max(prompts),
            new_tokens=new_tokens,
            limit=config.optim.micro_batch_tokens,
            max_rows=config.rollout.get("max_rows", EVERY_ROW),
            validation=min(config.validation.batch_size, config.validation.prompts),
            samples=not isinstance(algorithm, Supervised),
        ),
        method=method_of(algorithm, plan, agrees=full and engine.exact),
        engine=engine_name(config),
        sampling_bytes=sampling_bytes(config, shape),
        engine_share=config.rollout.get("gpu_memory", 0.0),
        checkpoints=bool(config.callbacks and config.callbacks.get("checkpoint")),
    )
    return Described(job, plan, model.source, model.tokenizer is None)


# -- where ----------------------------------------------------------------------------------------------------


def hardware_of(config: DictConfig) -> Hardware:
    """The processes that the config asks for, whether or not they are here.

    Raises:
        UserError: when a number is neither given nor to be seen here.
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
    if hardware.strategy == "fsdp" and local * nodes == 1:
        raise UserError(
            "hardware.strategy=fsdp shards a model over processes, and there is one; take hardware.devices=2 or more"
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
    return Hardware(
        gpu=gpu,
        memory=memory if gpu and memory else (memory or here) / local,
        host_memory=here if gpu and config.plan_memory is None else None,
        processes=local * nodes,
        local=local,
        sharded=hardware.strategy == "fsdp",
        offload=hardware.cpu_offload,
        precision=hardware.precision,
        gradient_checkpointing=hardware.gradient_checkpointing,
    )


# -- what -----------------------------------------------------------------------------------------------------


def lengths(model: Outline, task: Task, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Tokens of some of the prompts, and of their completions where they have any."""
    some = examples[:: max(1, len(examples) // READ)]
    tokenizer: Any = model.tokenizer
    if tokenizer is None:  # English in about as many tokens as another would need, or some more
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


def demand_context(shape: Shape, needed: int) -> None:
    """Refuses sequences that do not fit the model, as the run would."""
    if shape.context is not None and needed > shape.context:
        raise UserError(
            f"prompt and completion need {needed} positions, but the model has {shape.context}; "
            "lower rollout.max_new_tokens or shorten the prompts"
        )


def critic_of(lm: Any, shape: Shape, algorithm: Algorithm | QLearning | Supervised) -> Critic | None:
    """The critic that `policylab.config.build.critic_for` would make."""
    if isinstance(algorithm, QLearning):
        own: int | str | None = algorithm.dueling.own_layers if algorithm.dueling else None
    elif isinstance(algorithm, Algorithm) and algorithm.uses_critic and algorithm.critic:
        own = algorithm.critic.own_layers
    else:
        own = None
    if own is None:
        return None
    head = shape.hidden + 1
    if own == 0:
        return Critic(head, 0, separate=False)
    layers = shape.layers if own == "all" else int(own)
    if layers > shape.layers:
        raise UserError(
            f"algo.critic.own_layers is {own}, but the policy has {shape.layers} layers; take at most that, or all"
        )
    if shape.adapters:  # copies share what does not train
        return Critic(shape.adapters * layers // shape.layers + head, layers, separate=own == "all")
    if own == "all":
        return Critic(backbone(lm) + head, layers, separate=True)
    return Critic(layers * shape.layer_parameters + after_layers(lm) + head, layers, separate=False)


def method_of(algorithm: Algorithm | QLearning | Supervised, plan: BatchPlan, *, agrees: bool) -> Method:
    """What is held and done beside the policy.

    Args:
        agrees: log-probs recorded while sampling are those of the policy in training.
    """
    if isinstance(algorithm, Supervised):
        return Method(False, False, False, 0, False, False, 0, True)
    if isinstance(algorithm, QLearning):
        return Method(True, False, algorithm.target is not None, 1, True, False, 0, True)
    kl, update = algorithm.kl, algorithm.update
    region = isinstance(update, TrustRegion)
    first_pass_tells = plan.updates == 1 and kl.place != "reward" and not region
    again = algorithm.needs_policy_logprobs or (not agrees and not first_pass_tells)
    reestimated = update.epochs - 1 if getattr(update, "reestimate", False) else 0
    return Method(
        reference=kl.reference is not None,
        moving=isinstance(kl.reference, MovingReference),
        target=False,
        forwards=(kl.reference is not None) + again + 2 * kl.exact_in_reward + reestimated,
        whole=region,
        compares=kl.exact_in_reward or kl.exact_in_loss,
        vectors=VECTORS if region else 0,
        optimizes_policy=not region,
    )


def passes(algorithm: Algorithm | QLearning | Supervised, plan: BatchPlan) -> float:
    """Forward and backward passes over each sequence of an iteration, a third of one for a forward pass alone."""
    if isinstance(algorithm, Supervised):
        return 1.0
    if isinstance(algorithm, QLearning):
        third = 0 if algorithm.target is None else 1 / 3
        return (1 + third) * plan.minibatch * plan.updates / plan.sequences
    update = algorithm.update
    if isinstance(update, TrustRegion):  # as TrustRegionUpdater.forward_passes counts them
        products = update.fisher_share * 5 * (update.cg_iterations + 1)
        return (3 + products + 3 + 4 + (update.critic_epochs if algorithm.uses_critic else 0)) / 3
    return float(update.epochs)


def engine_name(config: DictConfig) -> Literal["cached", "generate", "vllm"]:
    """By the class of the engine; another one than ours is taken for Hugging Face's generate."""
    name = config.rollout["_target_"].rsplit(".", 1)[-1]
    return {"CachedEngine": "cached", "VllmEngine": "vllm"}.get(name, "generate")  # type: ignore[return-value]


def sampling_bytes(config: DictConfig, shape: Shape) -> int:
    """Of a number in the products of sampling."""
    if config.rollout.get("dtype") == "bfloat16" or config.hardware.precision == "bf16-mixed":
        return BF16
    return shape.weight_bytes
