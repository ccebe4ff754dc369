"""The whole module: results do not depend on micro-batches; penalties, schedules and the KL stop."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from policylab.algorithms import (
    GAE,
    AdaptiveCoefficient,
    Algorithm,
    ClippedRatio,
    Critic,
    FixedCoefficient,
    FrozenReference,
    KLPenalty,
    LogProb,
    MinibatchEpochs,
    NoPenalty,
    ReturnToGo,
    SequenceMean,
    SequenceSum,
    TokenMean,
)
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.training.optimizer import AdamW

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]


def same(x):
    return x


def ppo(reduction, place="loss", estimator="exact") -> Algorithm:
    return Algorithm(
        name="test",
        advantage=GAE(1.0, 0.95, True),
        surrogate=ClippedRatio(0.2, 0.2, None),
        reduction=reduction,
        kl=NoPenalty(FrozenReference())
        if place == "none"
        else KLPenalty(place, estimator, FixedCoefficient(0.1), FrozenReference()),
        update=MinibatchEpochs(2, 1, None, False),
        critic=Critic(0.1, 0.2, 0, None),
        sampling=None,
        truncation=None,
        importance=None,
        entropy_coef=0.01,
    )


@pytest.fixture(params=["tiny_policy", "llama_policy"])
def rewarded(request):
    """A policy that has moved from its reference, and a rollout of an earlier policy, with rewards."""
    policy = request.getfixturevalue(request.param)
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[policy.eos_id] *= 80
    reference = policy.frozen_copy()
    engine = CachedEngine(1.0, 10)
    rollout = engine.sample(policy, PROMPTS, 2, uniforms(0, TRAIN, 0, range(8), 10))
    ref = reference.logprobs_of(rollout, 1.0)
    rollout = rollout.replace(ref_logprobs=ref, rewards=torch.linspace(-1, 1, 8))
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return policy, reference, rollout


def gradient(policy, reference, algorithm, rollout, parts):
    """Loss and flat gradient, summed over the given parts."""
    rollout = algorithm.estimate_advantages(algorithm.shape_rewards(rollout, 0.1), same)
    denominator = algorithm.reduction.denominator(rollout.action_mask)
    policy.zero_grad()
    total = 0.0
    for rows in parts:
        piece = rollout.select(rows)
        evaluation = policy.evaluate(piece, 1.0, entropy_gradient=True, reference=reference)
        loss = algorithm.loss(algorithm.loss_terms(piece, evaluation), 0.1)
        loss = algorithm.reduction(loss, piece.action_mask, denominator)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(), SequenceSum(10.0)], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
def test_micro_batches_change_nothing(rewarded, reduction, size):
    policy, reference, rollout = rewarded
    algorithm = ppo(reduction)
    whole = gradient(policy, reference, algorithm, rollout, [torch.arange(8)])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    cut = gradient(policy, reference, algorithm, rollout, order.split(size))
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(cut[1], whole[1], atol=1e-5, rtol=1e-3)


def test_on_the_first_pass_the_ratio_is_one_and_the_kl_is_zero(tiny_policy):
    reference = tiny_policy.frozen_copy()
    rollout = CachedEngine(0.7, 10).sample(tiny_policy, PROMPTS, 2, uniforms(0, TRAIN, 0, range(8), 10))
    evaluation = tiny_policy.evaluate(rollout, 0.7, entropy_gradient=False, reference=reference)
    ratio = (evaluation.logprobs - rollout.logprobs).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    assert evaluation.exact_kl.abs().max() < 1e-6
    torch.testing.assert_close(reference.logprobs_of(rollout, 0.7), rollout.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("place", "estimator"), [("reward", "k1"), ("loss", "k2"), ("loss", "k3"), ("loss", "exact")]
)
def test_every_kl_changes_the_gradient(rewarded, place, estimator):
    policy, reference, rollout = rewarded
    # As if the moved policy had sampled: the KL in the reward is that of the sampling policy.
    rollout = rollout.replace(logprobs=policy.logprobs_of(rollout, 1.0).detach())
    rows = [torch.arange(8)]
    with_kl = gradient(policy, reference, ppo(TokenMean(), place, estimator), rollout, rows)[1]
    without = gradient(policy, reference, ppo(TokenMean(), "none", "k1"), rollout, rows)[1]
    assert (with_kl - without).abs().max() > 1e-6
    assert with_kl.isfinite().all()


@pytest.mark.parametrize(("place", "estimator"), [("reward", "k2"), ("reward", "k3"), ("loss", "k1")])
def test_a_kl_without_its_gradient_is_refused(place, estimator):
    with pytest.raises(UserError, match="does not have the KL's gradient"):
        KLPenalty(place, estimator, FixedCoefficient(0.1), FrozenReference())


def test_reward_is_at_the_last_action():
    algorithm = ppo(TokenMean(), "none", "k1")
    mask = torch.tensor([[True, True, False]])
    rollout = _rollout_of(mask).replace(rewards=torch.tensor([2.0]))
    assert algorithm.shape_rewards(rollout, 0.1).token_rewards.tolist() == [[0.0, 2.0, 0.0]]


def test_kl_in_the_reward_by_hand():
    algorithm = ppo(TokenMean(), "reward", "k1")
    rollout = _rollout_of(torch.tensor([[True, True, False]])).replace(
        rewards=torch.tensor([2.0]),
        logprobs=torch.tensor([[-1.0, -1.0, 0.0]]),
        ref_logprobs=torch.tensor([[-3.0, -0.5, 0.0]]),
    )
    # k1: 2 and -0.5; reward 2 at the end; coefficient 0.1
    torch.testing.assert_close(
        algorithm.shape_rewards(rollout, 0.1).token_rewards, torch.tensor([[-0.2, 2.05, 0.0]])
    )


def test_adaptive_coefficient_by_hand():
    control = AdaptiveCoefficient(initial=0.2, target=6.0, horizon=1000)
    # error clipped at 0.2: 0.2 * e^(0.2 * 100 / 1000)
    assert control.next(0.2, 60.0, 100) == pytest.approx(0.2 * 1.0202013)
    assert control.next(0.2, 0.0, 100) == pytest.approx(0.2 / 1.0202013)
    assert control.next(0.2, 6.6, 100) == pytest.approx(0.2 * 1.0100502)  # e^0.01
    assert FixedCoefficient(0.2).next(0.2, 60.0, 100) == 0.2


@pytest.mark.parametrize(("horizon", "sequences"), [(100, 1024), (1, 100_000)])
def test_adaptive_coefficient_stays_positive_with_any_horizon(horizon, sequences):
    control = AdaptiveCoefficient(initial=0.2, target=6.0, horizon=horizon)
    # the exponents would be -2.048 and -20000: an iteration divides by e at most
    assert control.next(0.2, 0.0, sequences) == pytest.approx(0.2 / math.e)
    assert control.next(0.2, 1e9, sequences) == pytest.approx(0.2 * math.e)


def test_senseless_combinations_are_refused():
    base = ppo(TokenMean())
    fields = {**base.__dict__}
    with pytest.raises(UserError, match="needs a critic"):
        Algorithm(**{**fields, "critic": None})
    with pytest.raises(UserError, match="right for only one update"):
        Algorithm(**{**fields, "surrogate": LogProb(), "advantage": ReturnToGo(1.0, "mean", False)})


def test_schedules_by_hand():
    settings = AdamW(1.0, None, (0.9, 0.95), 1e-5, 0.0, 1.0, "linear", 2, 0, None, 3)
    # warm-up 1/3, 2/3, then from 1 to 1/4 in four steps
    factors = [settings.factor(i, 6) for i in range(6)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_critic_has_its_own_rate_and_biases_no_decay(tiny_policy):
    settings = AdamW(1e-4, 1e-2, (0.9, 0.95), 1e-5, 0.1, 1.0, "constant", 0, 0, None, 3)
    groups = settings.build(tiny_policy).param_groups
    assert [(g["base_lr"], g["weight_decay"]) for g in groups] == [(1e-4, 0.1), (1e-4, 0.0), (1e-2, 0.0)]
    assert sum(len(g["params"]) for g in groups) == len(list(tiny_policy.parameters()))


def test_frozen_copy_shares_nothing_that_trains(tiny_policy):
    reference = tiny_policy.frozen_copy()
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in tiny_policy.parameters())
    before = copy.deepcopy(reference.lm.state_dict())
    with torch.no_grad():
        for parameter in tiny_policy.parameters():
            parameter += 1
    assert all(torch.equal(before[k], v) for k, v in reference.lm.state_dict().items())


def _rollout_of(mask):
    from policylab.data.rollout import Rollout

    n, width = mask.shape
    return Rollout(
        prompt_tokens=torch.zeros(n, 1, dtype=torch.long),
        prompt_lengths=torch.ones(n, dtype=torch.long),
        tokens=torch.zeros(n, width, dtype=torch.long),
        lengths=mask.sum(-1),
        action_mask=mask,
        ended=torch.ones(n, dtype=torch.bool),
        group_ids=torch.zeros(n, dtype=torch.long),
        prompt_ids=torch.zeros(n, dtype=torch.long),
        logprobs=torch.zeros(n, width),
    )


def weights_after_an_iteration(compose, tmp_path, *overrides):
    """The policy's weights, flat, after one iteration of PPO with four updates."""
    from policylab.config.build import build

    small = ["debug=fast", "iterations=1", "callbacks=none", "callbacks.checkpoint=null", "hardware=cpu"]
    config = compose(["task=random_walks", "optim.lr=1e-3", *small, *overrides])
    (tmp_path / "run").mkdir(exist_ok=True)
    experiment = build(config, tmp_path)
    experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    assert experiment.module.iteration == 1
    return torch.cat([p.detach().flatten() for p in experiment.module.policy.parameters()])


@pytest.mark.slow
def test_an_iteration_does_not_depend_on_the_micro_batch(compose, tmp_path):
    """Including shuffling, accumulation, clipping and the step."""
    whole = weights_after_an_iteration(compose, tmp_path)
    cut = weights_after_an_iteration(compose, tmp_path, "optim.micro_batch_tokens=40")
    other = weights_after_an_iteration(compose, tmp_path, "seed=1")
    # AdamW divides by the gradient's size, which enlarges the rounding of tiny gradients.
    assert (whole - cut).abs().max() < 1e-4
    assert (whole - other).abs().max() > 1e-3


@pytest.mark.slow
def test_kl_stop_ends_the_updates(compose, tmp_path):
    """The first minibatch is evaluated at the sampling policy; after one large step the second is far from it."""
    stopped = weights_after_an_iteration(compose, tmp_path, "algo.update.kl_stop=1e-9")
    single = weights_after_an_iteration(compose, tmp_path)
    assert (stopped - single).abs().max() > 1e-4
