"""Q-learning: rollouts are added to a replay memory, and updates sample from it."""

from __future__ import annotations

from omegaconf import DictConfig

from policylab.algorithms import QLearning
from policylab.data.plan import BatchPlan, ReplayPlan
from policylab.errors import UserError
from policylab.training import QTraining
from policylab.training.methods.base import Method
from policylab.training.needs import Cost, CriticNeed, Needs
from policylab.training.parts import Parts


class QLearningMethod(Method[QLearning]):
    """Several updates per iteration, on sequences drawn from the memory."""

    def plan(self, rollout: DictConfig, processes: int) -> BatchPlan:
        replay = self.algorithm.replay
        return ReplayPlan(
            rollout.prompts, rollout.group_size, 1, 1, processes, replay.batch_size, replay.updates
        )

    def needs(self) -> Needs:
        dueling = self.algorithm.dueling
        return Needs(
            critic=None if dueling is None else CriticNeed(dueling.own_layers),
            reference="frozen",
            target=self.algorithm.target is not None,
            whole_distributions=True,
        )

    def check_lengths(self, plan: BatchPlan, longest: int) -> None:
        self.algorithm.replay.check_room(plan.sequences, longest)

    def check_episodes(self) -> None:
        raise UserError(
            f"algo={self.algorithm.name} keeps one reward per sequence in its replay memory, but a task with an "
            "environment has one per turn; take algo=ppo, or another method that trains on its rollouts"
        )

    def cost(self, plan: BatchPlan, *, exact: bool) -> Cost:
        """The target network adds a forward pass to each pass of an update."""
        a_pass = 1 if self.algorithm.target is None else 4 / 3
        return Cost(forwards=1, passes=a_pass * plan.minibatch * plan.updates / plan.sequences)

    def trainer(self, parts: Parts) -> QTraining:
        return QTraining(self.algorithm, parts)
