"""Each callback alone, on a stub of the module with the fields that it reads."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console as RichConsole

from policylab.callbacks import tables
from policylab.callbacks.checkpoint import Checkpoint, iteration_of
from policylab.callbacks.console import Console
from policylab.callbacks.health import Health
from policylab.callbacks.kl import KLMonitor
from policylab.callbacks.metrics_csv import MetricsCSV
from policylab.callbacks.samples import Samples
from policylab.callbacks.tables import LoggedConsole, before_after, config_tree, pick, rows
from policylab.data.rollout import Rollout, Sample
from policylab.errors import UserError
from policylab.runs.figures import duration, headlines, number


def sample(reward: float, iteration: int = 1, split: str = "val") -> Sample:
    return Sample(
        iteration=iteration,
        split=split,
        prompt="the [film] is",
        completion=f"text of reward {reward}",
        reward=reward,
        parts={"positive": reward},
        kl=0.5,
        length=7,
        ended=True,
        tokens=(17, 9, 0),
    )


def rendered(renderable: object) -> str:
    screen = RichConsole(file=io.StringIO(), width=100)
    screen.print(renderable)
    return screen.file.getvalue()


@pytest.fixture
def trainer(tmp_path):
    """A stub of the trainer for callbacks; saves a file with the iteration."""
    trainer = SimpleNamespace(
        is_global_zero=True,
        sanity_checking=False,
        should_stop=False,
        loggers=[],
        datamodule=None,
        saves=[],
        ckpt_path=None,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )

    def save_checkpoint(path: Path, weights_only: bool) -> None:
        state = {
            "policylab": {"iteration": trainer.module.iteration, "tokens_sampled": 0},
            "state_dict": {"policy.lm.iteration": torch.tensor(trainer.module.iteration)},
        }
        trainer.strategy.checkpoint_io.save_checkpoint(state, path)
        trainer.saves.append(path)

    trainer.strategy = SimpleNamespace(checkpoint_io=None, broadcast=lambda x: x)
    trainer.save_checkpoint = save_checkpoint
    return trainer


@pytest.fixture
def module(trainer):
    """A stub of the module for callbacks."""

    class Exported:
        generation_config = None

        def state_dict(self) -> dict[str, Any]:
            return {"iteration": torch.tensor(module.iteration)}

        def named_modules(self) -> list[Any]:
            return []

        def save_pretrained(self, folder: Path, state_dict: Any = None) -> None:
            state = state_dict or self.state_dict()
            (folder / f"{type(self).__name__}.txt").write_text(str(int(state["iteration"])))

    class Tokenizer(Exported):
        pass

    module = SimpleNamespace(
        iteration=0,
        progress=SimpleNamespace(iterations=10, last_iteration=10),
        expected_seconds=None,
        metrics={},
        val_metrics={},
        samples=[],
        rollout=None,
        policy=SimpleNamespace(lm=Exported(), tokenizer=Tokenizer(), adapted=False),
        stepper=SimpleNamespace(check_weights=lambda: None),
        runtime=SimpleNamespace(all_sum=lambda x: x, gather=lambda item: [item]),
        recorded={},
    )
    module.record = module.recorded.update
    trainer.module = module
    return module


# -- KL -------------------------------------------------------------------------------------------------


def test_kl_estimators(trainer, module):
    mask = torch.tensor([[True, True], [True, False]])
    module.rollout = Rollout(
        prompt_tokens=torch.zeros(2, 1, dtype=torch.long),
        prompt_lengths=torch.ones(2, dtype=torch.long),
        tokens=torch.zeros(2, 2, dtype=torch.long),
        lengths=torch.tensor([2, 1]),
        action_mask=mask,
        ended=torch.tensor([True, True]),
        group_ids=torch.arange(2),
        prompt_ids=torch.arange(2),
        logprobs=torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]),
        # the last one is padding and must not count
        ref_logprobs=torch.tensor([[-1.5, -1.0], [-3.0, 9.0]]),
        exact_kl=torch.tensor([[0.1, 0.2], [0.3, 9.0]]),
    )
    KLMonitor(exact=False).on_train_batch_end(trainer, module, None, None, 0)
    # log ratios 0.5, -1 and 2; two sequences
    assert module.recorded["train/kl_k1"] == pytest.approx((0.5 - 1 + 2) / 2)
    assert module.recorded["train/kl_k2"] == pytest.approx((0.125 + 0.5 + 2) / 2)
    # k3 = e^-d - 1 + d: 0.106531, 0.718282, 1.135335
    assert module.recorded["train/kl_k3"] == pytest.approx(1.960148 / 2, abs=1e-5)
    assert module.recorded["train/kl_exact"] == pytest.approx(0.3)


def test_kl_without_a_reference_records_nothing(trainer, module):
    KLMonitor(exact=False).on_train_batch_end(trainer, module, None, None, 0)
    assert module.recorded == {}


# -- samples --------------------------------------------------------------------------------------------


def test_samples_are_appended(tmp_path, trainer, module):
    callback = Samples(str(tmp_path), every=2, keep=2, show=0)
    for module.iteration in (1, 2, 3, 4):
        module.samples = [sample(i / 10, module.iteration, "train") for i in range(5)]
        callback.on_train_batch_end(trainer, module, None, None, 0)
    module.samples = [sample(0.9, 4)]
    callback.on_validation_end(trainer, module)
    module.iteration = 6  # supervised training: nothing was sampled since
    callback.on_train_batch_end(trainer, module, None, None, 0)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["split"]) for line in lines] == [
        (2, "train"), (2, "train"), (4, "train"), (4, "train"), (4, "val"),
    ]  # fmt: skip
    assert lines[-1] == {
        "iteration": 4,
        "split": "val",
        "prompt": "the [film] is",
        "completion": "text of reward 0.9",
        "reward": 0.9,
        "parts": {"positive": 0.9},
        "kl": 0.5,
        "length": 7,
        "ended": True,
        "tokens": [17, 9, 0],
    }


def test_best_worst_and_between_are_shown():
    picked = pick([sample(r) for r in (0.3, -1.0, 0.9, 0.0, 0.5)], 3)
    assert [s.reward for s in picked] == [0.9, 0.3, -1.0]
    assert "the [film] is | text of reward 0.9" in rendered(tables.samples_table(picked))


def test_wandb_table_grows(tmp_path, monkeypatch, trainer, module):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logged = []
    logger = WandbLogger(
        experiment=SimpleNamespace(log=lambda content: logged.append(len(content["samples"].data)))
    )
    trainer.loggers = [logger]
    callback = Samples(str(tmp_path), every=1, keep=2, show=0)
    for module.iteration in (1, 2, 3):
        module.samples = [sample(0.1, split="train"), sample(0.2, split="train")]
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert isinstance(callback.table, wandb.Table)
    assert callback.table.log_mode == "INCREMENTAL"
    assert logged == [2, 4, 6]


# -- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, trainer, module):
    """Simulates iterations with these validation rewards; returns the iterations in ``last`` and ``best``."""

    def play(rewards: dict[int, float], iterations: int, every: int, mode: str = "max", stop_at: int = 0):
        module.progress.iterations = iterations
        callback = Checkpoint(str(tmp_path), every, "val/reward", mode, export=True)
        callback.setup(trainer, module, "fit")
        logger = MetricsCSV(str(tmp_path))
        trainer.loggers = [logger]

        def validate() -> None:
            module.val_metrics = {"val/reward": rewards[module.iteration]}
            logger.log_metrics(module.val_metrics, step=module.iteration)
            callback.on_validation_end(trainer, module)

        if module.iteration == 0:
            validate()
        trainer.ckpt_path = callback.last if module.iteration else None
        callback.on_fit_start(trainer, module)
        callback.on_train_start(trainer, module)
        for iteration in range(module.iteration + 1, iterations + 1):
            module.iteration = iteration
            logger.log_metrics({"train/reward": 0.0}, step=module.iteration)
            trainer.should_stop = module.iteration == stop_at
            callback.on_train_batch_end(trainer, module, None, None, 0)
            if trainer.should_stop:
                break
            if module.iteration in rewards:
                validate()
        callback.on_fit_end(trainer, module)
        callback.teardown(trainer, module, "fit")
        return [iteration_of(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("last", "best")]

    return play


def test_last_and_best(run, tmp_path):
    assert run({0: 0.1, 2: 0.5, 4: 0.9, 6: 0.7}, iterations=7, every=3) == [7, 4]
    assert (tmp_path / "model" / "best" / "Exported.txt").read_text() == "4"
    assert (tmp_path / "model" / "final" / "Tokenizer.txt").read_text() == "7"
    assert not list(tmp_path.rglob(".*")), "nothing half-written stays behind"


def test_the_start_is_never_best(run):
    assert run({0: 0.9, 2: 0.5}, iterations=2, every=1) == [2, 2]


def test_the_minimum_may_be_best(run):
    assert run({0: 0.9, 2: 0.5, 4: 0.6}, iterations=4, every=4, mode="min") == [4, 2]


def test_a_stopped_run_is_saved(run):
    assert run({0: 0.1}, iterations=100, every=50, stop_at=3) == [3, None]


def test_a_resumed_run_compares_with_what_came_before(run, module):
    assert run({0: 0.1, 2: 0.8}, iterations=2, every=2) == [2, 2]
    module.iteration = 2
    assert run({4: 0.5, 6: 0.9}, iterations=5, every=1) == [5, 2]
    assert run({6: 0.9}, iterations=6, every=1) == [6, 6]


def test_the_state_of_one_iteration_is_written_once(run, trainer):
    run({0: 0.1, 2: 0.5}, iterations=2, every=2)
    assert len(trainer.saves) == 2, "best is a second name for last"


def test_unknown_monitor_is_told(tmp_path, trainer, module):
    callback = Checkpoint(str(tmp_path), 1, "val/nothing", "max", export=False)
    module.iteration, module.val_metrics = 1, {"val/reward": 0.0}
    with pytest.raises(UserError, match="val/nothing is not measured; choose from: val/reward"):
        callback.on_validation_end(trainer, module)


@pytest.mark.parametrize(
    ("every", "monitor", "mode", "message"),
    [
        (0, "val/reward", "max", "checkpoint.every is 0; it must be at least 1"),
        (1, "val/reward", "maximum", "checkpoint.mode is maximum; choose max or min"),
        (1, "val/loss", "max", "checkpoint.monitor=val/loss is a loss: lower is better; take .*mode=min"),
    ],
)
def test_wrong_values_are_told(tmp_path, every, monitor, mode, message):
    with pytest.raises(UserError, match=message):
        Checkpoint(str(tmp_path), every, monitor, mode, export=False)


# -- health ---------------------------------------------------------------------------------------------

HEALTHY = {
    "train/kl": 2.0,
    "train/entropy": 3.0,
    "train/reward_std": 0.3,
    "train/ended": 0.5,
    "train/clip_fraction": 0.1,
    "train/loss": 0.1,
}


@pytest.fixture
def health():
    return Health(
        quiet_iterations=5,
        max_kl=50.0,
        min_entropy_share=0.2,
        min_reward_std=1e-4,
        min_ended_share=0.05,
        max_clip_fraction=0.4,
    )


@pytest.mark.parametrize(
    ("sick", "sign", "advice"),
    [
        ({"train/kl": 80.0}, "kl", "raise the KL coefficient"),
        ({"train/entropy": 0.5}, "entropy", "fell from 3.00 to 0.50"),
        ({"train/reward_std": 0.0}, "spread", "all rewards are the same"),
        ({"train/ended": 0.0}, "length", "raise rollout.max_new_tokens"),
        ({"train/clip_fraction": 0.6}, "clip", "60% of the tokens are clipped"),
        ({"train/loss": float("nan")}, "non-finite", "train/loss not finite"),
    ],
)
def test_each_sign_has_its_advice(health, sick, sign, advice):
    health.first = HEALTHY
    assert health.examine(HEALTHY) == {}
    found = health.examine(HEALTHY | sick)
    assert set(found) == {sign}
    assert advice in found[sign]


def test_missing_metrics_give_no_advice(health):
    assert health.examine({"train/loss": 1.0}) == {}


def test_completions_that_cannot_end_give_no_advice(health):
    health.first = HEALTHY | {"train/ended": 0.0}
    assert health.examine(HEALTHY | {"train/ended": 0.0}) == {}


def test_a_warning_is_not_repeated_at_once(health, trainer, module, caplog):
    caplog.set_level(logging.WARNING)
    module.metrics = HEALTHY
    health.on_train_batch_end(trainer, module, None, None, 0)
    for module.iteration in range(1, 12):
        module.metrics = HEALTHY | {"train/kl": 99.0}
        health.on_train_batch_end(trainer, module, None, None, 0)
    assert [record.args[0] for record in caplog.records] == [1, 6, 11]


def test_clipping_is_checked_from_the_second_iteration_on(health, trainer, module, caplog):
    caplog.set_level(logging.WARNING)
    for module.iteration in (1, 2):
        module.metrics = HEALTHY | {"train/clip_fraction": 0.6}
        health.on_train_batch_end(trainer, module, None, None, 0)
    assert [record.args[0] for record in caplog.records] == [2]


def test_health_survives_a_resume(health):
    health.first, health.warned_at = dict(HEALTHY), {"kl": 3}
    state = torch.load(save(health.state_dict()), weights_only=True)
    again = Health(5, 50.0, 0.2, 1e-4, 0.05, 0.4)
    again.load_state_dict(state)
    assert (again.first, again.warned_at) == (HEALTHY, {"kl": 3})


def save(content: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return buffer


# -- console --------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch):
    """The console's output as text, without a terminal."""
    screen = RichConsole(file=io.StringIO(), width=120, highlight=False)
    for name in ("console", "samples"):
        monkeypatch.setattr(f"policylab.callbacks.{name}.console", lambda: screen)
    return lambda: screen.file.getvalue()


def test_plain_output_is_a_line_now_and_then(screen, trainer, module):
    callback = Console(["train/reward", "train/kl", "train/absent"], plain_seconds=1e9, plain_lines=10)
    module.progress.iterations = module.progress.last_iteration = 100
    callback.on_train_start(trainer, module)
    for module.iteration in range(1, 101):
        module.metrics = {"train/reward": 0.25, "train/kl": 1.5}
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_end(trainer, module)
    lines = screen().splitlines()
    assert len(lines) == 11
    assert lines[0] == "iteration 1/100  reward 0.25  kl 1.5"
    assert lines[-1].startswith("iteration 100/100")


def test_brackets_and_names_of_pictures_are_text(caplog):
    screen = LoggedConsole(file=io.StringIO(), width=100)
    with caplog.at_level(logging.INFO):
        screen.print("logs/a b=1,[c]/best.ckpt")
        screen.print(before_after({}, {"val/f1[macro]": 0.5}))
        screen.print(rows([("[red]", "logs/:dog:")]))
    for shown in (screen.file.getvalue(), "\n".join(caplog.messages)):
        for text in ("a b=1,[c]/best", "val/f1[macro] ", "[red]  logs/:dog:"):
            assert text in shown


def test_long_iterations_get_a_line_each(screen, trainer, module):
    callback = Console([], plain_seconds=0, plain_lines=1)
    callback.on_train_start(trainer, module)
    for module.iteration in (1, 2, 3):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert len(screen().splitlines()) == 3


def test_an_estimated_end_says_so(screen, trainer, module):
    callback = Console([], plain_seconds=0, plain_lines=10)
    callback.on_train_start(trainer, module)
    module.expected_seconds = 75.0
    for module.iteration, module.progress.last_iteration in ((0, 6), (1, 7), (7, 7)):
        callback.on_train_batch_start(trainer, module, None, 0)
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert screen().splitlines() == [
        "expected time: 1 min 15 s for about 6 iterations",
        "iteration 0/~6  ",
        "iteration 1/~7  ",
        "iteration 7/7  ",
    ]


def test_expected_time_and_baseline(screen, trainer, module):
    callback = Console([], plain_seconds=10, plain_lines=10)
    module.val_metrics = {
        "val/length": 7.0,
        "val/reward/positive": 0.1,
        "val/reward": 0.2,
        "val/prompts": 4.0,
    }
    callback.on_validation_start(trainer, module)
    callback.on_validation_end(trainer, module)
    module.expected_seconds = 75.0
    callback.on_train_batch_start(trainer, module, None, 0)
    callback.on_train_batch_start(trainer, module, None, 1)
    assert screen().splitlines() == [
        "validating before training ...",
        "validation before training (4 prompts):  reward 0.2  length 7",
        "expected time: 1 min 15 s for 10 iterations",
    ]


def test_overridden_values_have_a_star():
    config = {
        "seed": 1,
        "iterations": 40,
        "algo": {"name": "ppo", "advantage": {"_target_": "a.b.GAE", "lam": 0.9}, "entropy_coef": 0.0},
        "optim": {"_target_": "a.AdamW", "lr": 0.1},
        "callbacks": {"console": {"_target_": "x"}, "kl": None},
        "logger": {"csv": {"_target_": "y"}},
    }
    text = rendered(
        config_tree(
            config, ["seed=1", "algo=ppo", "algo.advantage.lam=0.9", "debug=fast", "callbacks.kl=null"]
        )
    )
    for marked in (
        "seed 1 *",
        "algo ppo *",
        "advantage GAE(lam=0.9) *",
        "debug fast *",
        "callbacks console *",
    ):
        assert marked in text
    for plain in ("iterations 40", "optim AdamW", "lr 0.1", "logger csv"):
        assert plain in text
        assert f"{plain} *" not in text


def test_numbers_and_names_for_people():
    assert [number(x) for x in (12345.6, 0.123456, -3e-9, 0.0, None)] == ["12,346", "0.1235", "0", "0", "-"]
    assert [duration(x) for x in (5, 61, 7300)] == ["5 s", "1 min 1 s", "2 h 1 min"]
    names = ["val/length", "val/kl_token", "val/reward/part", "val/kl", "val/prompts", "val/reward"]
    metrics = dict.fromkeys(names, 0.0)
    assert headlines(metrics) == ["val/reward", "val/kl", "val/length"]


# -- loggers of other projects --------------------------------------------------------------------------


def test_wandb_is_offline_and_keeps_its_id(tmp_path, monkeypatch):
    from policylab.callbacks import loggers

    monkeypatch.delenv("WANDB_MODE", raising=False)
    made = [loggers.wandb(str(tmp_path), "p", None, None, "name", ["tag"]) for _ in range(2)]
    assert made[0]._wandb_init["mode"] == "offline"
    assert made[0].version == made[1].version == (tmp_path / "wandb" / "id.txt").read_text()


def test_names_given_to_loggers_hold_no_secret(tmp_path, monkeypatch):
    from policylab.callbacks import loggers
    from policylab.runs import redaction

    monkeypatch.setattr(redaction, "_known", {"sk-SECRET"})
    made = loggers.wandb(str(tmp_path), "p", None, "group sk-SECRET", "name", ["tag", "sk-SECRET"])
    assert made._wandb_init["tags"] == ["tag", redaction.HIDDEN]
    assert made._wandb_init["group"] == f"group {redaction.HIDDEN}"


def test_wandb_online_without_a_key_fails_at_once(tmp_path, monkeypatch):
    from policylab.callbacks import loggers

    netrc = tmp_path / "netrc"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="wandb login"):
        loggers.wandb(str(tmp_path), "p", None, None, "name", [])
    netrc.write_text("machine api.wandb.ai login user password key\n")
    assert loggers.wandb(str(tmp_path), "p", None, None, "name", [])._wandb_init["mode"] == "online"


def test_mlflow_names_its_extra(tmp_path, monkeypatch):
    from policylab.callbacks import loggers

    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[mlflow\]'"):
        loggers.mlflow(str(tmp_path), "e", "n", None)


def test_several_loggers_at_once(compose):
    config = compose(["logger=[wandb,tensorboard]"])
    assert set(config.logger) == {"csv", "wandb", "tensorboard"}
