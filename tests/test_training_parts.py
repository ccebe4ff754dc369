"""The parts of trainers, each alone: without Lightning, and mostly without a language model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from policylab.algorithms import SingleStep
from policylab.algorithms.q_learning import Replay
from policylab.data.plan import BatchPlan, ReplayPlan
from policylab.data.rollout import Prompt, Rollout
from policylab.errors import RunError, UserError
from policylab.rewards.scorer import Scorer
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, VALIDATION, uniforms
from policylab.training.collector import Collector
from policylab.training.micro_batches import cut, split
from policylab.training.minibatches import MinibatchUpdater
from policylab.training.needs import Cost, Needs
from policylab.training.optimizer import AdamW
from policylab.training.passes import Passes
from policylab.training.preflight import Pace
from policylab.training.recorder import Recorder
from policylab.training.replay import ReplayMemory
from policylab.training.run_state import Progress, RunState
from policylab.training.runtime import Runtime
from policylab.training.sampler import Sampler
from policylab.training.stepper import Stepper
from policylab.training.validator import Validator

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]


def test_a_plan_in_words():
    assert [row for _, row in BatchPlan(1, 1, 1, 1, 1).table()] == [
        "1 prompt x 1 completion = 1",
        "1 / 1 = 1 sequence each",
        "1 minibatch x 1 epoch = 1 an iteration",
    ]
    assert BatchPlan(8, 4, 2, 2, 1).table()[2][1] == "2 minibatches x 2 epochs = 4 an iteration"


class Alone(Runtime):
    """One process on the CPU."""

    rank, world_size, sharded, full_precision = 0, 1, False, True
    device = torch.device("cpu")
    optimizer = folder = None

    def __init__(self, optimizer=None, folder=None):
        self.optimizer, self.folder, self.collective = optimizer, folder, False

    def backward(self, loss):
        loss.backward()


def grid(lengths, prompt_ids=None):
    """A rollout with these completions; each prompt has two tokens."""
    count, lengths = len(lengths), torch.tensor(lengths)
    width = int(lengths.max())
    return Rollout(
        prompt_tokens=torch.ones(count, 2, dtype=torch.long),
        prompt_lengths=torch.full((count,), 2),
        tokens=torch.arange(count * width).reshape(count, width),
        lengths=lengths,
        action_mask=torch.arange(width) < lengths[:, None],
        ended=torch.ones(count, dtype=torch.bool),
        group_ids=torch.arange(count),
        prompt_ids=torch.arange(count) if prompt_ids is None else torch.tensor(prompt_ids),
        logprobs=torch.zeros(count, width),
    )


# -- units -----------------------------------------------------------------------------------------------

UNITS = torch.tensor([7, 2, 7, 5, 2, 2, 9])  # a pair, a group of three, two rows by themselves


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("tokens", [1, 12, 25, 1000])
def test_a_unit_is_in_one_micro_batch(packs, tokens):
    rollout = grid([3, 5, 8, 2, 4, 4, 6], [0, 1, 0, 2, 1, 1, 3])
    rows = torch.tensor([6, 4, 0, 1, 3, 2, 5])
    parts = cut(rollout, rows, tokens, packs=packs, units=UNITS)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    homes = [set(UNITS[part].tolist()) for part in parts]
    assert sum(map(len, homes)) == 4, "each unit is in one place"
    if tokens == 1:
        assert sorted(map(len, parts)) == [1, 1, 2, 3], "a unit larger than the budget is alone"
    if tokens == 1000:
        assert len(parts) == 1


@pytest.mark.parametrize("packs", [True, False])
def test_units_of_one_row_are_cut_as_rows_are(packs):
    rollout = grid([3, 5, 8, 2, 4, 4, 6], [0, 1, 0, 2, 1, 1, 0])
    rows = torch.tensor([6, 4, 0, 1, 3, 2, 5])
    for tokens in (1, 12, 25):
        plain = cut(rollout, rows, tokens, packs=packs)
        single = cut(rollout, rows, tokens, packs=packs, units=torch.arange(7))
        assert [part.tolist() for part in plain] == [part.tolist() for part in single]


def test_minibatches_are_the_order_of_the_noise():
    noise = uniforms(0, TRAIN, 0, [0], 12)[0]
    assert [part.tolist() for part in split(noise, 5)] == [part.tolist() for part in noise.argsort().split(5)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_unit_is_in_one_minibatch(size):
    parts = split(uniforms(0, TRAIN, 1, [0], 7)[0], size, UNITS)
    assert len(parts) == math.ceil(7 / size)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    assert sum(len(set(UNITS[part].tolist())) for part in parts) == 4
    assert all(len(part) < size + 3 for part in parts), "at most by the unit that begins last"


def test_processes_share_minibatches_of_whole_units():
    """Two processes whose units are not split between them: each finds its rows of the same minibatches."""
    units = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    parts = split(uniforms(0, TRAIN, 2, [0], 8)[0], 4, units)
    shares = [[part[part < 4] for part in parts], [part[part >= 4] for part in parts]]
    for alone, *both in zip(parts, *shares, strict=True):
        assert sorted(torch.cat(both).tolist()) == sorted(alone.tolist())
        assert all((units[alone] == unit).sum() in (0, (units == unit).sum()) for unit in range(4))


# -- passes and steps ------------------------------------------------------------------------------------


class Weights(nn.Module):
    """A policy of three numbers."""

    critic = None
    reader = SimpleNamespace(packs=False)

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def actor_parameters(self):
        return [self.w]

    def critic_parameters(self):
        return []


@pytest.fixture
def stepper(tmp_path):
    """``stepper(tokens, max_skipped=2)`` on a fresh policy."""

    def make(tokens=1000, max_skipped=2):
        optim = AdamW(0.1, None, (0.9, 0.9), 1e-8, 0.0, None, "constant", 0, 0, tokens, max_skipped)
        policy = Weights()
        optimizer = torch.optim.SGD([{"params": [policy.w], "lr": 0.1, "base_lr": 0.1}])
        recorder = Recorder(Alone(optimizer, tmp_path))
        passes = Passes(policy, tokens, recorder, whole_distributions=False)
        return Stepper(optim, passes, Progress(iterations=5))

    return make


ROLLOUT = grid([3, 5, 8, 2, 4])
ROWS = torch.arange(5)


def loss_of(stepper, seen, room=99, broken=math.inf):
    """A loss that differs by row; out of memory above ``room`` rows, not finite in rows of ``broken`` tokens."""

    def loss(piece):
        seen.append(piece.lengths.tolist())
        per_row = piece.lengths[:, None] * stepper.policy.w
        stepper.recorder.add("train/loss", per_row)
        if len(piece) > room:
            raise torch.OutOfMemoryError("as a GPU would say it")
        return per_row.sum() / (piece.lengths != broken).all()

    return loss


def test_a_gradient_does_not_depend_on_the_cut(stepper):
    for tokens in (1, 15, 1000):
        one, seen = stepper(tokens), []
        added = one.accumulate(ROLLOUT, ROWS, loss_of(one, seen))
        assert one.policy.w.grad.tolist() == [22.0] * 3
        assert added.mean("train/loss", lambda x: x) == pytest.approx(-0.5 * 22 / 15)
        assert len(seen) == {1: 5, 15: 3, 1000: 1}[tokens]


def test_when_memory_runs_out_the_update_is_repeated_in_smaller_pieces(stepper):
    one, seen = stepper(), []
    with pytest.warns(UserWarning, match=r"at most \d+ tokens a forward pass"):
        one.accumulate(ROLLOUT, ROWS, loss_of(one, seen, room=2))
    assert one.policy.w.grad.tolist() == [22.0] * 3
    assert one.recorder.means.mean("train/loss", lambda x: x) == pytest.approx(-0.5 * 22 / 15), "counted once"
    resumed = Passes(one.policy, 1000, one.recorder, whole_distributions=False)
    resumed.load(one.passes.state())
    assert resumed.tokens == one.passes.tokens < 1000
    other = Passes(one.policy, 500, one.recorder, whole_distributions=False)
    other.load(one.passes.state())
    assert other.tokens == 500, "where another size is asked for, that counts"


def test_a_unit_that_does_not_fit_is_told(stepper):
    one, seen = stepper(), []
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(UserError, match=r"out of memory with 3 sequences of \d+ tokens .* a smaller model"),
    ):
        one.accumulate(ROLLOUT, ROWS, loss_of(one, seen, room=2), torch.tensor([0, 0, 0, 1, 1]))
    assert {tuple(sorted(lengths)) for lengths in seen} <= {(2, 3, 4, 5, 8), (3, 5, 8), (2, 4)}


def test_no_retry_during_a_collective(stepper):
    one = stepper()
    one.runtime.world_size = 2

    def attempt():
        one.passes.cut(ROLLOUT, ROWS)
        one.runtime.collective = True
        raise torch.OutOfMemoryError("as a GPU would say it")

    with pytest.raises(
        UserError, match=r"out of memory with 5 sequences .* take optim.micro_batch_tokens=16"
    ):
        one.passes.retry_on_oom(attempt)


def test_other_errors_are_left_alone(stepper):
    with pytest.raises(RuntimeError, match="shapes differ"):
        stepper().passes.retry_on_oom(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_an_update_that_is_not_finite_is_skipped_and_too_many_end_the_run(stepper, tmp_path, caplog):
    one, before = stepper(), torch.tensor([1.0, -2.0, 0.5])
    one.accumulate(ROLLOUT, ROWS, loss_of(one, [], broken=8))
    assert not one.apply_gradients(ROLLOUT, ROWS)
    assert torch.equal(one.policy.w, before)
    assert one.policy.w.grad is None
    assert not one.recorder.means.names, "its metrics do not count"
    assert "skipped (1 in a row, the run ends at 2)" in caplog.text
    assert torch.load(tmp_path / "dumps" / "iteration_1.pt", weights_only=True)["not_finite"]
    resumed = stepper()
    resumed.load(one.state())
    resumed.accumulate(ROLLOUT, ROWS, loss_of(resumed, [], broken=8))
    with pytest.raises(RunError, match="2 of at most 2 updates skipped in a row"):
        resumed.apply_gradients(ROLLOUT, ROWS)
    one.accumulate(ROLLOUT, ROWS, loss_of(one, []))
    assert one.apply_gradients(ROLLOUT, ROWS)
    assert not torch.equal(one.policy.w, before)
    assert one.skipped_in_a_row == {}
    assert (one.take_skipped(), one.take_skipped()) == (1, 0)


def test_a_process_without_rows_has_a_gradient_of_zero(stepper):
    one, seen = stepper(), []
    one.accumulate(ROLLOUT, ROWS[:0], loss_of(one, seen))
    assert one.policy.w.grad.tolist() == [0.0] * 3
    assert not seen
    Alone.sharded = True
    try:
        one.runtime.release_weights = lambda: None
        one.accumulate(ROLLOUT, ROWS[:0], loss_of(one, seen))
    finally:
        Alone.sharded = False
    assert seen == [[3]], "sharded weights: it makes a pass, as the others do"
    assert not one.recorder.means.names, "which does not count"


# -- state -----------------------------------------------------------------------------------------------


def test_the_end_of_a_budget_is_estimated():
    progress = Progress(iterations=100, max_tokens=1000, expected_tokens=30.0)  # 1000 / 30 = 33.3
    assert progress.last_iteration == 34
    progress.iteration, progress.tokens_sampled = 4, 200  # 50 an iteration: 800 / 50 = 16 more
    assert progress.last_iteration == 20
    progress.iteration, progress.tokens_sampled = 4, 20  # 5 an iteration: never, before iterations end it
    assert progress.last_iteration == 100
    assert not progress.budget_is_spent
    progress.iteration, progress.tokens_sampled = 7, 1001
    assert progress.last_iteration == 7
    assert progress.budget_is_spent


@pytest.fixture
def sampled(llama_policy):
    """A sampler of a small policy and of a frozen copy of it, whose reward counts its calls."""
    parts = SimpleNamespace(
        policy=llama_policy, engine=CachedEngine(1.0, 6), scorer=Scorer(Counting()), seed=0, max_rows=None,
        resolved_config="", data="data", task=SimpleNamespace(name="test", metrics=None),
    )  # fmt: skip

    def make(tokens=1000):
        passes = Passes(llama_policy, tokens, Recorder(Alone()), whole_distributions=False)
        sampler = Sampler(parts, llama_policy.frozen_copy(), passes, Progress(iterations=3))
        return sampler, RunState(parts, [sampler.progress, passes, sampler])

    return make


class Counting:
    """A reward with state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions):
        self.calls += 1
        return [float(len(completion.tokens)) for completion in completions]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_the_state_of_all_parts_is_saved_and_loaded(sampled):
    sampler, state = sampled()
    sampler.progress.iteration, sampler.progress.kl_coef, sampler.row_limit.rows = 2, 0.3, 3
    sampler.scorer.reward.calls = 5
    saved = state.state()
    sampler.scorer.reward.calls = 0
    fresh, again = sampled()
    again.load(saved)
    assert (fresh.progress.iteration, fresh.progress.kl_coef, fresh.row_limit.rows) == (2, 0.3, 3)
    assert fresh.scorer.reward.calls == 5
    fresh.scorer.reward.calls = 9
    again.load(saved)
    assert fresh.scorer.reward.calls == 9, "Lightning loads twice, and the reward has scored in between"
    for name, what in (
        ("weights", "other weights than these"),
        ("data", "other data than task test has now"),
    ):
        with pytest.raises(UserError, match=what):
            again.load({**saved, "origin": {**saved["origin"], name: "another"}})


# -- sampling and validation -----------------------------------------------------------------------------


def test_noise_is_keyed_by_iteration_in_training_alone(sampled):
    sampler, _ = sampled()

    def tokens(stream):
        return sampler.generate(PROMPTS, 2, stream, range(8)).tokens.tolist()

    train, val = tokens(TRAIN), tokens(VALIDATION)
    assert tokens(TRAIN) == train
    assert sampler.recorder.means.names == {"tokens sampled"}, "what validation samples does not count"
    sampler.progress.iteration = 1
    assert tokens(TRAIN) != train
    assert tokens(VALIDATION) == val


def test_columns_added_to_a_rollout_do_not_depend_on_the_cut(sampled):
    (whole, _), (fine, _) = sampled(), sampled(tokens=1)
    rollout = whole.generate(PROMPTS, 1, TRAIN, range(4))
    recorded = rollout.replace(values=None)
    for sampler in (whole, fine):
        seen = sampler.add_exact_kl(sampler.add_values(sampler.add_ref_logprobs(recorded)))
        logprobs, values = sampler.recompute(rollout)
        for one, other in (
            (seen.ref_logprobs, rollout.logprobs),
            (logprobs, rollout.logprobs),
            (seen.values, values),
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.exact_kl, torch.zeros_like(seen.exact_kl), atol=1e-5, rtol=0)
    assert whole.add_values(rollout) is rollout, "they came with sampling"


def test_a_validation_measures_all_prompts_or_fails(sampled):
    sampler, state = sampled()
    task = SimpleNamespace(
        name="test", metrics=lambda completions: {"odd": [len(c.tokens) % 2 for c in completions]}
    )
    validator = Validator(sampler, task, PROMPTS)
    validator.begin()
    for prompts in (PROMPTS[:3], PROMPTS[3:]):
        validator.add(prompts)
    metrics = validator.finish()
    assert metrics["val/prompts"] == len(validator.samples) == 4
    assert metrics["val/reward"] == metrics["val/length"] == sum(s.length for s in validator.samples) / 4
    assert metrics["val/odd"] == sum(s.length % 2 for s in validator.samples) / 4
    assert metrics["val/kl"] == pytest.approx(0, abs=1e-4)
    assert sampler.scorer.reward.calls == 2
    assert state.state()["reward"] == [{"calls": 0}], "a run that resumes here validates again"
    sampler.progress.iteration = 1
    assert state.state()["reward"] == [{"calls": 2}]
    validator.begin()
    validator.add(PROMPTS[:3])
    with pytest.raises(RunError, match="the validation of iteration 1 ended after 3 of 4 prompts"):
        validator.finish()


# -- collecting, replaying, updating: the same sequences however many processes share them ------------------


def test_processes_collect_the_completions_that_one_would(sampled):
    sampler, _ = sampled()
    runtime = sampler.runtime

    def collected(prompts, processes, rank):
        runtime.rank = rank
        plan = BatchPlan(len(PROMPTS), 2, 1, 1, processes)
        rollout, samples = Collector(sampler, plan, PROMPTS, values=True).collect(tuple(prompts))
        assert torch.equal(rollout.rewards, rollout.lengths.float()), "the score of each row is its own"
        assert {(sample.split, sample.iteration) for sample in samples} == {("train", 1)}
        assert (rollout.ref_logprobs - rollout.logprobs).abs().max() < 1e-4
        return [(sample.prompt, sample.tokens) for sample in samples]

    whole = collected(PROMPTS, 1, 0)
    assert len(whole) == 8
    assert collected(PROMPTS[:2], 2, 0) + collected(PROMPTS[2:], 2, 1) == whole


def test_processes_draw_shares_of_the_same_minibatches():
    settings, rollout = Replay(1000, 5, 3, 4), grid([3, 5, 2, 4, 1])
    rollout = rollout.replace(rewards=torch.arange(5.0), ref_logprobs=torch.zeros(5, 5))

    def drawn(processes, rank):
        runtime = Alone()
        runtime.rank = rank
        sampler = SimpleNamespace(
            seed=0, runtime=runtime, recorder=Recorder(runtime), progress=Progress(iterations=3)
        )
        replay = ReplayMemory(settings, ReplayPlan(4, 1, 1, 1, processes, 4, 3), sampler)
        replay.add(rollout.select(torch.arange(4)))
        assert not list(replay.minibatches()), "fewer than the warm-up"
        replay.add(rollout.select(torch.tensor([4])))
        return [batch.rewards.tolist() for batch in replay.minibatches()]

    whole = drawn(1, 0)
    assert [len(rewards) for rewards in whole] == [4, 4, 4]
    assert [a + b for a, b in zip(drawn(2, 0), drawn(2, 1), strict=True)] == whole


def test_processes_share_minibatches_of_trained_sequences():
    kept = torch.tensor([True, True, False, True, True, False, True, True])
    rollout = grid([3, 5, 8, 2, 4, 4, 6, 1]).replace(kept=kept)

    def ids(processes, rank, rows):
        runtime = Alone()
        runtime.rank = rank
        sampler = SimpleNamespace(
            seed=0, runtime=runtime, policy=None, passes=None, recorder=None, progress=Progress(iterations=3)
        )
        plan, algorithm = BatchPlan(8, 1, 1, 2, processes), SimpleNamespace(update=SingleStep())
        share = rollout.select(rows)
        minibatches = MinibatchUpdater(algorithm, plan, sampler, None).minibatches(share, 0, 4)
        return [set(share.prompt_ids[part].tolist()) for part in minibatches]

    whole = ids(1, 0, torch.arange(8))
    assert whole[0] | whole[1] == {0, 1, 3, 4, 6, 7}
    shares = zip(ids(2, 0, torch.arange(4)), ids(2, 1, torch.arange(4, 8)), strict=True)
    assert [a | b for a, b in shares] == whole


def test_the_expected_time_counts_what_the_method_states():
    pace, cost = Pace(sample=1.0, forward=0.1, tokens=5.0), Cost(forwards=2, passes=4)
    plan = BatchPlan(6, 2, 1, 1, processes=3)  # 4 sequences on each
    assert pace.seconds(Needs(), cost, plan) == pytest.approx(4 * (1.0 + 0.1 * (2 + 3 * 4)))
    assert pace.seconds(Needs(learns_from="completions"), cost, plan) == pytest.approx(4 * 0.1 * (2 + 3 * 4))


def test_the_parts_do_not_import_lightning():
    folder = Path(__file__).parent.parent / "src" / "policylab" / "training"
    knows = sorted(path.name for path in folder.glob("*.py") if "import LightningModule" in path.read_text())
    assert knows == ["module.py"]


def run_state(*parts):
    """A run state of these parts, without a model."""
    policy = SimpleNamespace(loaded_parameters=dict, source="tiny")
    return RunState(SimpleNamespace(policy=policy, data="", resolved_config={}, task=None), parts)


def test_a_name_used_by_two_parts_of_the_state_is_refused():
    progress = Progress(iterations=1)
    assert run_state(progress).state()["iteration"] == 0
    with pytest.raises(
        UserError, match=r"Progress\.state returned the names \['iteration', .*\], which another"
    ):
        run_state(progress, progress).state()


def test_a_checkpoint_without_its_origin_is_told_once(caplog):
    state = run_state()
    for _ in range(2):
        state.check_origin({})
    assert [record.getMessage()[:43] for record in caplog.records] == [
        "the checkpoint is of an older version, and "
    ]
