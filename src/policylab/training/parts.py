"""The parts from which every trainer is built, whatever its algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policylab.data.plan import BatchPlan
from policylab.data.rollout import Prompt
from policylab.models.policy import Policy
from policylab.rewards.scorer import Scorer
from policylab.rollouts.engine import Engine
from policylab.tasks.base import Task
from policylab.training.needs import Cost, Needs
from policylab.training.optimizer import AdamW


@dataclass(frozen=True)
class Parts:
    """The objects and settings of a trainer, built from the config."""

    policy: Policy
    engine: Engine
    scorer: Scorer
    task: Task
    optim: AdamW
    plan: BatchPlan
    needs: Needs
    cost: Callable[[bool], Cost]  #: of an iteration, by whether recorded log-probs are exact
    train: Sequence[Prompt]  #: all prompts of training
    val: Sequence[Prompt]  #: all prompts of a validation
    #: completions sampled at once on each process; None: as many as should fit in memory
    max_rows: int | None
    seed: int  #: seed of the sampling noise and the order of minibatches
    iterations: int  #: length of the whole run
    #: limit on tokens sampled in training; it may end the run before its last iteration
    max_tokens: int | None
    resolved_config: str  #: YAML; with it, a checkpoint can be loaded without the run folder
    data: str  #: fingerprint of the task's examples
