"""Sampling, truncation, importance and reference: the effect of these axes on a rollout, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from policylab.algorithms import (
    Algorithm,
    DynamicSampling,
    FixedCoefficient,
    FrozenReference,
    KLPenalty,
    LeaveOneOut,
    LogProb,
    MaskTruncated,
    MinibatchEpochs,
    MovingReference,
    NoPenalty,
    OverlongPenalty,
    Ratio,
    ReturnToGo,
    SingleStep,
    TokenMean,
    TruncatedImportance,
)
from policylab.data.rollout import Evaluation, Prompt, Rollout
from policylab.errors import UserError
from policylab.functional.behaviour import greedy
from policylab.functional.kl import exact_in_reward
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms


def rollout_of(lengths: list[int], rewards: list[float], groups: list[int], width: int = 4) -> Rollout:
    n = len(lengths)
    sizes = torch.tensor(lengths)
    mask = torch.arange(width) < sizes[:, None]
    return Rollout(
        prompt_tokens=torch.zeros(n, 1, dtype=torch.long),
        prompt_lengths=torch.ones(n, dtype=torch.long),
        tokens=torch.zeros(n, width, dtype=torch.long),
        lengths=sizes,
        action_mask=mask,
        ended=sizes < width,
        group_ids=torch.tensor(groups),
        prompt_ids=torch.tensor(groups),
        logprobs=torch.full((n, width), -1.0).masked_fill(~mask, 0.0),
        rewards=torch.tensor(rewards),
    )


def reinforce(**parts: object) -> Algorithm:
    base = {
        "name": "test",
        "advantage": ReturnToGo(1.0, "none", False),
        "surrogate": LogProb(),
        "reduction": TokenMean(),
        "kl": NoPenalty(FrozenReference()),
        "update": SingleStep(),
        "critic": None,
        "sampling": None,
        "truncation": None,
        "importance": None,
        "entropy_coef": 0.0,
    }
    return Algorithm(**{**base, **parts})


def test_groups_without_spread_are_found_whatever_the_order_of_rows():
    rollout = rollout_of([1] * 5, [1.0, 0.0, 1.0, 0.5, 0.0], [7, 3, 7, 3, 9])
    assert DynamicSampling(1).spread(rollout).tolist() == [False, True, False, True, False]


def test_truncated_sequences_are_left_out():
    rollout = reinforce(truncation=MaskTruncated()).select(rollout_of([4, 2], [1.0, 1.0], [0, 1]))
    assert rollout.kept.tolist() == [False, True]
    assert rollout.loss_mask.sum(-1).tolist() == [0, 2]


def test_overlong_penalty_by_hand():
    """Limit 4, the last 2 tokens: free up to 2, then half and all of the scale; arXiv:2503.14476, eq. 13."""
    penalty = OverlongPenalty(limit=4, buffer=2, scale=0.5)
    rollout = rollout_of([1, 2, 3, 4], [1.0] * 4, [0] * 4)
    assert penalty.penalty(rollout).tolist() == [0.0, 0.0, -0.25, -0.5]
    shaped = reinforce(truncation=penalty).shape_rewards(rollout, 0.0)
    assert shaped.token_rewards.sum(-1).tolist() == [1.0, 1.0, 0.75, 0.5]
    assert shaped.rewards.tolist() == [1.0] * 4  # the reported reward is still the task's


def test_overlong_penalty_does_not_count_the_words_of_an_environment():
    """The policy chose two of the four positions, the first and the last: no more than the two free tokens."""
    rollout = rollout_of([4], [1.0], [0])
    talk = rollout.replace(action_mask=torch.tensor([[True, False, False, True]]))
    penalty = OverlongPenalty(limit=4, buffer=2, scale=0.5)
    assert penalty.penalty(rollout).tolist() == [-0.5]
    assert penalty.penalty(talk).tolist() == [0.0]


def test_importance_weights_by_hand():
    rollout = rollout_of([2], [1.0], [0], width=3).replace(
        logprobs=torch.tensor([[-1.0, -3.0, 0.0]]),
        policy_logprobs=torch.tensor([[-1.5, -1.0, 0.0]]),
        advantages=torch.tensor([[1.0, 1.0, 0.0]]),
    )
    algorithm = reinforce(surrogate=Ratio(), importance=TruncatedImportance(2.0))
    rollout = algorithm.correct_sampler(rollout)
    # exp(-0.5), and exp(2) held at 2
    torch.testing.assert_close(rollout.importance, torch.tensor([[math.exp(-0.5), 2.0, 0.0]]))
    # The surrogate's own ratio is to the policy before the update, which is 1 here.
    evaluation = Evaluation(rollout.policy_logprobs, torch.zeros(1, 3), None, None)
    loss = algorithm.loss_terms(rollout, evaluation).surrogate
    torch.testing.assert_close(loss, torch.tensor([[-math.exp(-0.5), -2.0, 0.0]]))


def test_exact_kl_in_the_reward_by_hand():
    """An action is charged its own k1 and the exact KL of later ones: the sums from t on are 0.5+2+3, 1+3, -1."""
    mask = torch.tensor([[True, True, False, True]])  # an environment's word in between
    k1 = torch.tensor([[0.5, 1.0, 9.0, -1.0]])
    exact = torch.tensor([[1.0, 2.0, 9.0, 3.0]])
    charges = exact_in_reward(k1, exact, mask)
    assert charges.tolist() == [[1.5, 5.0, 0.0, -1.0]]
    assert charges.flip(-1).cumsum(-1).flip(-1)[mask].tolist() == [5.5, 4.0, -1.0]


def test_greedy_takes_the_likeliest_token_and_needs_no_noise(tiny_policy):
    prompts = [Prompt(i, "", (1, 2 + i), None, ()) for i in range(3)]
    engine = CachedEngine(0.7, 6)
    one, other = (
        engine.sample(tiny_policy, prompts, 1, uniforms(seed, TRAIN, 0, range(3), 6), greedy)
        for seed in (0, 1)
    )
    assert torch.equal(one.tokens, other.tokens)
    assert not one.logprobs.any()  # certain
    for row, prompt in enumerate(prompts):
        ids = list(prompt.tokens)
        for token in one.tokens[row, : one.lengths[row]].tolist():
            assert token == int(tiny_policy.lm(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_rows_of_different_widths_are_put_together():
    short, long = rollout_of([1], [0.0], [0], width=2), rollout_of([3], [1.0], [1], width=5)
    long = long.replace(prompt_tokens=torch.tensor([[4, 5]]), prompt_lengths=torch.tensor([2]))
    both = Rollout.concatenate([short, long])
    assert both.tokens.shape == (2, 5)
    assert both.prompt_tokens.tolist() == [[0, 0], [4, 5]]
    for row, original in enumerate((short, long)):
        again, alone = both.select(torch.tensor([row])), original.select(torch.tensor([0]))
        for field in dataclasses.fields(Rollout):
            value = getattr(alone, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(again, field.name), value), field.name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"update": MinibatchEpochs(2, 1, None, True), "surrogate": Ratio()},
            "uses no critic",
        ),
        ({"update": MinibatchEpochs(2, 1, None, False)}, "right for only one update of a rollout"),
    ],
)
def test_senseless_combinations_are_refused(parts, message):
    with pytest.raises(UserError, match=message):
        reinforce(**parts)


def test_a_penalty_needs_a_reference():
    with pytest.raises(UserError, match="algo/reference is none"):
        KLPenalty("reward", "k1", FixedCoefficient(0.1), None)


def test_groups_are_required():
    assert reinforce().min_group_size == 1
    assert reinforce(sampling=DynamicSampling(1)).min_group_size == 2
    assert reinforce(advantage=LeaveOneOut()).min_group_size == 2


class Flat:
    """A reward that is equal within the groups of the first slots, in the first round only."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions):
        from policylab.rewards.base import Score

        self.calls += 1
        flat = len(completions) // 2 if self.calls == 1 else 0
        return [Score(0.0 if i < flat else float(i), {}) for i in range(len(completions))]


def module_of(compose, tmp_path, overrides):
    from policylab.config.build import build

    small = [
        "model=tiny_scratch",
        "rollout.prompts=4",
        "rollout.group_size=2",
        "iterations=2",
        "hardware=cpu",
    ]
    light = [
        "callbacks=none",
        "callbacks.checkpoint=null",
        "validation.prompts=4",
        "rollout.max_new_tokens=6",
    ]
    config = compose([*small, *light, *overrides])
    experiment = build(config, tmp_path)
    (tmp_path / "run").mkdir(exist_ok=True)
    return experiment


def test_flat_groups_are_replaced(compose, tmp_path):
    experiment = module_of(compose, tmp_path, ["algo=rloo", "algo/sampling=dynamic", "iterations=1"])
    module = experiment.module
    module.sampler.scorer.reward = Flat()
    seen = []
    original = module.collector.sample

    def watch(prompts, slots, round):
        seen.append((round, list(slots)))
        return original(prompts, slots, round)

    module.collector.sample = watch
    module._checked = True
    experiment.trainer.fit(module, datamodule=experiment.data)
    # The first half of the slots had no spread in the first round, and has in the second.
    assert seen[:2] == [(0, [0, 1, 2, 3]), (1, [0, 1])]
    assert module.rollout.kept.all()
    assert module.metrics["train/kept"] == 1.0
    assert module.metrics["train/flat_groups"] == pytest.approx(2 / 6)  # 2 of 4, then 0 of the 2 fresh ones
    assert all(sample.kl is not None for sample in module.samples)


def test_groups_that_stay_flat_are_excluded_and_without_others_there_is_no_step(compose, tmp_path):
    """With a constant reward there is no update and no NaN, and the weights do not change."""
    from policylab.rewards.base import Score

    experiment = module_of(compose, tmp_path, ["algo=dapo"])
    module = experiment.module
    module.sampler.scorer.reward = lambda completions: [Score(1.0, {}) for _ in completions]
    before = [p.detach().clone() for p in module.policy.parameters()]
    module._checked = True
    experiment.trainer.fit(module, datamodule=experiment.data)
    assert module.metrics["train/kept"] == 0.0
    assert module.metrics["train/flat_groups"] == 1.0
    assert module.progress.tokens_trained == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))
    assert all(math.isfinite(v) for v in module.metrics.values())


def test_a_moving_reference_follows_and_is_part_of_the_state(compose, tmp_path):
    experiment = module_of(
        compose, tmp_path, ["algo=reinforce", "algo/reference=moving", "algo.kl.reference.decay=0.5"]
    )
    module = experiment.module
    start = [p.detach().clone() for p in module.reference.lm.parameters()]
    module._checked = True
    experiment.trainer.fit(module, datamodule=experiment.data)
    moved = [not torch.equal(a, b) for a, b in zip(start, module.reference.lm.parameters(), strict=True)]
    assert any(moved)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert any(name.startswith("reference.") for name in checkpoint["state_dict"])


def test_moving_reference_by_hand(compose, tmp_path):
    module = module_of(compose, tmp_path, ["algo=reinforce", "algo/reference=moving"]).module
    assert module.algorithm.kl.reference == MovingReference(0.95)
    with torch.no_grad():
        for parameter in module.reference.lm.parameters():
            parameter.fill_(1.0)
        for parameter in module.policy.lm.parameters():
            parameter.fill_(3.0)
    module.move_reference()
    # 0.95 * 1 + 0.05 * 3
    assert all(torch.allclose(p, torch.tensor(1.1)) for p in module.reference.lm.parameters())
