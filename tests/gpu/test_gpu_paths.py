"""On a GPU: compares every decoder and the packed update with a plain fp32 forward and backward pass."""

from __future__ import annotations

import pytest
import torch

import faithfulness
from gpu_device import DEVICE, MARKS, needs_cuda
from policylab.data.rollout import Prompt
from policylab.models.readers import PaddedCausal
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms
from test_decoders import MODELS, policy_of

pytestmark = MARKS

#: Nats a token, and relative error of the gradient. fp32 without TF32; bf16 has 8 bits.
FP32, FP32_GRADIENT = 5e-4, 1e-3
BF16_MEAN, BF16_GRADIENT = 0.05, 0.1


@pytest.fixture(params=list(MODELS))
def policy(request):
    policy = policy_of(request.param)
    policy.critic = None
    return policy.to(DEVICE)


def rollout_of(policy, engine):
    rollout = faithfulness.sampled(policy, engine)
    assert rollout.tokens.device.type == DEVICE.type
    assert rollout.lengths.unique().numel() > 2
    return rollout


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
def test_sampling_fp32(policy, engine):
    rollout = rollout_of(policy, engine(1.0, faithfulness.NEW_TOKENS))
    plain = faithfulness.plainly(policy, rollout)
    row = faithfulness.errors("", rollout, rollout.logprobs, plain, None)
    assert row.largest < FP32


def test_both_engines_draw_the_same_tokens(policy):
    ours, theirs = (
        rollout_of(policy, engine(1.0, faithfulness.NEW_TOKENS)) for engine in (CachedEngine, GenerateEngine)
    )
    width = min(ours.tokens.shape[1], theirs.tokens.shape[1])
    same = (ours.tokens[:, :width] == theirs.tokens[:, :width]).float().mean()
    assert same > 0.99  # a token whose boundary lies within rounding of its uniform number may differ


def test_sampling_bf16(policy):
    rollout = rollout_of(policy, CachedEngine(1.0, faithfulness.NEW_TOKENS, "bfloat16"))
    row = faithfulness.errors("", rollout, rollout.logprobs, faithfulness.plainly(policy, rollout), None)
    assert row.mean < BF16_MEAN


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_update_fp32(policy, packs, recompute):
    rollout = rollout_of(policy, CachedEngine(1.0, faithfulness.NEW_TOKENS))
    plain = faithfulness.plainly(policy, rollout)
    policy.recomputes_layers = recompute
    if not packs:
        policy.reader = PaddedCausal(policy.lm)
    logprobs, gradient = faithfulness.by_update(policy, rollout)
    row = faithfulness.errors("", rollout, logprobs, plain, gradient)
    assert row.largest < FP32
    assert row.gradient < FP32_GRADIENT


@pytest.mark.parametrize("packs", [True, False])
def test_update_bf16(policy, packs):
    rollout = rollout_of(policy, CachedEngine(1.0, faithfulness.NEW_TOKENS))
    plain = faithfulness.plainly(policy, rollout)
    if not packs:
        policy.reader = PaddedCausal(policy.lm)
    with faithfulness.bf16(policy):
        logprobs, gradient = faithfulness.by_update(policy, rollout)
    row = faithfulness.errors("", rollout, logprobs, plain, gradient)
    assert row.mean < BF16_MEAN
    assert row.gradient < BF16_GRADIENT


def test_tokens_are_those_of_the_cpu(policy):
    """The same noise gives the same tokens on every device, except at boundaries within rounding."""
    prompts = [Prompt(0, "", (5, 9, 11), None, ()), Prompt(1, "", (7,), None, ())]
    noise = uniforms(0, TRAIN, 0, range(8), 16)
    engine = CachedEngine(1.0, 16)
    there = engine.sample(policy, prompts, 4, noise)
    here = engine.sample(policy.cpu(), prompts, 4, noise)
    width = min(here.tokens.shape[1], there.tokens.shape[1])
    assert (here.tokens[:, :width] == there.tokens[:, :width].cpu()).float().mean() > 0.98


@needs_cuda
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_a_step_does_not_wait(name):
    """The CPU waits for the GPU once per eight positions, and a few times at the start and the end."""
    from gpu import synchronizations

    policy, steps = policy_of(name).to(DEVICE), 48
    prompts = [Prompt(0, "", (5, 9, 11), None, ())]
    noise = uniforms(0, TRAIN, 0, range(4), steps)
    engine = CachedEngine(1.0, steps)
    engine.sample(policy, prompts, 4, noise)
    count = synchronizations(lambda: engine.sample(policy, prompts, 4, noise))
    assert count <= steps // 8 + 12


def test_tf32_is_off_unless_asked_for():
    assert torch.get_float32_matmul_precision() == "highest"
    x = torch.randn(256, 256, device=DEVICE)
    exact = x.double() @ x.double()
    assert (x @ x - exact).norm() / exact.norm() < 1e-5
