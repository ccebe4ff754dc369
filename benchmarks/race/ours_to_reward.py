"""Our side of `benchmarks/to_reward.py`: the shipped preset, with the recipe's reward."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from lightning import seed_everything
from omegaconf import DictConfig, open_dict

from policylab.cli.entry import prepare
from policylab.cli.logs import silence_noise
from policylab.config.build import build
from policylab.data.rollout import Completion
from race.lane import Lane
from race.ours import ROOT, Racer, facts
from race.recipe import Recipe, held_out_reward, reward

#: Nothing but training, as on the other side.
ALONE = (
    "hardware=cpu",
    "callbacks=none",
    "callbacks.checkpoint=null",
    "logger.csv=null",
    "validation.prompts=1",
)


def preset(algo: str, seed: int, iterations: int) -> DictConfig:
    """The composed config of ``train.py algo=ALGO seed=SEED``, without its own validations."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(
            "train",
            [
                *ALONE,
                f"algo={algo}",
                f"seed={seed}",
                f"iterations={iterations}",
                f"validation.every={iterations}",
            ],
        )


def score(completions: list[Completion]) -> list[float]:
    """The recipe's reward."""
    return [reward(completion.text) for completion in completions]


def main(folder: Path) -> None:
    prepare(str(ROOT / "train.py"))
    lane, recipe = Lane(), Recipe.read(folder)
    config = preset(recipe.algo, recipe.seed, recipe.iterations)
    with open_dict(config):
        config.reward = {"_target_": "race.ours_to_reward.score", "_partial_": True}
        config.paths.run = str(folder)
    silence_noise()
    seed_everything(recipe.seed, verbose=False)
    experiment = build(config, folder)
    module: Any = experiment.module
    lane.evaluate = lambda: held_out_reward(module.policy.lm.generate, module.policy.tokenizer, recipe)
    experiment.trainer.callbacks.append(Racer(lane, facts("cpu")))  # type: ignore[attr-defined]
    experiment.trainer.fit(module, datamodule=experiment.data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
