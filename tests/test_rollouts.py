"""Sampling: noise as an input, inverse CDF, and the engine compared with a plain full forward pass."""

from __future__ import annotations

import pytest
import torch

from policylab.data.plan import BatchPlan
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.functional.logprobs import log_distribution
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.engine import pad_left
from policylab.rollouts.noise import TRAIN, VALIDATION, uniforms
from policylab.rollouts.sampling import inverse_cdf

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]
GROUP, WIDTH = 3, 12


def noise(rows: int = len(PROMPTS) * GROUP):
    return uniforms(0, TRAIN, 0, range(rows), WIDTH)


@pytest.fixture(params=["tiny_policy", "llama_policy"])
def policy(request):
    """Two policies: absolute positions and tied embeddings; rotary positions and grouped keys."""
    policy = request.getfixturevalue(request.param)
    # A random model hardly ever samples EOS; this one does often, so that rows end at different lengths.
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[policy.eos_id] *= 80
    return policy


@pytest.fixture
def engine():
    return CachedEngine(temperature=1.3, max_new_tokens=WIDTH)


class TestNoise:
    def test_pinned(self):
        """Another version of numpy must give the same noise for a seed."""
        assert uniforms(0, TRAIN, 0, [0], 2).tolist() == [[0.011546754286331562, 0.24154919656271812]]
        assert uniforms(3, VALIDATION, 5, [7], 2).tolist() == [[0.4704289656276488, 0.8927955023010484]]

    def test_a_row_depends_on_its_own_key_alone(self):
        whole = uniforms(7, TRAIN, 3, range(8), 20)
        torch.testing.assert_close(uniforms(7, TRAIN, 3, [5, 2], 6), whole[[5, 2], :6], rtol=0, atol=0)

    @pytest.mark.parametrize("key", [(8, TRAIN, 3), (7, VALIDATION, 3), (7, TRAIN, 4)])
    def test_every_part_of_the_key_counts(self, key):
        assert not torch.equal(uniforms(*key, range(2), 4), uniforms(7, TRAIN, 3, range(2), 4))

    def test_uniform(self):
        sample = uniforms(0, TRAIN, 0, range(200), 100)
        assert abs(sample.mean() - 0.5) < 0.01
        assert 0 <= sample.min() <= sample.max() < 1


class TestInverseCDF:
    logp = torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]]).log()

    @pytest.mark.parametrize(
        ("uniform", "token"), [(0.0, 0), (0.1999, 0), (0.2001, 2), (0.6999, 2), (0.7001, 3), (1 - 2**-53, 3)]
    )
    def test_by_hand(self, uniform, token):
        assert inverse_cdf(self.logp, torch.tensor([uniform], dtype=torch.double)).item() == token

    def test_frequencies(self):
        uniform = uniforms(0, TRAIN, 0, range(1), 20_000)[0]
        drawn = inverse_cdf(self.logp.expand(20_000, -1), uniform)
        frequencies = torch.bincount(drawn, minlength=5) / 20_000
        torch.testing.assert_close(frequencies, self.logp.exp()[0], atol=0.01, rtol=0)


class TestEngine:
    def test_sampled_logprobs_and_values_equal_recomputed_ones(self, policy, engine):
        rollout = engine.sample(policy, PROMPTS, GROUP, noise())
        evaluation = policy.evaluate(rollout, engine.temperature, entropy_gradient=False, reference=None)
        torch.testing.assert_close(rollout.logprobs, evaluation.logprobs.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.values, evaluation.values.detach(), atol=1e-4, rtol=0)
        assert rollout.ended.any()
        assert not rollout.ended.all()

    def test_same_tokens_as_a_full_forward_pass_a_token(self, policy, engine):
        """No cache, no padding, no batch: one row at a time from its own tokens."""
        rollout = engine.sample(policy, PROMPTS, GROUP, noise())
        row = 0
        for prompt in PROMPTS:
            for _ in range(GROUP):
                tokens = list(prompt.tokens)
                for t in range(int(rollout.lengths[row])):
                    with torch.no_grad():
                        logits = policy.lm(input_ids=torch.tensor([tokens])).logits[:, -1]
                    drawn = inverse_cdf(log_distribution(logits, engine.temperature), noise()[row, t : t + 1])
                    assert drawn.item() == rollout.tokens[row, t].item()
                    tokens.append(drawn.item())
                row += 1

    def test_a_row_does_not_depend_on_its_batch(self, policy, engine):
        whole = engine.sample(policy, PROMPTS, GROUP, noise())
        alone = engine.sample(policy, PROMPTS[1:2], GROUP, noise()[GROUP : 2 * GROUP])
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens, whole.tokens[GROUP : 2 * GROUP, :width])

    def test_the_first_eos_is_an_action_and_the_last_one(self, policy, engine):
        rollout = engine.sample(policy, PROMPTS, GROUP, noise())
        for row in range(len(rollout)):
            length = int(rollout.lengths[row])
            ends = (rollout.tokens[row, :length] == policy.eos_id).nonzero().flatten().tolist()
            assert ends == ([length - 1] if rollout.ended[row] else [])
            assert rollout.ended[row] or length == WIDTH
            assert rollout.action_mask[row].sum() == length

    def test_groups_are_adjacent(self, tiny_policy, engine):
        rollout = engine.sample(tiny_policy, PROMPTS, GROUP, noise())
        assert rollout.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert rollout.prompt_ids.tolist() == rollout.group_ids.tolist()

    def test_context_that_is_too_short_is_refused(self, tiny_policy):
        with pytest.raises(UserError, match=r"need \d+ positions, but the model has 64"):
            CachedEngine(1.0, 80).sample(tiny_policy, PROMPTS, 1, uniforms(0, TRAIN, 0, range(4), 80))

    @pytest.mark.parametrize(("temperature", "width"), [(0.0, 4), (-1.0, 4), (1.0, 0)])
    def test_senseless_settings_are_refused(self, temperature, width):
        with pytest.raises(UserError, match="must be"):
            CachedEngine(temperature, width)


class TestGrid:
    def test_padding_changes_nothing(self, policy, engine):
        """Wider padding on both sides of the grid: the same log-probs, entropies and values."""
        rollout = engine.sample(policy, PROMPTS, GROUP, noise())
        plain = policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None)
        left, right = 3, 2

        def widen(x):
            return torch.nn.functional.pad(x, (0, right))

        wide = rollout.replace(
            prompt_tokens=torch.nn.functional.pad(rollout.prompt_tokens, (left, 0), value=5),
            tokens=torch.nn.functional.pad(rollout.tokens, (0, right), value=7),
            action_mask=widen(rollout.action_mask),
            logprobs=widen(rollout.logprobs),
            values=widen(rollout.values),
        )
        padded = policy.evaluate(wide, 1.0, entropy_gradient=False, reference=None)
        for name in ("logprobs", "entropy", "values"):
            expected = widen(getattr(plain, name))
            torch.testing.assert_close(getattr(padded, name), expected, atol=1e-5, rtol=0)

    def test_selected_rows_lose_only_padding(self, policy, engine):
        rollout = engine.sample(policy, PROMPTS, GROUP, noise())
        rows = rollout.lengths.argsort()[:4]
        piece = rollout.select(rows)
        assert piece.tokens.shape[1] == int(rollout.lengths[rows].max())
        evaluated = policy.logprobs_of(piece, 1.0)
        whole = policy.logprobs_of(rollout, 1.0)[rows, : evaluated.shape[1]]
        torch.testing.assert_close(evaluated, whole, atol=1e-5, rtol=0)

    def test_pad_left(self):
        tokens, lengths = pad_left([[1, 2], [3]], "cpu")
        assert tokens.tolist() == [[1, 2], [0, 3]]
        assert lengths.tolist() == [2, 1]


class TestPlan:
    def test_by_hand(self):
        plan = BatchPlan(8, 4, 2, 2, 2)
        assert (plan.sequences, plan.minibatch, plan.updates) == (32, 16, 4)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ((8, 4, 1, 12, 1), "8 prompts x 4 = 32 sequences cannot be cut into 12 minibatches"),
            ((7, 4, 1, 1, 2), "rollout.prompts=7 cannot be shared by 2 processes"),
            ((8, 0, 1, 1, 1), "group_size is 0"),
        ],
    )
    def test_what_does_not_divide_is_refused(self, numbers, message):
        with pytest.raises(UserError, match=message):
            BatchPlan(*numbers)
