"""rollout=generate: Hugging Face ``generate`` samples the same rollout as our own engine."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import GenerationConfig

from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError
from policylab.functional.behaviour import epsilon_greedy, greedy
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms

PROMPTS = [Prompt(i + 5, "", tuple(range(1, 3 + 2 * i)), None, ()) for i in range(4)]
GROUP, WIDTH = 3, 12
NOISE = uniforms(0, TRAIN, 0, range(len(PROMPTS) * GROUP), WIDTH)


@pytest.fixture(params=["tiny_policy", "llama_policy"])
def policy(request: pytest.FixtureRequest):
    """A policy that often samples EOS, so that rows end at different lengths."""
    policy = request.getfixturevalue(request.param)
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[policy.eos_id] *= 80
    return policy


def assert_same(generated: Rollout, cached: Rollout) -> None:
    for name in (
        *("prompt_tokens", "prompt_lengths", "tokens", "lengths", "action_mask"),
        *("ended", "group_ids", "prompt_ids"),
    ):
        assert torch.equal(getattr(generated, name), getattr(cached, name)), name
    torch.testing.assert_close(generated.logprobs, cached.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "behaviour",
    [None, greedy, partial(epsilon_greedy, epsilon=0.5, others="uniform")],
    ids=["policy", "greedy", "epsilon"],
)
def test_the_rollout_of_the_cached_engine(policy, behaviour):
    cached = CachedEngine(1.3, WIDTH).sample(policy, PROMPTS, GROUP, NOISE, behaviour)
    generated = GenerateEngine(1.3, WIDTH).sample(policy, PROMPTS, GROUP, NOISE, behaviour)
    assert_same(generated, cached)
    if behaviour is None:
        assert 0 < cached.ended.sum() < len(cached)


def test_rows_that_end_early_cut_the_grid(policy):
    """All rows end: the grid is as wide as the longest of them."""
    engines = CachedEngine(0.7, WIDTH), GenerateEngine(0.7, WIDTH)

    def certain_end(logp):
        return torch.full_like(logp, float("-inf")).index_fill(-1, torch.tensor(policy.eos_id), 0.0)

    cached, generated = (engine.sample(policy, PROMPTS, 1, NOISE[:4], certain_end) for engine in engines)
    assert generated.tokens.shape == (4, 1)
    assert_same(generated, cached)


def test_the_defaults_of_a_checkpoint_do_not_mix_in(policy):
    policy.lm.generation_config = GenerationConfig(
        top_k=2, repetition_penalty=3.0, do_sample=True, temperature=0.1, eos_token_id=[0, 3], max_length=4
    )
    engines = CachedEngine(1.0, WIDTH), GenerateEngine(1.0, WIDTH)
    cached, generated = (engine.sample(policy, PROMPTS, GROUP, NOISE) for engine in engines)
    assert_same(generated, cached)
    assert policy.lm.generation_config.top_k == 2


def test_values_are_computed_afterwards(tiny_policy):
    """Values of the shared trunk, which cached sampling gives, equal those of the forward pass here."""
    cached = CachedEngine(1.0, WIDTH).sample(tiny_policy, PROMPTS, GROUP, NOISE)
    generated = GenerateEngine(1.0, WIDTH).sample(tiny_policy, PROMPTS, GROUP, NOISE)
    assert generated.values is None
    torch.testing.assert_close(tiny_policy.values(generated).detach(), cached.values, atol=1e-4, rtol=0)


def test_context_that_is_too_short_is_refused(tiny_policy):
    with pytest.raises(UserError, match=r"need \d+ positions, but the model has 64"):
        GenerateEngine(1.0, 80).sample(tiny_policy, PROMPTS, 1, uniforms(0, TRAIN, 0, range(4), 80))


@pytest.mark.parametrize(("temperature", "width"), [(0.0, 4), (1.0, 0)])
def test_senseless_settings_are_refused(temperature, width):
    with pytest.raises(UserError, match="must be"):
        GenerateEngine(temperature, width)
