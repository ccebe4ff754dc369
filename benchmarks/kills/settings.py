"""The runs, of a few seconds each. Together they use every part of the state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A kind of run."""

    name: str
    overrides: tuple[str, ...]
    iterations: int = 20
    processes: int = 1

    def command(self) -> list[str]:
        """Arguments of ``train.py``, without the folder."""
        return [*COMMON, *self.overrides, f"iterations={self.iterations}"]


#: A schedule, so that a lost optimizer position is detected; samples of every iteration.
COMMON = (
    "task=random_walks", "hardware=cpu", "optim.schedule=cosine", "optim.warmup=5", "rollout.prompts=8",
    "validation.every=6", "validation.prompts=32", "callbacks.checkpoint.every=2", "callbacks.samples.every=1",
    "callbacks.samples.keep=4",
)  # fmt: skip
TWO = ("hardware=ddp_cpu", "hardware.devices=2")

SETTINGS = {
    setting.name: setting
    for setting in (
        # an adaptive KL coefficient, a critic and its moments
        Setting("ppo", ("algo=ppo", "algo/kl=in_reward_adaptive")),
        # two more processes that score
        Setting("grpo", ("algo=grpo", "reward.workers=2")),
        # sequences in memory, a target network
        Setting("dqn", ("algo=dqn", "algo.replay.batch_size=16"), iterations=14),
        # a solver, a critic with an optimizer of its own
        Setting("trpo", ("algo=trpo",), iterations=8),
        # the order of a data set
        Setting("sft", ("algo=sft", "algo.batch_size=16"), iterations=30),
        # a W&B run that must stay one run; a budget that ends the run before its last iteration
        Setting("rloo_wandb", ("algo=rloo", "logger=wandb", "max_tokens=2000")),
        Setting("ppo_2", ("algo=ppo", *TWO), iterations=14, processes=2),
        Setting("grpo_2", ("algo=grpo", *TWO), iterations=14, processes=2),
    )
}
