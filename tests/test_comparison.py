"""The recipe that compares all methods at equal cost."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
#: Trains without sampling, so sampled tokens do not measure its cost.
SAMPLES_NOTHING = {"sft"}


def test_every_preset_takes_part(compose):
    swept = OmegaConf.load(ROOT / "experiments" / "compare_algorithms.yaml").hydra.sweeper.params
    presets = {path.stem for path in (ROOT / "configs" / "algo").glob("*.yaml")} - SAMPLES_NOTHING
    assert presets <= set(swept.algo.split(",")), (
        "a new preset belongs into experiments/compare_algorithms.yaml"
    )
    assert len(swept.seed.split(",")) >= 5
    tasks = {
        task: compose(["experiments=compare_algorithms", f"task={task}"]) for task in swept.task.split(",")
    }
    assert len({config.max_tokens for config in tasks.values()}) == 1
    assert {task: config.model.name for task, config in tasks.items()} == {
        "reviews": "tiny",
        "random_walks": "walker",
    }
