"""Adapters: the model keeps its weights and without adapters is the reference; engines and exports use the adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import evaluated, generated, scratch_model
from policylab.callbacks.checkpoint import write_policy
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models import adapter
from policylab.models.adapted import adapted_layers, adapters_off, save_adapters, whole_weights
from policylab.models.adapter import LoRA
from policylab.models.critic import value_model
from policylab.models.decoders import decoder_for
from policylab.models.decoders.general import GeneralDecoder
from policylab.models.loading import LoadedModel
from policylab.models.policy import Policy
from policylab.models.readers import PackedCausal, PaddedCausal
from policylab.models.size import added_by
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.rollouts.vllm import hand_over
from policylab.runs.writing import write_state
from small_runs import PRESETS, algo, levels, quick, quiet, small

pytest.importorskip("peft")

MODELS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
LORA = LoRA(rank=3, alpha=6, target_modules=None, seed=0)
WIDTH, GROUP = 10, 3
PROMPTS = [Prompt(i, "", tuple(range(5, 7 + 2 * i)), None, ()) for i in range(3)]
NOISE = uniforms(0, TRAIN, 0, range(len(PROMPTS) * GROUP), WIDTH)


def adapted(
    name: str, *, moved: bool, own_layers: int | str = 0, dtype: torch.dtype = torch.float32
) -> Policy:
    """A policy with a critic and adapters, either at their start or trained."""
    loaded = scratch_model(**MODELS[name])
    lm = loaded.lm.to(dtype)
    LORA.adapt(lm)
    policy = Policy(replace(loaded, lm=lm), value_model(lm, own_layers, init=None)).eval()
    if moved:
        move(policy)
    return policy


def move(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def rollout_of(policy: Policy, engine=None):
    return (engine or CachedEngine(0.8, WIDTH)).sample(policy, PROMPTS, GROUP, NOISE)


@pytest.fixture(params=list(MODELS))
def name(request) -> str:
    return request.param


class TestReference:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_at_the_start_the_policy_is_its_reference_bit_for_bit(self, name, dtype):
        policy = adapted(name, moved=False, dtype=dtype)
        reference, rollout = policy.frozen_copy(), rollout_of(policy)
        now = policy.evaluate(rollout, 0.8, entropy_gradient=False, reference=reference)
        assert torch.equal(now.logprobs, reference.logprobs_of(rollout, 0.8))
        assert now.exact_kl.abs().max() < 1e-6

    def test_it_stays_what_the_policy_was(self, name):
        policy = adapted(name, moved=False)
        reference, rollout = policy.frozen_copy(), rollout_of(policy)
        before = reference.logprobs_of(rollout, 0.8)
        plain = Policy(scratch_model(**MODELS[name]), None)
        assert torch.equal(plain.logprobs_of(rollout, 0.8), before)
        move(policy)
        assert torch.equal(reference.logprobs_of(rollout, 0.8), before)
        now = policy.evaluate(rollout, 0.8, entropy_gradient=False, reference=reference)
        assert now.exact_kl[rollout.action_mask].min() > 0, "the adapters are there again"
        assert now.exact_kl.isfinite().all()

    def test_adapters_come_back_after_an_error(self):
        policy = adapted("gpt2", moved=True)
        before = policy.logprobs_of(rollout := rollout_of(policy), 1.0)
        with pytest.raises(ZeroDivisionError), adapters_off(policy.lm):
            _ = 1 / 0
        assert torch.equal(policy.logprobs_of(rollout, 1.0), before)

    def test_a_moving_one_is_refused(self):
        with pytest.raises(UserError, match=r"algo/reference=moving averages weights.*algo/reference=frozen"):
            trained("ppo", "algo/reference=moving")


class TestGradient:
    @pytest.mark.parametrize("own_layers", [0, 1, "all"])
    def test_it_goes_into_adapters_and_value_head_alone(self, name, own_layers):
        policy = adapted(name, moved=True, own_layers=own_layers)
        now = policy.evaluate(rollout_of(policy), 0.8, entropy_gradient=True, reference=policy.frozen_copy())
        (now.logprobs.sum() + now.values.sum() + now.exact_kl.sum() + now.entropy.sum()).backward()
        touched = {n for n, p in policy.named_parameters() if p.grad is not None}
        assert touched == {n for n, _ in policy.named_parameters() if "lora_" in n or "critic.head" in n}
        own = [n for n in touched if n.startswith("critic")]
        assert (len(own) > 2) == (own_layers != 0), "layers of its own have adapters of their own"

    def test_layers_that_run_again_give_the_same(self, name):
        policy = adapted(name, moved=True)
        rollout = rollout_of(policy)

        def gradient() -> list[torch.Tensor]:
            policy.zero_grad()
            policy.logprobs_of(rollout, 1.0).sum().backward()
            return [p.grad.clone() for p in policy.actor_parameters()]

        plain = gradient()
        policy.recomputes_layers = True
        assert all(torch.equal(a, b) for a, b in zip(plain, gradient(), strict=True))

    def test_packed_rows_give_what_rows_apart_give(self, name):
        policy = adapted(name, moved=True)
        assert isinstance(policy.reader, PackedCausal)
        assert policy.reader.head() is not None
        rollout = rollout_of(policy)
        packed = policy.logprobs_of(rollout, 1.0)
        policy.reader = PaddedCausal(policy.lm)
        torch.testing.assert_close(policy.logprobs_of(rollout, 1.0), packed, atol=1e-5, rtol=0)


class TestRollout:
    def test_the_decoder_writes_what_the_adapted_model_says(self, name):
        policy = adapted(name, moved=True)
        assert (type(decoder_for(policy.lm, torch.float32)) is GeneralDecoder) == (name == "gpt_neox")
        rollout = rollout_of(policy)
        recomputed = policy.logprobs_of(rollout, 0.8)
        torch.testing.assert_close(rollout.logprobs, recomputed, atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.values, policy.values(rollout), atol=1e-5, rtol=0)
        without = policy.frozen_copy().logprobs_of(rollout, 0.8)
        assert (without - recomputed).abs().max() > 0.05, "the test would not see adapters that are left out"

    def test_generate_draws_the_same_tokens(self):
        policy = adapted("llama", moved=True)
        ours, theirs = rollout_of(policy), rollout_of(policy, GenerateEngine(0.8, WIDTH))
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)

    def test_bf16_weights_drift_as_they_do_without_adapters(self):
        policy = adapted("llama", moved=True, dtype=torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in policy.actor_parameters())
        rollout = rollout_of(policy)
        assert (rollout.logprobs - policy.logprobs_of(rollout, 0.8)).abs().max() < 0.1

    def test_adapters_of_others_take_the_general_path(self):
        import peft

        lm = scratch_model(**MODELS["gpt2"]).lm
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), lm)
        assert not adapted_layers(lm)
        assert type(decoder_for(lm, torch.float32)) is GeneralDecoder

    def test_vllm_gets_whole_weights(self, name):
        policy, plain = adapted(name, moved=True), scratch_model(**MODELS[name]).lm

        class Model(torch.nn.Module):
            def load_weights(self, weights):
                self.taken = dict(weights)
                return set(self.taken)

        hand_over(policy, model := Model())
        assert {n: w.shape for n, w in model.taken.items()} == {
            n: w.shape for n, w in plain.named_parameters()
        }


class TestLayers:
    def test_lower_layers_can_do_without(self):
        lm = scratch_model(**MODELS["llama"]).lm
        LORA.adapt(lm, frozen_layers=1)
        assert {path.split(".")[2] for path in adapted_layers(lm)} == {"1"}

    def test_they_can_be_named(self):
        lm = scratch_model(**MODELS["gpt2"]).lm
        replace(LORA, target_modules=["c_attn", "mlp.c_proj"]).adapt(lm)
        assert len(adapted_layers(lm)) == 4
        assert not any(path.endswith("attn.c_proj") for path in adapted_layers(lm))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"target_modules": ["q_proj"]},
                r"no linear layer called q_proj there that can be adapted; it has c_attn, c_fc, c_proj",
            ),
            ({"target_modules": "c_attn"}, r"target_modules='c_attn' is not a list of names; write \["),
            ({"target_modules": []}, r"target_modules=\[\] is not a list of names"),
            ({"rank": 0}, r"model\.adapter\.rank"),
            ({"alpha": 0}, r"model\.adapter\.alpha"),
        ],
    )
    def test_what_makes_no_sense_is_told(self, fields, message):
        with pytest.raises(UserError, match=message):
            replace(LORA, **fields).adapt(scratch_model(**MODELS["gpt2"]).lm)

    def test_without_peft_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'policylab\[lora\]', or take model/adapter=none"):
            LoRA(1, 1, None, 0)

    def test_the_seed_alone_draws_them(self):
        def drawn(seed: int) -> torch.Tensor:
            torch.randn(1)
            lm = scratch_model(**MODELS["gpt2"]).lm
            state = torch.get_rng_state()
            replace(LORA, seed=seed).adapt(lm)
            assert torch.equal(state, torch.get_rng_state())
            return torch.cat([p.flatten() for p in lm.parameters() if p.requires_grad])

        assert torch.equal(drawn(0), drawn(0))
        assert not torch.equal(drawn(0), drawn(1))


class TestExport:
    def test_the_folder_says_what_the_policy_says(self, name, tmp_path):
        """Merged for everyone, and apart for PEFT."""
        import peft
        from transformers import AutoModelForCausalLM

        policy, plain = adapted(name, moved=True), scratch_model(**MODELS[name]).lm
        adapters = {
            f"policy.lm.{n}": p.detach().clone() for n, p in policy.lm.named_parameters() if "lora_" in n
        }
        state = {"state_dict": adapters, "policylab": {"iteration": 1, "tokens_sampled": 1}}
        write_state(state, checkpoint := tmp_path / "last.ckpt")
        expected = policy.lm(tokens := torch.arange(1, 9)[None]).logits
        move(policy)  # training continues while the file is written
        write_policy(policy, checkpoint, 1, tmp_path / "final")
        merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        torch.testing.assert_close(merged.eval()(tokens).logits, expected, atol=1e-5, rtol=1e-4)
        apart = peft.PeftModel.from_pretrained(plain, str(tmp_path / "final" / "adapter")).eval()
        assert torch.equal(apart(tokens).logits, expected)

    def test_a_model_without_adapters_is_handed_on_as_it_is(self):
        state = scratch_model(**MODELS["gpt2"]).lm.state_dict()
        assert dict(whole_weights(torch.nn.Module(), state)) == state


# -- runs ------------------------------------------------------------------------------------------------

RUN = {"_target_": "policylab.models.adapter.LoRA", "rank": 2, "alpha": 4, "target_modules": None, "seed": 0}


#: Other layers than those of plain transformers: last names of the adapted weights, and weights without adapters.
OTHERS = {
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
        "mlp.gate.weight",
    ),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "shared_expert_gate"},
        "mlp.gate.weight, mlp.shared_expert.gate_proj.weight, mlp.shared_expert.up_proj.weight",
    ),
    "mamba": ({"state_size": 4}, {"in_proj"}, "mixer.dt_proj.weight, mixer.out_proj.weight"),
}


def other(kind: str) -> LoadedModel:
    sizes = MODELS["llama"] if kind != "mamba" else {"hidden_size": 32, "num_hidden_layers": 2}
    attention = "eager" if kind == "mamba" else "sdpa"
    return scratch_model(attention, **{**sizes, "model_type": kind, **OTHERS[kind][0]})


@pytest.mark.parametrize("kind", list(OTHERS))
def test_experts_are_adapted_and_layers_without_adapters_are_told(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel

    plain, lm = other(kind).lm.eval(), other(kind).lm.eval()
    ids = torch.tensor([[1, 5, 9, 20, 33, 70]])
    planned = added_by(LORA, lm, 0)
    LORA.adapt(lm)
    assert OTHERS[kind][2] in caplog.text
    assert planned == sum(p.numel() for p in lm.parameters() if p.requires_grad)
    start = plain(input_ids=ids).logits
    assert torch.equal(lm(input_ids=ids).logits, start)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    lm(input_ids=ids).logits.sum().backward()
    assert all(p.grad.any() for p in lm.parameters() if p.requires_grad)
    moved = lm(input_ids=ids).logits
    assert (moved - start).abs().max() > 0.01
    with adapters_off(lm):
        assert torch.equal(lm(input_ids=ids).logits, start)
    whole = dict(whole_weights(lm, lm.state_dict()))
    before = plain.state_dict()
    changed = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name in whole
        if not whole[name].equal(before[name])
    }
    assert changed == OTHERS[kind][1]
    save_adapters(lm, lm.state_dict(), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(theirs(input_ids=ids).logits, moved, atol=1e-6, rtol=0)
    plain.load_state_dict(whole)
    torch.testing.assert_close(plain(input_ids=ids).logits, moved, atol=1e-5, rtol=0)


def test_a_layer_that_cannot_be_adapted_is_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"no linear layer called out_proj there that can be adapted; it has in_proj"
    ):
        replace(LORA, target_modules=["out_proj"]).adapt(other("mamba").lm)


def built(preset: str, *overrides: str, **changes: object):
    from policylab.config.build import build

    config = small(algo(preset, *overrides), {"model.adapter": RUN, **changes})
    with quiet():
        experiment = build(config, Path("nowhere"))
    experiment.module.sampler.scorer.reward = levels
    experiment.trainer.limit_val_batches = 0
    return experiment


def trained(preset: str, *overrides: str, **changes: object):
    """The module after a small run with preflight, and its state before."""
    experiment = built(preset, *overrides, **changes)
    before = copy.deepcopy(experiment.module.policy.state_dict())
    with quiet():
        experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    return experiment.module, before


@pytest.mark.parametrize("preset", quick(PRESETS, ["ppo", "dqn"]))
def test_every_preset_trains_adapters_alone(preset):
    module, before = trained(preset)
    after = module.policy.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("lora_B" in name for name in moved)
    assert all("lora_" in name or name.startswith("critic.head") for name in moved), moved
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("ppo", {}),
        ("ppo", {"algo.critic.own_layers": 1}),
        ("ppo", {"algo.critic.own_layers": "all"}),
        ("dqn", {}),
        ("soft_q", {}),
    ],
    ids=str,
)
def test_no_network_has_a_second_copy_of_the_weights(preset, changes):
    """Reference, critic and target network share the policy's tensors, and have only their own adapters."""
    module = built(preset, **changes).module
    base = {id(p) for n, p in module.policy.lm.named_parameters() if "lora_" not in n}
    names = dict(module.named_parameters(remove_duplicate=False))
    assert any(name.startswith("reference.") for name in names)
    others = {name for name, p in names.items() if id(p) not in base}
    assert all("lora_" in name or "critic.head" in name for name in others), others


def test_a_reward_model_as_critic_is_adapted_too(tmp_path):
    from fields import save_reward_model

    save_reward_model(tmp_path, 0)
    module, before = trained("ppo", **{"algo.critic.own_layers": "all", "algo.critic.init": str(tmp_path)})
    after = module.policy.critic.state_dict()
    moved = {name for name in after if not torch.equal(before[f"critic.{name}"], after[name])}
    assert any("lora_B" in name for name in moved)
    assert all("lora_" in name or name.startswith("head") for name in moved)


@cache
def usual_loss() -> float:
    return trained("grpo")[0].metrics["train/loss"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 3),
        *(
            pytest.param(*field, marks=pytest.mark.slow)
            for field in [("alpha", 8), ("target_modules", ["c_attn"]), ("seed", 1)]
        ),
    ],
)
def test_every_field_has_an_effect(key, value):
    other, _ = trained("grpo", **{"model.adapter": {**RUN, key: value}})
    assert other.metrics["train/loss"] != usual_loss()


@pytest.fixture
def train(compose, tmp_path):
    """``train(["iterations=4"])`` trains in ``tmp_path / "run"`` and returns that folder."""

    def run(overrides: list[str]) -> Path:
        from policylab.config.settle import settle
        from policylab.launch import run as job
        from policylab.runs.command import with_command_of

        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        words = with_command_of(overrides)
        job.train(settle(compose(words)), folder, words)
        return folder

    return run


@pytest.mark.slow
def test_a_run_is_resumed_evaluated_and_asked(train, tmp_path):
    """Bit for bit, from a file with only adapters and critic; refused with other weights."""
    from policylab.launch.generate import load_trained
    from policylab.runs.metrics_file import read_rows

    def state(run: Path) -> dict[str, torch.Tensor]:
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    start = [
        *(
            "algo=ppo",
            "model=tiny_scratch",
            "model/adapter=lora",
            "model.adapter.rank=2",
            "algo/critic=own_layers",
        ),
        *("debug=fast", "hardware=cpu", "callbacks.console=null", "optim.lr=1e-2"),
        *("validation.every=1", "callbacks.checkpoint.every=1"),
    ]
    through = train([*start, "iterations=2"]).rename(tmp_path / "through")
    run = train([*start, "iterations=1"])
    first = state(run)
    train([f"resume={run}", "iterations=2"])
    expected, resumed = state(through), state(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert any("lora_A" in name and not torch.equal(first[name], expected[name]) for name in expected)
    assert all("lora_" in name or "critic.head" in name for name in expected)

    result = evaluated(run)
    last = read_rows(run / "metrics.csv")[-1]
    assert result["metrics"]["val/reward"] == pytest.approx(last["val/reward"], abs=1e-6)
    assert result["metrics"]["val/kl"] == pytest.approx(last["val/kl"], abs=1e-6)
    assert last["val/kl"] != 0
    assert not load_trained(run, "final").policy.adapted
    assert len(generated(run, "n=2", "max_new_tokens=3")) == 2

    with pytest.raises(
        UserError,
        match=r"this run has model\.adapter\.rank=2, the command says 3; a resume may change .* start a new run",
    ):
        train([f"resume={run}", "iterations=3", "model.adapter.rank=3"])


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True], ids=["reward", "shuffled"])
def test_adapters_learn_and_not_from_noise(compose, shuffled):
    """The random walks of test_learning.py, at ten times the learning rate."""
    from test_learning import WALKS, gain

    words = [word for word in WALKS if not word.startswith("optim.lr")]
    rise = gain(compose([*words, "algo=ppo", "model/adapter=lora", "optim.lr=3e-3"]), shuffled)
    assert rise < 0.05 if shuffled else rise > 0.1
