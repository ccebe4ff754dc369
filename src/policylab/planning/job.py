"""All that a plan is computed from, as plain numbers. A knob that is turned is a copy with another number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from policylab.models.memory import rows_at_once, tokens_a_pass
from policylab.planning.shape import Shape

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Critic:
    """A critic in numbers.

    Args:
        parameters: its own, the head included.
        layers: of its own that a token goes through.
        separate: whether it is a network of its own, which reads the tokens itself.
    """

    parameters: int
    layers: int
    separate: bool


@dataclass(frozen=True)
class Hardware:
    """Where it runs.

    Args:
        gpu: whether a process has a GPU to itself; else the processes of a machine share its main memory.
        memory: bytes that a process may fill: the GPU's, or its share of main memory.
        host_memory: of a machine, for what lies in main memory beside GPUs; None where nobody knows.
        processes: of the whole run.
        local: of one machine.
        sharded: weights, gradients and moments are spread over the processes (fsdp).
        offload: the shards lie in main memory (fsdp).
    """

    gpu: bool
    memory: float
    host_memory: float | None
    processes: int
    local: int
    sharded: bool
    offload: bool
    precision: Literal["32-true", "bf16-mixed", "bf16-true"]
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Batch:
    """An iteration.

    Args:
        prompts: distinct ones, over all processes.
        group: completions of each.
        minibatch: sequences of an optimizer step, over all processes.
        updates: optimizer steps.
        passes: forward and backward passes over each sequence, in all updates.
        prompt_tokens: of a prompt, mean.
        longest_prompt: tokens.
        new_tokens: of a completion, at most; the plan takes all to be as long.
        limit: tokens a forward pass; None as many as should fit.
        max_rows: completions sampled at once; None as many as should fit.
        validation: prompts a validation batch, over all processes.
        samples: whether training samples; else it learns from what is there.
    """

    prompts: int
    group: int
    minibatch: int
    updates: int
    passes: float
    prompt_tokens: float
    longest_prompt: int
    new_tokens: int
    limit: int | None
    max_rows: int | None
    validation: int
    samples: bool

    @property
    def sequences(self) -> int:
        return self.prompts * self.group


@dataclass(frozen=True)
class Method:
    """What an algorithm holds and does beside the policy and its critic.

    Args:
        reference: a second copy of what trains.
        moving: it changes, and so belongs to the saved state.
        target: a third copy, critic included (Q-learning).
        forwards: forward passes of a language model over the rollout between sampling and the updates.
        whole: whole distributions of all tokens are held, not a few figures.
        compares: two distributions are held beside each other (exact KL).
        vectors: copies of the trained weights as one vector (trust region).
        optimizes_policy: the optimizer moves the policy, not the critic alone.
    """

    reference: bool
    moving: bool
    target: bool
    forwards: float
    whole: bool
    compares: bool
    vectors: int
    optimizes_policy: bool


@dataclass(frozen=True)
class Job:
    """A run in numbers.

    Args:
        engine: that samples: ``cached``, ``generate`` or ``vllm``.
        sampling_bytes: of a number in its products.
        engine_share: of a GPU's memory that the engine takes for itself (vllm).
        checkpoints: whether states are saved while training goes on.
    """

    shape: Shape
    critic: Critic | None
    hardware: Hardware
    batch: Batch
    method: Method
    engine: Literal["cached", "generate", "vllm"]
    sampling_bytes: int
    engine_share: float
    checkpoints: bool

    @property
    def compute_bytes(self) -> int:
        """Of a number that goes into a product in training."""
        return BF16 if self.hardware.precision == "bf16-mixed" else self.shape.weight_bytes

    @property
    def casts(self) -> bool:
        """Whether products take a copy of the weights in another precision."""
        return self.compute_bytes < self.shape.weight_bytes

    @property
    def sequences(self) -> int:
        """Of an iteration, on one process."""
        return self.batch.sequences // self.hardware.processes

    @property
    def prompts(self) -> int:
        """Distinct ones of an iteration, on one process."""
        return max(1, self.batch.prompts // self.hardware.processes)

    @property
    def minibatch(self) -> int:
        """Sequences of an optimizer step, on one process."""
        return max(1, self.batch.minibatch // self.hardware.processes)

    @cached_property
    def limit(self) -> int:
        """Tokens a forward and backward pass, at most."""
        return self.batch.limit or tokens_a_pass(
            self.shape,
            whole_distributions=self.method.whole,
            recomputes_layers=self.hardware.gradient_checkpointing,
            gpu_bytes=int(self.hardware.memory) if self.hardware.gpu else None,
        )

    @cached_property
    def rows(self) -> int:
        """Completions that are sampled at once, at most."""
        return self.batch.max_rows or rows_at_once(
            self.shape,
            context=self.batch.longest_prompt + self.batch.new_tokens,
            number=self.shape.weight_bytes,
            memory=self.hardware.memory,
        )

    @property
    def pieces(self) -> int:
        """Pieces in which an iteration's completions are sampled."""
        return max(1, -(-self.sequences // self.rows))

    def tokens(self, sequences: int) -> float:
        """That a model reads for so many sequences of the rollout: with packing, each distinct prompt once."""
        batch = self.batch
        if not self.shape.packs:
            return sequences * (batch.longest_prompt + batch.new_tokens)
        # Of the prompts of this process, those that at least one of the sequences answers.
        share = min(1.0, sequences / self.sequences)
        distinct = min(sequences, self.prompts * (1 - (1 - share) ** batch.group))
        return distinct * batch.prompt_tokens + sequences * (batch.new_tokens - 1)

    @cached_property
    def pass_tokens(self) -> float:
        """Tokens of the largest forward and backward pass."""
        longest = self.batch.longest_prompt + self.batch.new_tokens
        return min(self.tokens(self.minibatch), max(self.limit, longest))

    @cached_property
    def pass_sequences(self) -> float:
        """Sequences of that pass."""
        return self.minibatch * min(1.0, self.pass_tokens / self.tokens(self.minibatch))

    @property
    def micro_batches(self) -> int:
        """Passes of an optimizer step."""
        return max(1, -int(-self.tokens(self.minibatch) // self.pass_tokens))
