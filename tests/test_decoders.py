"""Decoders: each samples the tokens of the model's plain forward pass, and model variants use the general decoder."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from conftest import fresh_policy, scratch_model
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.functional.logprobs import log_distribution
from policylab.models.decoders import decoder_for, linear
from policylab.models.decoders.general import GeneralDecoder
from policylab.models.decoders.gpt2 import GPT2
from policylab.models.decoders.llama import Llama
from policylab.models.policy import Policy
from policylab.rollouts import cached
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.rollouts.sampling import BLOCK, by_triangle, draw, inverse_cdf

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {"model_type": "llama"} | GROUPED,
    "llama_untied_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True} | GROUPED,
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True} | GROUPED,
    "llama3_positions": {"model_type": "llama", "rope_parameters": LLAMA3} | GROUPED,
    "qwen2": {"model_type": "qwen2"} | GROUPED,
    "qwen3": {"model_type": "qwen3", "head_dim": 16} | GROUPED,
    "gpt_neox": {"model_type": "gpt_neox"} | SMALL,
    "opt": {
        "model_type": "opt",
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    },
}
DECODERS = {"gpt2": GPT2, "gpt_neox": GeneralDecoder, "opt": GeneralDecoder}
WIDTH, GROUP, TEMPERATURE = 12, 3, 1.3
#: Unequal lengths; the third is the first again.
PROMPTS = [
    Prompt(0, "", (5, 9, 11), None, ()),
    Prompt(1, "", (7,), None, ()),
    Prompt(2, "", (5, 9, 11), None, ()),
    Prompt(3, "", tuple(range(20, 29)), None, ()),
]
NOISE = uniforms(0, TRAIN, 0, range(len(PROMPTS) * GROUP), WIDTH)


@cache
def loaded(name: str):
    return scratch_model(**MODELS[name])


def policy_of(name: str):
    """A model in which every parameter has an effect: biases and norms are random too."""
    policy = fresh_policy(loaded(name))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter_name, parameter in policy.lm.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "head" not in parameter_name:
                parameter.mul_(3)
    return policy


@pytest.fixture(params=list(MODELS))
def policy(request):
    return policy_of(request.param)


@pytest.fixture
def engine():
    return CachedEngine(TEMPERATURE, WIDTH)


def often_ending(logp):
    """Raises the probability of EOS (id 0) to a fifth, so that rows end at different lengths."""
    return (0.8 * logp.exp() + 0.2 * (torch.arange(logp.shape[-1]) == 0)).log()


def check_same(policy, rollout, behaviour=often_ending, *, tokens: bool = True, tolerance: float = 1e-4):
    """Compares with a forward pass of each row alone, without cache, padding or batch."""
    for row in range(len(rollout)):
        prompt, length = PROMPTS[row // GROUP].tokens, int(rollout.lengths[row])
        written = rollout.tokens[row, :length]
        with torch.no_grad():
            ids = torch.cat([torch.tensor(prompt), written])[None]
            out = policy.lm(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=True)
        logp = behaviour(log_distribution(out.logits[0, len(prompt) - 1 :], TEMPERATURE))
        if tokens:
            assert torch.equal(inverse_cdf(logp, NOISE[row, :length]), written)
        expected = logp.gather(-1, written[:, None]).squeeze(-1)
        torch.testing.assert_close(rollout.logprobs[row, :length], expected, atol=tolerance, rtol=0)
        values = policy.critic.score(out.hidden_states[-1][0, len(prompt) - 1 :]).detach()
        scale = float(values.abs().max().clamp(min=1))
        torch.testing.assert_close(
            rollout.values[row, :length] / scale, values / scale, atol=tolerance, rtol=0
        )


class TestTokens:
    def test_tokens_logprobs_and_values_are_those_of_the_plain_forward(self, policy, engine):
        rollout = engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        assert rollout.lengths.unique().numel() > 4
        check_same(policy, rollout)
        endless = engine.sample(policy, PROMPTS, GROUP, NOISE)
        check_same(policy, endless, behaviour=lambda logp: logp)

    @pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
    @pytest.mark.parametrize("threshold", [0.01, 2.0])
    def test_whenever_rows_leave(self, name, threshold, monkeypatch, engine):
        """Finished rows leave the batch at once, and prompts with their last row; or rows never leave."""
        monkeypatch.setattr(cached, "COMPACT_AT", threshold)
        policy = policy_of(name)
        check_same(policy, engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending))

    def test_new_weights_are_read(self, engine):
        policy = policy_of("llama")
        before = engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        with torch.no_grad():
            for parameter in policy.lm.parameters():
                parameter.mul_(1.05)
        after = engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        assert (before.logprobs[:, 0] - after.logprobs[:, 0]).abs().min() > 0
        check_same(policy, after)

    @pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
    def test_a_prompt_is_read_once(self, name, monkeypatch, engine):
        policy, read = policy_of(name), []
        policy.lm.get_input_embeddings()
        decoder = type(decoder_for(policy.lm, torch.float32))
        prefill = decoder.prefill

        def spy(self, tokens, *args, **kwargs):
            read.append(len(tokens))
            prefill(self, tokens, *args, **kwargs)

        monkeypatch.setattr(decoder, "prefill", spy)
        engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        assert read == [3]

    def test_rows_that_go_on_fill_the_places_of_those_that_ended(self):
        ended = torch.tensor([0, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
        assert cached.unfinished_first(ended).tolist() == [0, 5, 2, 6]

    def test_many_rows_come_in_few_numbers(self, monkeypatch):
        monkeypatch.setattr(cached, "MANY_ROWS", 3)
        monkeypatch.setattr(cached, "ROW_STEP", 3)
        ended = torch.tensor([0, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
        assert cached.unfinished_first(ended).tolist() == [0, 6, 2, 3, 4, 5]
        assert cached.unfinished_first(ended[:6]).tolist() == [0, 5, 2]
        assert cached.unfinished_first(~ended[:5]).tolist() == [3, 1, 4]
        assert len(cached.unfinished_first(ended[:4])) == 2
        monkeypatch.setattr(cached, "ROW_STEP", 100)
        assert cached.unfinished_first(ended).tolist() == list(range(7))


class TestLowPrecision:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_within_the_rounding_of_bf16(self, name, packed, monkeypatch):
        if not packed:
            monkeypatch.setattr(linear, "onednn_works", lambda dtype: False)
        engine = CachedEngine(TEMPERATURE, WIDTH, dtype="bfloat16")
        assert not engine.exact
        policy = policy_of(name)
        rollout = engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        check_same(policy, rollout, tokens=False, tolerance=0.2)
        assert rollout.logprobs.dtype == torch.float32

    @pytest.mark.parametrize("name", ["gpt2", "qwen3", "gpt_neox"])
    def test_weights_that_are_bf16_themselves(self, name, engine):
        policy = policy_of(name)
        low = policy.lm.to(torch.bfloat16)
        rollout = engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        low.float()
        check_same(policy, rollout, tokens=False, tolerance=0.2)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_float64_takes_the_general_path(self, name):
        assert type(decoder_for(policy_of(name).lm.double(), torch.float64)) is GeneralDecoder

    def test_under_autocast_weights_are_cast_once(self, monkeypatch, engine):
        """With ``hardware.precision=bf16-mixed`` both training and sampling compute in bf16."""
        policy, casts, init = policy_of("llama"), [], linear.Linear.__init__

        def spy(self, weight, bias, dtype, *then):
            casts.append(dtype)
            init(self, weight, bias, dtype, *then)

        monkeypatch.setattr(linear.Linear, "__init__", spy)
        with torch.autocast("cpu", torch.bfloat16):
            under = engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        assert set(casts) == {torch.bfloat16}
        assert len(casts) == 2 * 5 + 1  # two layers of five, and the head
        low = CachedEngine(TEMPERATURE, WIDTH, dtype="bfloat16").sample(
            policy, PROMPTS, GROUP, NOISE, often_ending
        )
        assert torch.equal(under.logprobs, low.logprobs)

    def test_another_dtype_is_refused(self):
        with pytest.raises(UserError, match=r"rollout\.dtype is float16; take null"):
            CachedEngine(1.0, 4, dtype="float16")


class TestChoice:
    def test_the_fastest_that_knows_the_model(self, policy):
        decoder = decoder_for(policy.lm, torch.float32)
        expected = DECODERS.get(policy.lm.config.model_type, Llama)
        assert type(getattr(decoder, "network", decoder)) is expected

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("gpt2", {"activation_function": "relu"}),
            ("gpt2", {"activation_function": "gelu"}),
            ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
            ("gpt2", {"scale_attn_weights": False}),
            ("gpt2", {"reorder_and_upcast_attn": True}),
            ("llama", {"hidden_act": "gelu"}),
            ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
            ("llama", {"model_type": "mistral"}),
        ],
    )
    def test_variants_take_the_general_path(self, name, changes):
        variant = scratch_model(**(MODELS[name] | changes))
        assert type(decoder_for(variant.lm, torch.float32)) is GeneralDecoder

    def test_hooks_adapters_and_dropout_take_the_general_path(self):
        class Adapter(nn.Linear):
            pass

        lm = policy_of("llama").lm
        handle = lm.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert type(decoder_for(lm, torch.float32)) is GeneralDecoder
        handle.remove()
        assert type(decoder_for(lm, torch.float32)) is not GeneralDecoder
        lm.model.layers[0].self_attn.q_proj = Adapter(32, 32)
        assert type(decoder_for(lm, torch.float32)) is GeneralDecoder

        lm = policy_of("gpt2").lm.train()
        lm.transformer.drop.p = 0.1
        assert type(decoder_for(lm, torch.float32)) is GeneralDecoder


class TestDraw:
    @pytest.mark.parametrize("size", [3, BLOCK, BLOCK + 1, 5 * BLOCK - 7])
    def test_the_same_as_one_long_sum(self, size):
        torch.manual_seed(0)
        logits = torch.randn(500, size) * 4
        logits[:, ::3] = float("-inf")
        uniform = uniforms(0, TRAIN, 1, range(1), 500)[0]
        tokens, logprobs = draw(logits, 0.7, uniform)
        cdf = (logits.double() / 0.7).softmax(-1).cumsum(-1)
        assert torch.equal(tokens, torch.searchsorted(cdf, uniform[:, None], right=True).squeeze(-1))
        expected = log_distribution(logits, 0.7).gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
    @pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
    def test_what_is_impossible_is_never_drawn(self, uniform, place):
        logits = torch.full((1, 3 * BLOCK), float("-inf"))
        logits[0, place] = 3.0
        tokens, logprobs = draw(logits, 1.0, torch.tensor([uniform], dtype=torch.double))
        assert tokens.item() == place
        assert logprobs.item() == 0.0

    def test_logits_that_are_not_finite_are_refused(self):
        with pytest.raises(FloatingPointError, match=r"lower optim\.lr"):
            inverse_cdf(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]))

    def test_a_broken_policy_is_noticed(self, engine):
        policy = policy_of("gpt2")
        with torch.no_grad():
            policy.lm.transformer.ln_f.weight[0] = float("nan")
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.sample(policy, PROMPTS, GROUP, NOISE, often_ending)


def test_running_sums_by_a_triangle_are_running_sums():
    """The form without a scan, which CUDA uses with deterministic algorithms."""
    weights = torch.rand(3, 300)
    weights[:, 7] = 0.0
    sums = by_triangle(weights)
    torch.testing.assert_close(sums, weights.cumsum(-1, dtype=torch.double), atol=1e-12, rtol=1e-12)
    assert torch.equal(sums[:, 7], sums[:, 6])  # a token of probability zero is never drawn
    assert (sums.diff(dim=-1) >= 0).all()


# -- recurrent models, whose state is in transformers' cache or in the model ---------------------------------------

HYBRID = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 3}
RECURRENT = {
    "lfm2": ("sdpa", {**HYBRID, "layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("eager", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "jamba": ("sdpa", {**HYBRID, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(RECURRENT))
def test_recurrent_models_write_what_generate_writes(kind):
    attention, sizes = RECURRENT[kind]
    policy = Policy(scratch_model(attention, model_type=kind, **sizes), None).eval()
    assert not policy.reader.packs, "a convolution would see the row before"
    ours, theirs = (
        engine(TEMPERATURE, WIDTH).sample(policy, PROMPTS, GROUP, NOISE, often_ending)
        for engine in (CachedEngine, GenerateEngine)
    )
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.lengths.unique().numel() > 2, "rows leave at different times"
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")
def test_the_cache_goes_by_its_present_name():
    CachedEngine(TEMPERATURE, 2).sample(policy_of("opt"), PROMPTS, 1, NOISE[: len(PROMPTS)])


def test_a_state_outside_the_cache_names_the_way_out():
    sizes = {**HYBRID, "lru_width": 32, "attention_window_size": 16}
    sizes.pop("max_position_embeddings", None)
    policy = Policy(scratch_model(model_type="recurrent_gemma", **sizes), None).eval()
    with pytest.raises(
        UserError, match=r"RecurrentGemmaForCausalLM, which keeps its state .*; take rollout=generate"
    ):
        CachedEngine(TEMPERATURE, WIDTH).sample(policy, PROMPTS, GROUP, NOISE)
