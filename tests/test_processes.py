"""One process and two, which split the work differently, do the same training."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from filelock import FileLock

from shared_runs import Case, Record, joined, on_both
from small_runs import PRESETS, quick

#: Allowed rounding of a gradient (relative to its largest entry), of a metric, and of a weight after five iterations.
ROUNDING, FIGURE, DRIFT = 1e-4, 1e-4, 1e-5
#: A difference that is more than rounding.
VISIBLE = 1e-2

#: A smaller value, because the preset's is for real models.
SIZES = {"sft": {"algo.batch_size": 12}}

CASES = {preset: Case(preset, (), SIZES.get(preset, {})) for preset in PRESETS} | {
    # With two sequences per minibatch, both are often on one process. The KL ends some iterations early.
    "stopped": Case(
        "ppo",
        ("algo/kl=in_reward_adaptive", "algo/reference=moving"),
        {
            "algo.update.epochs": 3, "algo.update.minibatches": 6, "algo.update.reestimate": True,
            "algo.update.kl_stop": 0.2, "algo.kl.controller.target": 0.1, "algo.kl.controller.horizon": 20,
        },
        resumes=True,
    ),
    # A minibatch may have no sequence to learn from, on one process or on both.
    "masked": Case("dapo", ("algo/truncation=mask",), {"algo.update.minibatches": 3}),
    "exact": Case("grpo", ("algo/kl=in_loss", "algo/critic=none"), {"algo.kl.estimator": "exact"}),
    "diagonal": Case("trpo", (), {"algo.update.preconditioner": "diagonal", "algo.update.fisher_share": 0.5}),
    # The memory is full after two iterations.
    "forgetful": Case(
        "dqn",
        ("algo/target=polyak",), {"algo.replay.capacity": 350, "algo.target.every": 3},
        resumes=True,
    ),
    "one by one": Case("ppo", (), {}, {"optim.micro_batch_tokens": 1}),
    "out of memory": Case("ppo", twist="memory_runs_out", shared={}),
    "sharded ppo": Case("ppo", twist="passes_are_shared"),
    "sharded dqn": Case("dqn", twist="passes_are_shared"),
    "sharded sft": Case("sft", (), SIZES["sft"], twist="passes_are_shared"),
    "validated": Case("ppo", validates=True),
    "validated sft": Case("sft", (), SIZES["sft"], validates=True),
    "episodes": Case("ppo", (), {"rollout.max_new_tokens": 1}, task="guess_number", resumes=True),
    "validated episodes": Case("rloo", (), {"rollout.max_new_tokens": 1}, task="guess_number", validates=True),
    "greedy episodes": Case("remax", (), {"rollout.max_new_tokens": 1}, task="guess_number"),
    "sums are local": Case("reinforce", twist="sums_are_local"),
    "broken": Case("ppo", (), {"algo.update.minibatches": 3}, twist="a_row_is_not_finite"),
}  # fmt: skip
SAME = [name for name in CASES if name not in ("sums are local", "broken")]
#: Cases of the fast tests: several updates, a number that is not finite, and a difference that must be noticed.
QUICK = {"stopped", "broken", "sums are local"}

Seen = tuple[dict[str, Record], list[dict[str, Record]]]


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[bool], Seen]:
    """Records of one process and of each of two, for the quick cases or the others; pytest's workers share them."""
    folder = tmp_path_factory.getbasetemp()

    @cache
    def seen(quick: bool) -> Seen:
        name = "processes_quick" if quick else "processes_slow"
        (folder / name).mkdir(exist_ok=True)
        cases = {name: case for name, case in CASES.items() if (name in QUICK) is quick}
        if worker_id == "master":
            return on_both(cases, folder / name)
        shared = folder.parent / f"{name}.pt"
        with FileLock(f"{shared}.lock"):
            if not shared.exists():
                torch.save(on_both(cases, folder / name), shared)
        return torch.load(shared, weights_only=False)

    return seen


@pytest.fixture
def seen(look: Callable[[bool], Seen], case: str) -> Seen:
    return look(case in QUICK)


@pytest.fixture
def alone(seen: Seen, case: str) -> Record:
    return seen[0][case]


@pytest.fixture
def parts(seen: Seen, case: str) -> list[Record]:
    return [records[case] for records in seen[1]]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two entries."""
    return float((a - b).abs().max())


@pytest.mark.parametrize("case", quick(SAME, QUICK))
def test_the_same_rollouts(case, alone, parts):
    """Equal in every token."""
    assert joined(parts) == alone.rollouts
    assert len(alone.rollouts) == (0 if CASES[case].preset == "sft" else 5)


@pytest.mark.parametrize("case", quick(SAME, QUICK))
def test_the_same_gradients(alone, parts):
    """Of every step, also if the KL has ended the updates early."""
    for part in parts:
        assert len(part.gradients) == len(alone.gradients) >= 5
        for ours, theirs in zip(part.gradients, alone.gradients, strict=True):
            assert difference(ours, theirs) <= ROUNDING * float(theirs.abs().max())


@pytest.mark.parametrize("case", quick(SAME, QUICK))
def test_the_same_metrics(alone, parts):
    """Of training and validation. Processes agree to the bit, because decisions depend on metrics."""
    assert parts[0].metrics == parts[1].metrics
    for ours, theirs in zip(parts[0].metrics, alone.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=FIGURE, abs=FIGURE)


@pytest.mark.parametrize("case", quick(SAME, QUICK))
def test_the_same_weights(alone, parts):
    """After five iterations, also those of the reference and the target network."""
    assert torch.equal(parts[0].end, parts[1].end)
    assert torch.equal(parts[0].start, alone.start)
    assert difference(alone.start, alone.end) > VISIBLE
    assert difference(parts[0].end, alone.end) < DRIFT


@pytest.mark.parametrize("case", quick(["forgetful"], QUICK))
def test_the_same_memory(alone, parts):
    """Each process has the whole memory, so that a checkpoint has it too."""
    for part in parts:
        assert part.memory.keys() == alone.memory.keys()
        for name, theirs in alone.memory.items():
            torch.testing.assert_close(part.memory[name], theirs, atol=ROUNDING, rtol=0)
    assert 0 < len(alone.memory["tokens"]) <= 350
    assert alone.memory["iterations"].min() > 0, "the first iteration's have left"


@pytest.mark.parametrize("case", quick(["validated", "validated sft", "validated episodes"], QUICK))
def test_the_same_samples(alone, parts):
    """Of three validation batches of different size; only the first process writes them."""

    def lines(part):
        return [{**json.loads(line), "kl": None} for line in part.samples.splitlines()]

    assert lines(parts[0]) == lines(alone)
    assert len(lines(alone)) >= 14
    assert parts[1].samples == ""


@pytest.mark.parametrize("case", quick(["stopped", "forgetful", "episodes"], QUICK))
def test_resumed_on_another_number_of_processes(seen, case):
    """From the third iteration on: from one process to two, and from two to one."""
    through, others = (
        seen[0][case],
        [seen[0][f"{case} resumed"], *(part[f"{case} resumed"] for part in seen[1])],
    )
    for other in others:
        assert difference(other.end, through.end) < DRIFT
        for ours, theirs in zip(other.metrics, through.metrics[3:], strict=True):
            assert ours == pytest.approx(theirs, rel=FIGURE, abs=FIGURE)
        assert other.memory.keys() == through.memory.keys()
        assert all(len(other.memory[name]) == len(held) for name, held in through.memory.items())


@pytest.mark.parametrize("case", ["broken"])
def test_an_update_is_left_out_by_all(alone, parts):
    """Only one process has the sequence that is not finite, in one of the three minibatches of each epoch."""
    for metrics in (alone.metrics, *(part.metrics for part in parts)):
        assert [row.get("train/skipped_updates") for row in metrics] == [None, 2, None, None, None]
    assert torch.equal(parts[0].end, parts[1].end)
    assert difference(parts[0].end, alone.end) < DRIFT


# -- that this shows something ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sums are local"])
def test_sums_that_are_local_are_noticed(alone, parts):
    """The tests above fail when each process sums only over its own part and only gradients are averaged."""
    assert difference(parts[0].gradients[0], alone.gradients[0]) > VISIBLE
    assert difference(parts[0].end, alone.end) > VISIBLE
    assert parts[0].metrics != parts[1].metrics


@pytest.mark.parametrize("case", ["stopped"])
def test_the_kl_ends_some_updates(alone):
    assert any(0 < metrics["train/kl_stopped"] < 1 for metrics in alone.metrics)
    assert len({metrics["train/kl_coef"] for metrics in alone.metrics}) > 2, "it went up and down"


@pytest.mark.parametrize("case", quick(["dapo"], QUICK))
def test_some_groups_are_sampled_anew(alone):
    assert any(0 < metrics["train/flat_groups"] < 1 for metrics in alone.metrics)


@pytest.mark.parametrize("case", quick(["out of memory"], QUICK))
def test_all_use_the_micro_batch_that_fits_on_one(alone, parts):
    assert parts[0].micro_batch_tokens == parts[1].micro_batch_tokens < alone.micro_batch_tokens


@pytest.mark.parametrize("case", quick(["sharded ppo", "sharded dqn", "sharded sft"], QUICK))
def test_shared_passes_are_equally_many_on_all(look, case, parts):
    assert parts[0].passes == parts[1].passes
    if case == "sharded sft":
        alone = look("sft" in QUICK)
        assert len({records["sft"].passes for records in alone[1]}) == 2, "on their own they would not be"
