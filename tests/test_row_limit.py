"""Rollouts in pieces: any cut gives the same tokens, and pieces become smaller when memory runs out."""

from __future__ import annotations

import pytest
import torch

from conftest import fresh_policy, scratch_model
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models.decoders import decoder_for
from policylab.models.decoders.general import GeneralDecoder
from policylab.planning.read import describe
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.rollouts.row_limit import EVERY_ROW, RowLimit, is_out_of_memory, rows_that_fit
from small_runs import Changed, algo, small

GROUP, WIDTH = 3, 8
#: Unequal lengths; the third is the first again.
PROMPTS = [Prompt(i + 5, "", tokens, None, ()) for i, tokens in enumerate([(5, 9), (7,), (5, 9), (3, 4, 6)])]
NOISE = uniforms(0, TRAIN, 0, range(len(PROMPTS) * GROUP), WIDTH)
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32},
    "llama": {"model_type": "llama", "num_key_value_heads": 1} | SMALL,
    "gpt_neox": {"model_type": "gpt_neox"} | SMALL,  # takes the general decoder
}
ENGINES = {"cached": CachedEngine, "generate": GenerateEngine}


@pytest.fixture(scope="module", params=list(MODELS))
def policy(request):
    policy = fresh_policy(scratch_model(**MODELS[request.param]))
    assert isinstance(decoder_for(policy.lm, torch.float32), GeneralDecoder) == (request.param == "gpt_neox")
    return policy


def often_ending(logp):
    """Raises the probability of EOS (id 0) to a fifth, so that rows and pieces end at different lengths."""
    return (0.8 * logp.exp() + 0.2 * (torch.arange(logp.shape[-1]) == 0)).log()


def check_same(cut, whole):
    for field, value in vars(whole).items():
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            assert torch.equal(getattr(cut, field), value), field
    torch.testing.assert_close(cut.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    assert (cut.values is None) == (whole.values is None)
    if whole.values is not None:
        torch.testing.assert_close(cut.values, whole.values, atol=1e-4, rtol=0)


class Tight(Changed):
    """An engine with GPU memory for only a few rows."""

    room = 4

    def sample(self, policy, prompts, group_size, noise, behaviour=None):
        if len(noise) > self.room:
            raise torch.OutOfMemoryError("as a GPU would say it")
        assert len(noise) == len(prompts) * group_size
        return self._engine.sample(policy, prompts, group_size, noise, behaviour)


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("behaviour", [pytest.param(None, marks=pytest.mark.slow), often_ending])
def test_every_cut_gives_the_same_rollout(policy, name, behaviour):
    """Cuts into single rows, parts of a group, several groups with a remainder; and no cut."""
    engine = ENGINES[name](1.3, WIDTH)
    whole = engine.sample(policy, PROMPTS, GROUP, NOISE, behaviour)
    for rows in (1, 2, 7, EVERY_ROW):
        check_same(RowLimit(rows).sample(engine, policy, PROMPTS, GROUP, NOISE, behaviour), whole)


def test_when_memory_runs_out_the_piece_is_halved_and_the_rest_is_kept(policy):
    engine = CachedEngine(1.0, WIDTH)
    whole, limit, tight = engine.sample(policy, PROMPTS, GROUP, NOISE), RowLimit(None), Tight(engine)
    with pytest.warns(UserWarning, match=r"at most 3 completions at once; rollout.max_rows=3"):
        check_same(limit.sample(tight, policy, PROMPTS, GROUP, NOISE), whole)
    assert (limit.asked, limit.rows) == (None, 3)
    tight.room = 2
    with pytest.warns(UserWarning, match="at most 1 completion at once"):
        check_same(limit.sample(tight, policy, PROMPTS, GROUP, NOISE), whole)


def test_a_completion_that_does_not_fit_is_told(policy):
    tight = Tight(CachedEngine(1.0, WIDTH))
    tight.room = 0
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(UserError, match=r"one completion of at most 8 tokens .* lower rollout.max_new_tokens"),
    ):
        RowLimit(None).sample(tight, policy, PROMPTS, GROUP, NOISE)


def test_other_errors_are_left_alone(policy):
    class Faulty(Changed):
        def change(self, rollout):
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        RowLimit(None).sample(Faulty(CachedEngine(1.0, WIDTH)), policy, PROMPTS, GROUP, NOISE)


def test_main_memory_that_runs_out_is_noticed():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_long_contexts_and_little_memory_give_fewer_rows(policy, monkeypatch):
    few = rows_that_fit(policy, PROMPTS, 16)
    assert 1 < few < rows_that_fit(policy, PROMPTS, 4)
    monkeypatch.setattr("policylab.rollouts.row_limit.main_memory", lambda: 1)
    assert rows_that_fit(policy, PROMPTS, 16) == 1


@pytest.mark.filterwarnings("ignore:out of memory")
def test_preflight_validation_and_training_are_cut(tmp_path):
    """With ReMax, which also samples greedily."""
    from policylab.config.build import build

    def train(engine, max_rows=None):
        changes = {"iterations": 1, "task.held_out": 8, "validation.prompts": 8, "rollout.max_rows": max_rows}
        experiment = build(small(algo("remax"), changes), tmp_path)
        experiment.module.sampler.engine = engine(experiment.module.sampler.engine)
        experiment.trainer.fit(experiment.module, datamodule=experiment.data)
        return experiment.module

    def rows(module):
        return module.sampler.row_limit.rows

    whole = train(lambda engine: engine)
    cut, halved = train(Tight, max_rows=3), train(Tight)
    assert (rows(whole), rows(cut), rows(halved)) == (None, 3, 4)
    for module in (cut, halved):
        assert [sample.completion for sample in module.samples] == [s.completion for s in whole.samples]
        for ours, theirs in zip(module.policy.parameters(), whole.policy.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    state = {}
    for module in (halved, whole, cut):
        state = state or {"state_dict": module.state_dict()}
        if module is halved:
            module.on_save_checkpoint(state)
        module.on_load_checkpoint({**state, "state_dict": module.state_dict()})
    assert rows(whole) == 4, "what was found is resumed"
    assert rows(cut) == 3, "but not where another number is asked for"


def test_a_plan_counts_as_the_run_does(compose):
    """A smaller limit takes less memory and more time."""
    from policylab.config.build import build_policy
    from policylab.planning.memory import moments
    from policylab.planning.work import Rates, work

    overrides = ["model=tiny", "rollout.prompts=4000", "rollout.max_new_tokens=64"]
    config = compose([*overrides, "hardware=cpu"])
    job = describe(config)
    policy = build_policy(config, critic=None)
    longest = Prompt(0, "", (1,) * job.longest_prompt, None, ())
    assert job.rows == rows_that_fit(policy, [longest], 64)
    few = describe(compose([*overrides, "hardware=cpu", "rollout.max_rows=100"]))
    assert few.rows == 100
    assert few.pieces == 160
    assert moments(few)[0].parts["KV cache"] < moments(job)[0].parts["KV cache"] / 10
    assert work(few, Rates.of(1e12)).seconds["rollout"] > work(job, Rates.of(1e12)).seconds["rollout"]
