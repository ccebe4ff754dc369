"""Every config file, by glob: a new file is tested without another entry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf

from conftest import composed
from small_runs import quick

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"

#: One iteration of tiny numbers on a random model.
SMALL = [
    "debug=fast",
    "iterations=1",
    "callbacks=none",
    "callbacks.checkpoint=null",
    "hardware=cpu",
]
#: Texts for supervised training: the embedded data set has only openings, without completions.
TEXTS = Path(__file__).parent / "texts.jsonl"
#: Models without local weights: composed, not run.
REMOTE = {"model/gpt2", "model/gpt2-medium", "model/hf", "model/smollm2"}
#: 124 M parameters: composed, not run, in the fast tests.
LARGE = {"model/gpt2_scratch"}
#: Axes of Q-learning alone.
Q_AXES = {"backup", "dueling", "exploration", "target"}
#: Needs a GPU and an optional package: test_vllm_engine.py runs it on a stub.
NEEDS_GPU = {"rollout/vllm"}
#: Loggers that need optional packages or write files: other tests run them.
LOGGERS = {"logger/mlflow", "logger/wandb", "logger/tensorboard", "logger/all"}
#: Several processes, which test_cluster.py and test_sharding.py start: composed here, not run.
SEVERAL = {f"hardware/{option}" for option in ("ddp", "ddp_cpu", "ddp_multinode", "fsdp", "slurm")}
#: Presets that run with their tuned numbers (algo_model): composed alone, not run.
PAIRED = {f"algo/{path.stem.rsplit('_', 1)[0]}" for path in (CONFIGS / "algo_model").glob("*_tiny.yaml")}
#: An algorithm's axes: test_presets.py trains with every option and changes each of its fields.
AXES = {f"algo/{path.parent.name}/{path.stem}" for path in (CONFIGS / "algo").glob("*/*.yaml")}
#: Options that are run together with another choice.
GO_WITH = {"algo_monitor": "algo", "model_optim": "model"}
VALUES = {f"{group}/{path.stem}" for group in GO_WITH for path in (CONFIGS / group).glob("*.yaml")}
#: Runs of the fast tests: presets of each kind, and options that no other test runs. README's test trains the default.
QUICK = {
    *("algo_model/dapo_walker", "algo_model/trpo_walker", "algo_model/dqn_walker", "algo_model/sft_tiny"),
    *("hardware/gpu", "model/adapter/lora", "reward/optimality", "rollout/generate"),
}
NOT_RUN = REMOTE | LARGE | LOGGERS | NEEDS_GPU | PAIRED | SEVERAL | AXES | VALUES
#: Not a choice of a training run.
ELSEWHERE = {"hydra", "paths", "callbacks", "debug"}


def choices() -> list[str]:
    """``group/option`` of every file below ``configs`` that is in a group of a training run."""
    files = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml"))
    return sorted(str(f) for f in files if f.parent != Path() and f.parts[0] not in ELSEWHERE)


def selecting(choice: str) -> list[str]:
    """Overrides that select ``group/option`` in a valid combination."""
    group, option = choice.rsplit("/", 1)
    pick = f"{group}={option}"
    if group in GO_WITH:
        return [f"{GO_WITH[group]}={option}"]
    if group == "model":
        # The walker's vocabulary cannot spell reviews.
        task = "random_walks" if option.startswith("walker") else "reviews"
        return [f"task={task}", pick, *(["model.name=org/model"] if option == "hf" else [])]
    if group == "algo_model":  # numbers for a pair of algorithm and model, selected by selecting both
        algo, model = option.rsplit("_", 1)
        return [
            f"task={'random_walks' if model == 'walker' else 'reviews'}",
            f"algo={algo}",
            f"model={model}",
            *([f"task.source={TEXTS}", "task.held_out=8"] if option == "sft_tiny" else []),
        ]
    if group == "task":
        return [pick]
    if group.removeprefix("algo/") in Q_AXES:
        preset = (
            "dqn" if option in ("hard", "epsilon", "periodic") or pick == "algo/dueling=none" else "soft_q"
        )
        return ["model=tiny_scratch", f"algo={preset}", pick]
    extra = {
        "task/random_walks": ["model=walker_scratch"],
        "reward/optimality": ["task=random_walks", "model=walker_scratch"],
        "reward/environment": ["task=guess_number"],
        "algo/sft": ["task=random_walks", "model=walker_scratch"],
        "algo/reference/none": ["model=tiny_scratch", "algo/kl=none"],
        "algo/surrogate/sequence_ratio": ["model=tiny_scratch", "algo=gspo"],
        "algo/truncation/mask": ["task=random_walks"],  # a policy whose completions end
        "algo/critic/none": ["algo/advantage=mean_baseline"],
        "algo/surrogate/logprob": ["algo/update=single_step"],
        "algo/update/single_step": ["algo/surrogate=ratio"],
        "algo/update/natural_gradient": ["algo/surrogate=ratio"],
    }.get(choice, ["model=tiny_scratch"])
    return [*extra, pick]


def one_iteration(config: DictConfig, folder: Path) -> tuple[Trainer, dict[str, float]]:
    """Builds and trains one iteration as ``train.py`` does, without the console."""
    from policylab.config.build import build

    Path(config.paths.run).mkdir(parents=True, exist_ok=True)
    experiment = build(config, folder)
    experiment.trainer.validate(experiment.module, datamodule=experiment.data, verbose=False)
    experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    return experiment.trainer, experiment.module.metrics


@pytest.mark.parametrize(
    "choice", quick([c for c in choices() if c in NOT_RUN], NOT_RUN - AXES - VALUES - PAIRED)
)
def test_choice_composes(compose, choice):
    """All interpolations resolve, and the whole config can be saved. Choices that run check this while they run.

    The fast tests compose presets and axes without the other groups, in test_presets.py and test_combinations.py.
    """
    OmegaConf.to_yaml(compose(selecting(choice)), resolve=True)


@pytest.mark.parametrize("choice", quick([c for c in choices() if c not in NOT_RUN], QUICK))
@pytest.mark.skipif(sys.platform == "win32", reason="the run folder's link needs a POSIX file system")
def test_choice_runs_an_iteration(compose, tmp_path, choice):
    if choice == "hardware/gpu":
        import torch

        if not torch.cuda.is_available():
            from policylab.errors import UserError

            with pytest.raises(UserError, match="torch sees no GPU"):
                one_iteration(compose([*selecting(choice), *SMALL[:-1]]), tmp_path)
            return
    small = SMALL[:-1] if choice.startswith("hardware/") else SMALL
    _, metrics = one_iteration(compose([*selecting(choice), *small]), tmp_path)
    assert metrics["train/loss"] == metrics["train/loss"]  # not NaN
    assert list(tmp_path.rglob("metrics.csv"))


def test_supervised_training_is_judged_by_its_loss_and_models_from_scratch_have_a_rate_of_theirs(compose):
    scratch, tiny = compose(["algo=sft", "model=tiny_scratch"]), compose(["algo=sft", "callbacks=none"])
    for config in (scratch, tiny):
        assert (config.callbacks.checkpoint.monitor, config.callbacks.checkpoint.mode) == ("val/loss", "min")
    assert (scratch.optim.lr, tiny.optim.lr) == (1e-3, 3e-4)
    assert compose([]).callbacks.checkpoint.monitor == "val/reward"


@pytest.mark.parametrize(("algo", "direction"), [("ppo", "maximize"), ("sft", "minimize")])
def test_a_search_optimizes_the_metric_of_the_best_checkpoint(algo, direction):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweeper = composed("train", ("hparams_search=optuna", f"algo={algo}")).hydra.sweeper
    assert OmegaConf.to_container(sweeper, resolve=True)["direction"] == direction
    assert sweeper.max_failure_rate == 1.0, "a trial that diverges does not end the search"


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "experiments").glob("*.yaml")))
def test_recipe_composes_and_names_its_command(compose, recipe):
    """Hydra needs the package in the first line; the command is in the second."""
    OmegaConf.to_yaml(compose([f"experiments={recipe}"]), resolve=True)
    second = (ROOT / "experiments" / f"{recipe}.yaml").read_text().splitlines()[1]
    assert second.startswith("# python train.py")
    assert f"experiments={recipe}" in second


@pytest.mark.parametrize("mode", sorted(p.stem for p in (CONFIGS / "debug").glob("*.yaml")))
def test_debug_mode_composes(compose, mode):
    OmegaConf.to_yaml(compose([f"debug='{mode}'"]), resolve=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=ppo", "callbacks.kl.exact=true", "algo/importance=truncated", "algo/critic=own_layers"],
        *(
            pytest.param(overrides, marks=pytest.mark.slow)
            for overrides in (["algo=dapo", "rollout.group_size=2"], ["algo=trpo"], ["algo=dqn"])
        ),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_metric_is_in_the_glossary(compose, tmp_path, overrides):
    """All columns of ``metrics.csv`` but a reward's own parts, which the glossary describes by pattern."""
    one_iteration(compose(["task=random_walks", *SMALL, "callbacks=default", *overrides]), tmp_path)
    (file,) = tmp_path.rglob("metrics.csv")
    glossary = (ROOT / "docs" / "metrics.md").read_text()
    columns = file.read_text().splitlines()[0].split(",")
    missing = [c for c in columns if f"`{c}`" not in glossary and "/reward/" not in c]
    assert not missing
