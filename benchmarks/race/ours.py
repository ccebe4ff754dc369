"""Our side: the composed config, built and trained as by ``train.py``; a callback takes part in the race."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, seed_everything
from omegaconf import DictConfig, open_dict
from torch import Tensor

from policylab.cli.entry import prepare
from policylab.cli.logs import silence_noise
from policylab.config.build import build
from policylab.data.rollout import Completion, Rollout
from policylab.runs.environment import describe_environment
from policylab.tasks.base import Example
from policylab.training.module import TrainingModule
from race import work
from race.lane import Lane
from race.work import Work

ROOT = Path(__file__).parents[2]
#: More iterations than needed: the referee ends the run.
ENDLESS = 10**6
#: Far above the probability of EOS and PAD, also after some updates, but too small to change the samples much.
RARE = 1e-2


class RacePrompts:
    """The task: the work's prompts as text for the stand-in tokenizer."""

    name = "race"
    instruction = None

    def __init__(self, texts: Sequence[str]) -> None:
        self.train = [Example(text, "", None) for text in texts]
        self.val = self.train

    def metrics(self, completions: Sequence[Completion]) -> dict[str, list[float]]:
        return {}


def reward(completions: Sequence[Completion]) -> list[float]:
    """The work's reward."""
    return [work.reward(completion.tokens) for completion in completions]


class Scheduled:
    """An engine whose completions end where the schedule says.

    The engines draw by inverse CDF, so noise of 0 draws the first id, which is EOS, and noise above the probability
    of EOS and PAD draws neither. The engine itself is unchanged.
    """

    def __init__(self, engine: Any, lane: Lane, lengths: Sequence[int]) -> None:
        self._engine, self._lane = engine, lane
        self._lengths = torch.tensor(lengths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def sample(
        self, policy: Any, prompts: Sequence[Any], group_size: int, noise: Tensor, behaviour: Any = None
    ) -> Rollout:
        noise = RARE + (1 - RARE) * noise
        if len(noise) == len(self._lengths):  # not the preflight
            ends = self._lengths < noise.shape[1]
            noise[ends.nonzero().squeeze(-1), self._lengths[ends] - 1] = 0.0
        with self._lane.clock("rollout"):
            return self._engine.sample(policy, prompts, group_size, noise, behaviour)


class Racer(Callback):
    """Waits for the referee before each iteration, which lasts until the next one could begin."""

    def __init__(self, lane: Lane, facts: Mapping[str, Any]) -> None:
        self._lane, self._facts = lane, facts
        self._ran = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if not self._ran:
            self._ran = True
            self._lane.ready(self._facts)
            return
        rollout: Rollout = module.rollout
        rows = zip(rollout.prompt_tokens.tolist(), rollout.prompt_lengths.tolist(), strict=True)
        prompts = [row[len(row) - n :] for row, n in rows]
        facts = {
            "prompts": work.digest(prompts),
            "lengths": rollout.lengths.tolist(),
            "update": module.metrics["perf/update_s"],
        }
        if "gradients" in self._lane.command:
            completions = [row[:n].tolist() for row, n in zip(rollout.tokens, rollout.lengths, strict=True)]
            facts["sequences"] = list(zip(prompts, completions, strict=True))
        self._lane.done(facts)


def overrides(race: Work, folder: Path) -> list[str]:
    """The work as overrides of our config."""
    common = [
        "model=hf", f"model.path={folder / 'policy'}", f"model.name={race.model}",
        f"hardware={'cpu' if race.device == 'cpu' else 'gpu'}",
        f"hardware.precision={'32-true' if race.precision == 'fp32' else 'bf16-mixed'}",
        "callbacks=none", "callbacks.checkpoint=null", "logger.csv=null", "~algo_model", f"paths.run={folder}",
        f"iterations={ENDLESS}", f"validation.every={ENDLESS}", "validation.prompts=1",
        f"rollout.prompts={race.prompts}", f"rollout.group_size={race.group_size}", "rollout.temperature=1.0",
        f"rollout.max_new_tokens={race.new_tokens}", f"optim.lr={work.LEARNING_RATE}",
        f"optim.betas=[{work.BETAS[0]},{work.BETAS[1]}]", f"optim.eps={work.EPS}", "optim.max_grad_norm=null",
        f"algo={race.algo}",
    ]  # fmt: skip
    epoch = ["algo.update.epochs=1", "algo.update.minibatches=1"]
    if race.algo == "grpo":
        return [*common, *epoch, "algo/kl=none", "algo/reference=none"]
    penalty = f"algo.kl.controller.initial={work.KL_COEF}"
    if race.algo == "rloo":
        return [*common, penalty, "algo.reduction.constant=1"]
    shared = race.critic == "shared"
    critic = (
        ["algo/critic=shared_trunk"]
        if shared
        else ["algo/critic=reward_model", f"algo.critic.init={folder / 'critic'}"]
    )
    return [
        *common, *epoch, penalty, *critic, f"algo.critic.coef={work.VALUE_COEF}",
        f"algo.advantage.lam={work.LAMBDA}",
    ]  # fmt: skip


def config(race: Work, folder: Path, prompts: Sequence[Sequence[int]]) -> DictConfig:
    """The composed config with the race's task and reward."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("train", overrides(race, folder))
    with open_dict(composed):
        composed.task = {"_target_": "race.ours.RacePrompts", "texts": [work.as_text(ids) for ids in prompts]}
        composed.reward = {"_target_": "race.ours.reward", "_partial_": True}
    return composed


def gradients(module: TrainingModule) -> dict[str, Tensor]:
    """Gradients by parameter name in Hugging Face's classes, as on TRL's side."""
    policy = module.policy
    found = {f"policy.{name}": p.grad for name, p in policy.lm.named_parameters()}
    if policy.critic is not None:
        for name, p in policy.critic.named_parameters():
            found[f"critic.{name.removeprefix('backbone.').replace('head.', 'score.')}"] = p.grad
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def facts(device: str) -> dict[str, Any]:
    """Facts of this environment, for the results."""
    environment = describe_environment(ROOT)
    return {
        "versions": {"policylab": environment["policylab"], **environment["packages"]},
        "python": environment["python"], "cpu": environment["cpu"], "cores": environment["cpu_cores"],
        "gpu": environment["gpus"][0] if device == "cuda" else "",
        "commit": environment["git"]["commit"], "dirty": environment["git"]["dirty"],
    }  # fmt: skip


def main(race: Work, folder: Path) -> None:
    prepare(str(ROOT / "train.py"))
    lane = Lane()
    prompts = race.prompt_ids(work.vocabulary_of(folder / "policy"))
    silence_noise()
    seed_everything(0, verbose=False)
    experiment = build(config(race, folder, prompts), folder)
    module = experiment.module
    lane.gradients = lambda: gradients(module)
    sampler = module.sampler
    sampler.engine = Scheduled(sampler.engine, lane, race.schedule())
    experiment.trainer.callbacks.append(Racer(lane, facts(race.device)))  # type: ignore[attr-defined]
    experiment.trainer.fit(module, datamodule=experiment.data)


if __name__ == "__main__":
    main(Work.from_json(sys.argv[1]), Path(sys.argv[2]))
