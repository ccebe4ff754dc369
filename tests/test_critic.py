"""Critics: their inputs, the parameters that their loss trains, their start, and saving and resuming them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from conftest import evaluated, fresh_policy, generated, scratch_model
from policylab.algorithms import Critic
from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError
from policylab.models.critic import value_model
from policylab.models.policy import Policy
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.training.optimizer import AdamW
from small_runs import quick

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]
#: own_layers of each kind; the models have two layers.
KINDS = [0, 1, 2, "all"]
OWN = KINDS[1:]


@pytest.fixture(params=["tiny", "llama"])
def loaded(request):
    return request.getfixturevalue(request.param)


def sampled(policy: Policy) -> Rollout:
    """Completions of different lengths after prompts of different lengths."""
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[policy.eos_id] *= 80
    return CachedEngine(1.0, 10).sample(policy, PROMPTS, 2, uniforms(0, TRAIN, 0, range(8), 10))


def touched(policy: Policy, values: torch.Tensor) -> set[str]:
    """Names of the parameters with a gradient of a loss of the values."""
    policy.zero_grad()
    values.square().sum().backward()
    return {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def moved(policy: Policy) -> None:
    """Makes policy and critic differ from the weights that they were copied from."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)


# -- what it reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_layers", OWN)
def test_at_the_start_own_layers_see_what_the_lm_head_sees(loaded, own_layers):
    """Also with left padding: the rows' prompts differ in length."""
    policy = fresh_policy(loaded, own_layers)
    rollout = sampled(policy)
    with torch.no_grad():
        trunk = policy._read(rollout, logits=True)
        own = policy.critic.hidden(rollout, trunk)
    torch.testing.assert_close(own, trunk.hidden, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("own_layers", KINDS)
def test_values_start_at_zero(loaded, own_layers):
    policy = Policy(loaded, value_model(loaded.lm, own_layers, None)).eval()
    assert policy.values(sampled(fresh_policy(loaded))).abs().max() == 0


@pytest.mark.parametrize("own_layers", KINDS)
def test_values_depend_neither_on_padding_nor_on_the_cut(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    rollout = sampled(policy)
    assert rollout.lengths.unique().numel() > 1
    moved(policy)
    with torch.no_grad():
        whole = policy.values(rollout)
        wide = rollout.replace(
            prompt_tokens=torch.nn.functional.pad(rollout.prompt_tokens, (3, 0), value=5),
            tokens=torch.nn.functional.pad(rollout.tokens, (0, 2), value=7),
            action_mask=torch.nn.functional.pad(rollout.action_mask, (0, 2)),
            logprobs=torch.nn.functional.pad(rollout.logprobs, (0, 2)),
            values=None,
        )
        padded = policy.values(wide)
        for rows in torch.tensor([6, 1, 4, 0, 3, 7, 2, 5]).split(3):
            piece = policy.values(rollout.select(rows))
            torch.testing.assert_close(piece, whole[rows, : piece.shape[1]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded, torch.nn.functional.pad(whole, (0, 2)), atol=1e-5, rtol=1e-4)
    assert whole[~rollout.action_mask].abs().sum() == 0
    assert whole[rollout.action_mask].std() > 1e-3


@pytest.mark.parametrize("own_layers", KINDS)
def test_values_alone_equal_those_beside_the_logits(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    rollout = sampled(policy)
    moved(policy)
    evaluation = policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None)
    torch.testing.assert_close(policy.values(rollout), evaluation.values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("own_layers", KINDS)
def test_values_are_fp32_in_bf16(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    rollout = sampled(policy)
    exact = policy.values(rollout)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = policy.values(rollout)
    policy.lm.to(torch.bfloat16)
    low = fresh_policy(copy.copy(loaded).__class__(policy.lm, loaded.tokenizer, False, ""), own_layers)
    values = low.values(rollout)
    for other in (mixed, values):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, exact, atol=0.2, rtol=0)
        assert not torch.equal(other, other.bfloat16().float()), "rounded to bf16"


# -- what its loss moves --------------------------------------------------------------------------------


@pytest.mark.parametrize("own_layers", KINDS)
def test_the_value_loss_moves_exactly_what_it_should(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    rollout = sampled(policy)
    own = {f"critic.{name}" for name, _ in policy.critic.named_parameters()}
    # Positions that no action reads and tokens that no row contains have no gradient, but their tables have one.
    trunk = {f"lm.{name}" for name, _ in policy.lm.named_parameters() if not name.startswith("lm_head")}
    evaluation = policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None)
    beside = touched(policy, evaluation.values)
    assert beside == (own | trunk if own_layers == 0 else own)
    assert touched(policy, policy.values(rollout)) == own


@pytest.mark.parametrize("own_layers", KINDS)
def test_every_parameter_is_the_actors_or_the_critics(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    actor, critic = policy.actor_parameters(), policy.critic_parameters()
    assert {id(p) for p in actor} == {id(p) for p in policy.lm.parameters()}
    assert {id(p) for p in actor + critic} == {id(p) for p in policy.parameters()}
    assert len(actor) + len(critic) == len(list(policy.parameters()))


def test_without_a_critic(loaded):
    policy = Policy(copy.deepcopy(loaded), critic=None).eval()
    assert policy.critic_parameters() == []
    assert len(policy.actor_parameters()) == len(list(policy.parameters()))
    assert sampled(policy).values is None


@pytest.mark.parametrize("own_layers", KINDS)
def test_a_reference_has_no_critic(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    reference = policy.frozen_copy()
    assert reference.critic is None
    assert policy.critic is not None
    assert not any("critic" in name for name in reference.state_dict())


@pytest.mark.parametrize("own_layers", OWN)
def test_only_matrices_of_the_critic_decay_and_its_head_does_not(loaded, own_layers):
    policy = fresh_policy(loaded, own_layers)
    settings = AdamW(1e-4, 1e-2, (0.9, 0.95), 1e-5, 0.1, 1.0, "constant", 0, 0, None, 3)
    groups = settings.build(policy).param_groups
    assert [(g["base_lr"], g["weight_decay"]) for g in groups] == [
        (1e-4, 0.1),
        (1e-4, 0.0),
        (1e-2, 0.1),
        (1e-2, 0.0),
    ]
    head = {id(p) for p in policy.critic.head.parameters()}
    assert head <= {id(p) for p in groups[3]["params"]}
    assert all(p.ndim >= 2 for p in groups[2]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(policy.parameters()))


# -- a reward model as the start ------------------------------------------------------------------------


def reward_model(family: str, folder: Path, **changes: Any) -> Any:
    """A small reward model with random weights, saved in Hugging Face format."""
    torch.manual_seed(3)
    size: dict[str, Any] = {"vocab_size": 2048, "num_labels": 1, "pad_token_id": 0} | changes
    if family == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(**{"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64} | size)
        )
    else:
        model = LlamaForSequenceClassification(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                **size,
            )
        )
    torch.nn.init.normal_(model.score.weight)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reward_model_scores_every_prefix(tiny, tmp_path, family):
    """It may have another family and size; a value is its score of the text so far."""
    judge = reward_model(family, tmp_path)
    policy = Policy(tiny, value_model(tiny.lm, "all", str(tmp_path))).eval()
    rollout = sampled(fresh_policy(tiny))
    values = policy.values(rollout)
    for row, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        tokens = [*prompt.tokens, *rollout.tokens[row].tolist()]
        for t in range(int(rollout.lengths[row])):
            prefix = torch.tensor([tokens[: len(prompt.tokens) + t]])
            score = judge(input_ids=prefix).logits[0, 0]
            torch.testing.assert_close(values[row, t], score, atol=1e-5, rtol=1e-4)


def test_a_reward_models_weights_are_the_critics(tiny, tmp_path):
    judge = reward_model("gpt2", tmp_path)
    critic = value_model(tiny.lm, "all", str(tmp_path))
    assert torch.equal(critic.head.weight, judge.score.weight)
    assert critic.head.bias.item() == 0
    own = critic.backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in judge.transformer.state_dict().items())


def without_weight(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_reward_models_that_do_not_fit_are_refused(tiny, tmp_path):
    def refused(init: object, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            value_model(tiny.lm, "all", str(init))
        assert "\n" not in str(caught.value)

    refused("nowhere/at/all", r"init=nowhere/at/all: no folder with a config\.json")
    reward_model("gpt2", tmp_path / "two", num_labels=2)
    refused(tmp_path / "two", "has 2 outputs; a critic takes a reward model with 1")
    reward_model("gpt2", tmp_path / "small", vocab_size=100)
    refused(tmp_path / "small", "embeds 100 tokens, but the policy 2048")
    reward_model("gpt2", tmp_path / "part")
    without_weight(tmp_path / "part", "transformer.h.0.mlp.c_fc.weight")
    refused(tmp_path / "part", r"lacks weights: transformer\.h\.0\.mlp\.c_fc\.weight")
    tiny.lm.save_pretrained(tmp_path / "lm")
    refused(tmp_path / "lm", "has 2 outputs")
    config = copy.deepcopy(tiny.lm.config)
    config.num_labels = 1
    config.save_pretrained(tmp_path / "lm")
    refused(tmp_path / "lm", r"lacks weights: score\.weight")
    reward_model("gpt2", tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    refused(tmp_path / "empty", "cannot be loaded")


def test_a_reward_model_for_shorter_texts_is_refused(tiny, tmp_path):
    """Its own table of positions sets the limit."""
    reward_model("gpt2", tmp_path, n_positions=12)
    policy = Policy(copy.deepcopy(tiny), value_model(tiny.lm, "all", str(tmp_path))).eval()
    with pytest.raises(UserError, match=r"need 15 positions, but the critic has 12"):
        sampled(policy)


def test_weights_of_another_shape_are_refused(tiny, tmp_path):
    reward_model("gpt2", tmp_path)
    config = GPT2Config.from_pretrained(tmp_path)
    config.n_embd = 32
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"weights of other sizes than in config.json"):
        value_model(tiny.lm, "all", str(tmp_path))


def test_a_classifier_that_is_no_decoder_is_refused(tiny, tmp_path):
    from transformers import BertConfig

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=2048
    )
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertForSequenceClassification, which has no linear score"):
        value_model(tiny.lm, "all", str(tmp_path))


# -- what is refused ------------------------------------------------------------------------------------


def test_senseless_critics_are_refused(tiny):
    with pytest.raises(UserError, match=r"own_layers is -1; it must be at least 0"):
        Critic(0.1, None, -1, None)
    with pytest.raises(UserError, match=r"needs a separate network, but algo\.critic\.own_layers is 0"):
        Critic(0.1, None, 0, "folder")
    with pytest.raises(UserError, match=r"own_layers=99, but the policy has 2 layers"):
        value_model(tiny.lm, 99, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.critic.own_layers=99"], "the policy has 4 layers; take at most 4"),
        (["algo.critic.own_layers=-1"], "must be at least 0"),
        (["algo.critic.own_layers=some"], r"own_layers='some' is not a whole number or one of all"),
        (["algo.critic.init=folder"], "needs a separate network"),
        (["algo/critic=own_layers", "algo.critic.init=folder"], "needs a separate network"),
        (["algo/critic=reward_model", "algo.critic.init=folder"], r"no folder with a config\.json there"),
    ],
)
def test_a_wrong_config_says_so(compose, tmp_path, overrides, message):
    from policylab.config.build import build

    small = ["algo=ppo", "model=tiny_scratch", "debug=fast", *overrides]
    with pytest.raises(UserError, match=message):
        build(compose(small), tmp_path)


def test_an_architecture_that_cannot_be_split_is_named(tiny):
    class Scaled(type(tiny.lm)):
        """Gives the same values times a factor that is in no module."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("use_cache", None)
            hidden = self.transformer(*args, use_cache=False, **kwargs).last_hidden_state
            return type("Output", (), {"logits": self.lm_head(3 * hidden)})

    lm = copy.deepcopy(tiny.lm)
    lm.__class__ = Scaled
    for own_layers in (1, "all"):
        with pytest.raises(UserError, match="Scaled cannot be taken apart"):
            value_model(lm, own_layers, None)
    lm = copy.deepcopy(tiny.lm)
    lm.config.n_layer = 7
    with pytest.raises(UserError, match=r"it has 0 lists of 7 layers"):
        value_model(lm, 1, None)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "opt", "num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 32, "num_attention_heads": 2,
         "max_position_embeddings": 64, "word_embed_proj_dim": 16},
        {"model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32,
         "num_attention_heads": 2, "max_position_embeddings": 64},
        {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
         "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
        {"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "num_local_experts": 2},
    ],
    ids=lambda a: a["model_type"],
)  # fmt: skip
def test_other_architectures(architecture):
    """Projections after the norm, windows that differ by layer, experts: none of them needs code of its own."""
    loaded = scratch_model(**architecture)
    for own_layers in (1, 2, "all"):
        policy = fresh_policy(loaded, own_layers)
        rollout = sampled(policy)
        with torch.no_grad():
            trunk = policy._read(rollout, logits=True)
            own = policy.critic.hidden(rollout, trunk)
        torch.testing.assert_close(own, trunk.hidden, atol=1e-5, rtol=1e-5)
        assert touched(policy, policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None).values)
        assert all(p.grad is None for p in policy.lm.parameters())


# -- whole runs -----------------------------------------------------------------------------------------

#: Overrides of each variant; ``{folder}`` has a reward model for the tiny vocabulary.
VARIANTS = {
    "shared_trunk": [],
    "own_layers": ["algo/critic=own_layers"],
    "separate": ["algo/critic=separate"],
    "reward_model": ["algo/critic=reward_model", "algo.critic.init={folder}"],
}
SMALL = ["algo=ppo", "debug=fast", "model=tiny_scratch", "hardware=cpu", "callbacks.console=null"]
SETTINGS = ["optim.lr=1e-3", "validation.every=2", "callbacks.checkpoint.every=1"]


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


@pytest.fixture(params=quick(VARIANTS, ["shared_trunk"]))
def variant(request, tmp_path) -> list[str]:
    """Overrides of each variant of the critic."""
    if request.param == "reward_model":
        reward_model("gpt2", tmp_path / "judge")
    return [word.format(folder=tmp_path / "judge") for word in VARIANTS[request.param]]


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_went_through(train, variant, tmp_path):
    """Two iterations, bit for bit; and the run can be evaluated and used to generate, without its critic."""
    from safetensors.torch import load_file

    def state(run: Path) -> dict[str, torch.Tensor]:
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    through = train([*SMALL, *SETTINGS, *variant, "iterations=2"]).rename(tmp_path / "through")
    run = train([*SMALL, *SETTINGS, *variant, "iterations=1"])
    first = state(run)
    train([f"resume={run}", "iterations=2"])
    expected, resumed = state(through), state(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    critic = [name for name in expected if name.startswith("policy.critic.")]
    assert "policy.critic.head.weight" in critic
    assert any(not torch.equal(first[name], expected[name]) for name in critic)

    exported = load_file(run / "model" / "final" / "model.safetensors")
    assert not any("critic" in name for name in exported)
    assert len(evaluated(run, "prompts=3")["samples"]) == 3
    assert len(generated(run, "n=2", "max_new_tokens=3")) == 2


def test_a_run_measures_its_critic(compose, tmp_path, variant):
    """The preflight has compared its values with recomputed ones, and both norms are logged."""
    from policylab.config.build import build

    (tmp_path / "run").mkdir()
    quiet = ["iterations=1", "callbacks=none", "callbacks.checkpoint=null"]
    experiment = build(compose([*SMALL[:-1], *quiet, *variant]), tmp_path)
    module = experiment.module
    seen: list[torch.Tensor | None] = []
    check = module.sampler.recompute
    module.sampler.recompute = lambda rollout: seen.append(rollout.values) or check(rollout)
    experiment.trainer.fit(module, datamodule=experiment.data)
    assert seen[0] is not None, "the preflight's rollout has values"
    assert {"train/value_loss", "train/explained_variance"} <= module.metrics.keys()
    assert ("train/critic_grad_norm" in module.metrics) == bool(variant)


def test_a_preflight_finds_a_critic_that_reads_otherwise(compose, tmp_path, monkeypatch):
    from policylab.config.build import build

    (tmp_path / "run").mkdir()
    quiet = ["iterations=1", "callbacks=none", "callbacks.checkpoint=null"]
    experiment = build(compose([*SMALL[:-1], *quiet, "algo/critic=own_layers"]), tmp_path)
    policy = experiment.module.policy
    values = policy.values
    torch.nn.init.normal_(policy.critic.head.weight)
    monkeypatch.setattr(policy, "values", lambda rollout: values(rollout).roll(1, -1))
    with pytest.raises(UserError, match="values recorded at sampling differ"):
        experiment.trainer.fit(experiment.module, datamodule=experiment.data)


def test_validation_does_not_compute_the_critic(compose, tmp_path, monkeypatch):
    from policylab.config.build import build

    (tmp_path / "run").mkdir()
    quiet = ["iterations=1", "callbacks=none", "callbacks.checkpoint=null"]
    experiment = build(compose([*SMALL[:-1], *quiet, "algo/critic=separate"]), tmp_path)
    experiment.module._checked = True
    monkeypatch.setattr(
        experiment.module.policy, "values", lambda rollout: pytest.fail("values in validation")
    )
    experiment.trainer.validate(experiment.module, datamodule=experiment.data, verbose=False)
