"""``evaluate.py`` and ``generate.py``: pass@k, greedy, other tasks and rewards, several runs, refused settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from conftest import Compose, Train, composed, evaluated, generated
from policylab.errors import UserError
from policylab.functional.pass_at_k import ks, pass_at_k
from policylab.launch import evaluate as evaluation
from policylab.launch import generate
from policylab.launch.asked import check_asked
from policylab.runs.find import find_runs
from policylab.runs.words import typed

# -- pass@k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (1, 2, 5) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_all_subsets_in_which_one_passes(n, k):
    for c in range(n + 1):
        passes = [i < c for i in range(n)]
        share = mean(any(some) for some in combinations(passes, k))
        assert pass_at_k(torch.tensor([c]), n, k).item() == pytest.approx(share)


def test_pass_at_k_by_hand():
    # 1 - C(5, 2) / C(8, 2) = 1 - 10 / 28; with 7 of 8 passing, no two can fail
    assert pass_at_k(torch.tensor([3, 7, 0]), 8, 2).tolist() == pytest.approx([18 / 28, 1.0, 0.0])
    assert ks(6) == [1, 2, 4, 6]


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["evaluate", "generate"])
def test_several_greedy_completions_are_refused(script):
    with pytest.raises(
        UserError, match=r"n=2 with temperature=0: all completions of a prompt would be the same"
    ):
        check_asked(composed(script, ("n=2", "temperature=0")))


def test_generating_needs_a_seed():
    with pytest.raises(UserError, match="seed=None is not a whole number"):
        generate.check(composed("generate", ("seed=null",)))


def test_another_model_is_refused():
    with pytest.raises(UserError, match=r"model=gpt2: an evaluation uses the run's model"):
        evaluation.check(composed("evaluate", ()), ["run=x", "model=gpt2"])


# -- runs -----------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "status.json").write_text('{"status": "done"}')
    return folder


def test_several_runs_are_found(tmp_path):
    a, b, odd = (make_run(tmp_path / name) for name in ("a", "b", "c,d [e]"))
    assert find_runs(f"{a},{b}") == find_runs(f"[{a}, {b},{a}]") == find_runs(f"{tmp_path}/[ab]") == [a, b]
    assert find_runs(str(odd)) == [odd]
    assert find_runs([str(odd), f"{tmp_path}/a*"]) == [odd, a]
    with pytest.raises(UserError, match=r"no run at .*/x\*; give a pattern of run folders"):
        find_runs(f"{tmp_path}/x*")
    with pytest.raises(UserError, match=r"no run at .*nowhere"):
        find_runs(f"{a},{tmp_path}/nowhere")


def test_one_that_cannot_be_evaluated_does_not_stop_the_others(tmp_path, compose, monkeypatch, capsys):
    runs = [make_run(tmp_path / name) for name in ("a", "b", "c")]

    def evaluate(run: Path, *_: Any) -> dict[str, Any]:
        if run.name == "b":
            raise UserError("it is damaged")
        metrics = {"val/reward": 0.5, "val/pass@1": 0.25, "val/polarity": 1.0}
        how = {"prompts": 4, "n": 1, "temperature": 1.0, "threshold": 1.0, "samples": []}
        return {"run": str(run), "checkpoint": f"{run}/last.ckpt", "iteration": 3, "metrics": metrics, **how}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "find_checkpoint", lambda run, _: run)
    out = tmp_path / "all.json"
    with pytest.raises(UserError, match=r"1 of 3 runs could not be evaluated: .*b: it is damaged"):
        evaluation.evaluate_job(compose([typed(f"run={tmp_path}/[abc]"), f"out={out}"], "evaluate"))
    assert [result["run"] for result in json.loads(out.read_text())] == [str(runs[0]), str(runs[2])]
    table = capsys.readouterr().out.split("left out")[1].split()
    assert {"iteration", "reward", "pass@1"} <= set(table)
    assert "polarity" not in table


# -- of a run -------------------------------------------------------------------------------------------------


def replaced(words: Sequence[str], chosen: Sequence[str], own: dict[str, Any]) -> Any:
    """The task and the reward with which a run of this config is evaluated."""
    config = {"hardware": {}, "validation": {"batch_size": 8}, "rollout": {"max_new_tokens": 5}, **own}
    asked = composed("evaluate", tuple(typed(word, (), ["task", "reward"]) for word in words))
    return evaluation.for_evaluation(OmegaConf.create(config), asked, chosen)


def test_another_task_and_reward_replace_those_of_the_run(compose):
    own = {
        "task": {"_target_": "policylab.tasks.reviews.Reviews", "name": "reviews", "source": "default"},
        "reward": {"_target_": "policylab.rewards.sentiment.sentiment", "_partial_": True, "workers": 2},
    }
    kept = replaced(["n=3", "task.source=/x.jsonl", "reward.workers=0"], [], own)
    assert kept.task == {**own["task"], "source": "/x.jsonl"}
    assert kept.reward == {**own["reward"], "workers": 0}
    assert (kept.validation.batch_size, kept.rollout.max_new_tokens) == (2, 5)
    walks = replaced(["task=random_walks", "task.nodes=5"], ["task", "reward"], own)
    assert (walks.task.name, walks.task.nodes, walks.rollout.max_new_tokens) == ("random_walks", 5, 10)
    assert walks.reward._target_.endswith("optimality")
    mine = replaced(["reward._target_=my_brevity.brevity", "reward.words=6", "max_new_tokens=7"], [], own)
    assert mine.reward == {"_target_": "my_brevity.brevity", "_partial_": True, "words": 6}
    assert (mine.task, mine.rollout.max_new_tokens) == (own["task"], 7)


def shout(completions: Sequence[Any]) -> list[float]:
    """1 for a text with an even number of letters."""
    return [float(len(completion.text) % 2 == 0) for completion in completions]


@pytest.mark.slow
def test_a_run_is_evaluated_in_all_ways(train_briefly: Train, compose: Compose, tmp_path: Path):
    fast = ["debug=fast", "model=tiny_scratch", "hardware=cpu", "callbacks.console=null"]
    run = train_briefly([*fast, "algo=grpo", "optim.lr=1e-2"])
    one = evaluated(run)
    shouted = ("++reward._target_=test_evaluate.shout", "threshold=0.5")

    several = evaluated(run, "n=4", *shouted)
    rewards = [sample["reward"] for sample in several["samples"]]
    groups = [rewards[i : i + 4] for i in range(0, len(rewards), 4)]
    metrics = several["metrics"]
    assert (several["prompts"], len(groups), metrics["val/prompts"]) == (4, 4, 4)
    assert [several["samples"][i]["completion"] for i in range(0, 16, 4)] == [
        s["completion"] for s in one["samples"]
    ]
    assert metrics["val/reward"] == metrics["val/pass@1"] == pytest.approx(mean(rewards))
    assert metrics["val/pass@4"] == pytest.approx(mean(max(group) for group in groups))
    assert several["reward"] == "test_evaluate.shout"

    greedy = evaluated(run, "temperature=0")
    assert "val/kl" not in greedy["metrics"]
    assert greedy["samples"] == evaluated(run, "temperature=0", "seed=7")["samples"]
    assert greedy["samples"] != one["samples"]
    assert evaluated(run, "temperature=0.5")["samples"] != one["samples"]
    assert generated(run, "temperature=0") == generated(run, "temperature=0", "seed=3")

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"row {n}", "split": "val"}) + "\n" for n in range(3)))
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "to train on", "split": "train"}) + "\n")
    other = evaluated(run, f"++task.source={rows}", "max_new_tokens=2")
    assert [sample["prompt"] for sample in other["samples"]] == ["row 0", "row 1", "row 2"]
    assert all(sample["length"] <= 2 for sample in other["samples"])
    assert evaluated(run)["metrics"] == one["metrics"], "nothing of another evaluation is left"

    from policylab.launch.generate import generate_job

    out = tmp_path / "texts.json"
    generate_job(
        compose([f"run={run}", "prompt=the film", "n=2", "max_new_tokens=3", f"out={out}"], "generate")
    )
    (answer,) = json.loads(out.read_text())
    assert (answer["run"], answer["prompt"], len(answer["completions"])) == (str(run), "the film", 2)


@pytest.mark.slow
def test_a_supervised_run_is_evaluated_on_prompts_without_completions(train_briefly: Train, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    row = {"completion": " is good"}
    rows.write_text("".join(json.dumps({"prompt": f"row {n}", **row}) + "\n" for n in range(20)))
    fast = ["debug=fast", "model=tiny_scratch", "hardware=cpu", "callbacks.console=null"]
    run = train_briefly([*fast, "algo=sft", f"task.source={rows}", "task.held_out=8"])
    assert "val/loss" in evaluated(run)["metrics"]
    metrics = evaluated(run, "++task.source=default")["metrics"]
    assert "val/loss" not in metrics
    assert "val/reward" in metrics
