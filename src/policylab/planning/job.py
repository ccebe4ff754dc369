"""The numbers that a plan is computed from. A changed setting is a copy with another number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from policylab.data.plan import BatchPlan
from policylab.models.memory import rows_at_once, tokens_a_pass
from policylab.models.size import BF16, CriticSize, Size
from policylab.rollouts.engine import Engine
from policylab.rollouts.memory import Piece
from policylab.training.methods import Cost, Needs
from policylab.training.optimizer import state_bytes


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run.

    Args:
        gpu: whether each process has its own GPU; otherwise the processes of a machine share its main memory.
        memory: bytes available to a process: the GPU's, or its share of main memory.
        host_memory: main memory of a machine with GPUs, in bytes; None if unknown.
        local: processes per machine.
        sharded: whether weights, gradients and moments are sharded over the processes (fsdp).
        offload: whether the shards are in main memory (fsdp).
    """

    gpu: bool
    memory: float
    host_memory: float | None
    local: int
    sharded: bool
    offload: bool
    precision: Literal["32-true", "bf16-mixed", "bf16-true"]
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Job:
    """A run in numbers.

    Args:
        source: where the model comes from, for display.
        stand_in: whether prompts were counted with another tokenizer than the model's.
        prompt_tokens: mean tokens of a prompt.
        longest_prompt: tokens of the longest prompt.
        new_tokens: most tokens of a completion; the plan assumes this length for all.
        sampling_bytes: bytes of one number in the engine's products.
        validation: prompts of a validation batch, over all processes.
        checkpoints: whether states are saved during training.
        keys: dotted keys of the config, groups included: what a command line can change.
    """

    source: str
    stand_in: bool
    size: Size
    critic_size: CriticSize
    hardware: Hardware
    plan: BatchPlan
    prompt_tokens: float
    longest_prompt: int
    new_tokens: int
    needs: Needs
    cost: Cost
    engine: Engine
    sampling_bytes: int
    micro_batch_tokens: int | None
    max_rows: int | None
    validation: int
    checkpoints: bool
    keys: frozenset[str]

    # -- what trains -------------------------------------------------------------------------------------

    @property
    def moved(self) -> int:
        """Number of weights that the optimizer moves."""
        return self.critic_size.parameters + self.size.trained * self.cost.optimizes_policy

    @property
    def gradients(self) -> float:
        """Bytes of their gradients."""
        return float(self.moved * self.size.trained_bytes)

    @property
    def state(self) -> float:
        """Bytes of optimizer state."""
        return state_bytes(self.moved, self.size.trained_bytes)

    @property
    def spread(self) -> int:
        """Number of processes that weights, gradients and moments are sharded over."""
        return self.plan.processes if self.hardware.sharded else 1

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in the matrix products of training."""
        return BF16 if self.hardware.precision == "bf16-mixed" else self.size.weight_bytes

    # -- what a process samples and passes through ---------------------------------------------------------

    @property
    def samples(self) -> bool:
        """Whether training samples; otherwise it learns from given completions."""
        return self.needs.learns_from == "rollouts"

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.longest_prompt + self.new_tokens

    @property
    def sequences(self) -> int:
        """Sequences of an iteration."""
        return self.plan.sequences // self.plan.processes

    @property
    def prompts(self) -> int:
        """Distinct prompts of an iteration."""
        return self.plan.prompts // self.plan.processes

    @property
    def minibatch(self) -> int:
        """Sequences of an optimizer step."""
        return max(1, self.plan.minibatch // self.plan.processes)

    @cached_property
    def limit(self) -> int:
        """Most tokens of a forward and backward pass."""
        return self.micro_batch_tokens or tokens_a_pass(
            self.size,
            whole_distributions=self.needs.whole_distributions,
            recomputes_layers=self.hardware.gradient_checkpointing,
            gpu_bytes=int(self.hardware.memory) if self.hardware.gpu else None,
        )

    @cached_property
    def rows(self) -> int:
        """Most completions sampled at once."""
        number, memory = self.size.weight_bytes, self.hardware.memory
        return self.max_rows or rows_at_once(self.size, context=self.context, number=number, memory=memory)

    @property
    def pieces(self) -> int:
        """Pieces in which an iteration's completions are sampled."""
        return max(1, -(-self.sequences // self.rows))

    def largest_pieces(self) -> list[Piece]:
        """The largest piece of a validation batch and of training."""
        rows = min(self.rows, max(1, self.validation // self.plan.processes))
        sizes = [(rows, rows)]
        if self.samples:
            rows = min(self.rows, self.sequences)
            sizes.append((min(self.prompts, -(-rows // self.plan.group_size)), rows))
        return [
            Piece(
                prompts,
                rows,
                self.prompt_tokens,
                self.longest_prompt,
                self.new_tokens,
                number=self.sampling_bytes,
                compute=self.compute_bytes,
                gpu=self.hardware.gpu,
            )
            for prompts, rows in sizes
        ]

    def tokens(self, sequences: int) -> float:
        """Tokens that a model reads for this many sequences of the rollout; with packing, each distinct prompt once."""
        if not self.size.packs:
            return float(sequences * self.context)
        # expected number of this process's prompts that at least one of the sequences answers
        share = min(1.0, sequences / self.sequences)
        distinct = min(sequences, self.prompts * (1 - (1 - share) ** self.plan.group_size))
        return distinct * self.prompt_tokens + sequences * (self.new_tokens - 1)

    @cached_property
    def pass_tokens(self) -> float:
        """Tokens of the largest forward and backward pass."""
        return min(self.tokens(self.minibatch), max(self.limit, self.context))

    @property
    def micro_batches(self) -> int:
        """Passes of an optimizer step."""
        return max(1, -int(-self.tokens(self.minibatch) // self.pass_tokens))
