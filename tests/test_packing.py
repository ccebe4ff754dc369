"""The update's optimizations do not change its result: no padding, each prompt once, the head in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from conftest import fresh_policy, scratch_model
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.functional import kl, products
from policylab.functional.linear_head import Head, head_figures
from policylab.functional.logprobs import entropy, log_distribution, token_logprobs
from policylab.functional.masks import length_mask
from policylab.functional.ragged import Ragged
from policylab.models.readers import PackedCausal, PaddedCausal
from policylab.models.readers.packing import packed
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.training import micro_batches
from policylab.training.micro_batches import cut, tokens_that_fit
from small_runs import quick

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]

#: One of each kind that can be packed: learned positions, parallel blocks, grouped keys, biases, norms of queries.
ARCHITECTURES = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "gpt_neox": {"model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
                 "intermediate_size": 64, "max_position_embeddings": 64},
    **{
        name: {"model_type": name, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **more}
        for name, more in {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}}.items()
    },
}  # fmt: skip


def sampled(policy, group_size=3):
    """Completions of different lengths: some are cut, because random weights rarely end one."""
    rows = len(PROMPTS) * group_size
    whole = CachedEngine(1.0, 10).sample(policy, PROMPTS, group_size, uniforms(0, TRAIN, 0, range(rows), 10))
    lengths = torch.minimum(whole.lengths, torch.tensor([10, 3, 1, 7, 2, 9]).repeat(rows)[:rows])
    mask = length_mask(lengths, whole.tokens.shape[1])
    return whole.replace(
        lengths=lengths, action_mask=mask, tokens=whole.tokens * mask, logprobs=whole.logprobs * mask
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_filler_behind_a_row_changes_nothing(monkeypatch, name, exact):
    """For oneDNN, rows are filled up to a few lengths, so that it does not keep a kernel for each length."""
    policy = fresh_policy(scratch_model(**ARCHITECTURES[name]))
    rollout = sampled(policy)
    found, fillers = [], []
    for few in (products.FEW_ROWS, 16):
        monkeypatch.setattr(products, "FEW_ROWS", few)
        fillers.append(PackedCausal.lay_out(rollout).packing.filler)
        policy.zero_grad()
        now = policy.evaluate(rollout, 1.0, entropy_gradient=True, reference=policy if exact else None)
        figures = now.logprobs, now.entropy, now.values
        sum((figure**2).sum() for figure in figures).backward()
        found.append([*figures, *(p.grad.clone() for p in policy.parameters() if p.grad is not None)])
    assert fillers[0] == 0 < fillers[1]
    torch.testing.assert_close(found[1], found[0])


def test_common_lengths_are_few():
    cpu = torch.device("cpu")
    lengths = {products.common_length(n, cpu) for n in range(256, 2049)}
    assert len(lengths) == 16 * 3 + 1
    assert all(n <= products.common_length(n, cpu) < n * 17 / 16 for n in range(256, 2049))
    assert products.common_length(100, cpu) == 100
    assert products.common_length(1001, torch.device("meta")) == 1001
    products.use(products.PYTORCH)
    assert products.common_length(1001, cpu) == 1001
    products.use(products.ONEDNN)


# -- rows of unequal length -------------------------------------------------------------------------------


def test_ragged_by_hand():
    ragged = Ragged.of(torch.tensor([2, 0, 1]), 2)
    x = torch.tensor([1.0, 2.0, 3.0])
    grid = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    assert torch.equal(ragged.pad(x), grid)
    assert torch.equal(ragged.pack(grid), x)
    assert not ragged.full


def test_a_full_grid_is_a_view():
    ragged = Ragged.of(torch.tensor([3, 3]), 3)
    x = torch.arange(12.0).view(6, 2)
    assert ragged.pad(x).data_ptr() == x.data_ptr()
    assert torch.equal(ragged.pack(ragged.pad(x)), x)


@pytest.mark.parametrize("way", ["pad", "pack"])
def test_both_directions_have_derivatives(way):
    ragged = Ragged.of(torch.tensor([2, 0, 3]), 3)
    shape = (5, 2) if way == "pad" else (3, 3, 2)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    function = getattr(ragged, way)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 2, x)


# -- one row ----------------------------------------------------------------------------------------------


@pytest.fixture(params=ARCHITECTURES, scope="module")
def loaded(request):
    return scratch_model(**ARCHITECTURES[request.param])


def test_a_packed_row_is_what_rows_apart_are(loaded):
    policy = fresh_policy(loaded)
    assert isinstance(policy.reader, PackedCausal)
    rollout = sampled(policy)
    figures = []
    for kind in (PackedCausal, PaddedCausal):
        policy.reader = kind(policy.lm)
        policy.zero_grad()
        now = policy.evaluate(rollout, 0.7, entropy_gradient=True, reference=None)
        ((now.logprobs * rollout.logprobs).sum() + now.entropy.sum() + (now.values**2).sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        figures.append((now.logprobs, now.entropy, now.values, gradient))
    for one_row, rows_apart in zip(*figures, strict=True):
        torch.testing.assert_close(one_row, rows_apart, atol=2e-5, rtol=1e-4)


def test_a_prompt_is_read_once_and_the_last_token_never(loaded):
    policy = fresh_policy(loaded)
    rollout = sampled(policy)
    distinct = sum(len(prompt.tokens) for prompt in PROMPTS)
    tokens = PackedCausal.lay_out(rollout).tokens
    assert tokens.shape == (1, distinct + int((rollout.lengths - 1).sum()))


def test_completions_of_one_token_alone(tiny_policy):
    rollout = CachedEngine(1.0, 1).sample(tiny_policy, PROMPTS, 1, uniforms(0, TRAIN, 0, range(4), 1))
    torch.testing.assert_close(tiny_policy.logprobs_of(rollout, 1.0), rollout.logprobs, atol=1e-5, rtol=0)


def test_derivatives_that_a_trust_region_takes(tiny_policy):
    """Forward mode and second derivatives through the packed row equal those through separate rows."""
    rollout = sampled(tiny_policy)
    weight = tiny_policy.lm.transformer.h[0].mlp.c_fc.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (PackedCausal, PaddedCausal):
        tiny_policy.reader = kind(tiny_policy.lm)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with forward_ad.dual_level():
                moved = {
                    "lm.transformer.h.0.mlp.c_fc.weight": forward_ad.make_dual(weight.detach(), direction)
                }
                out = torch.func.functional_call(
                    _Distributions(tiny_policy),
                    {f"policy.{name}": value for name, value in moved.items()},
                    (rollout,),
                )
                tangent = forward_ad.unpack_dual(out).tangent
            logp = tiny_policy.log_distributions(rollout, 1.0)
            (slope,) = torch.autograd.grad((logp**2).mean(), weight, create_graph=True)
            (second,) = torch.autograd.grad((slope * direction).sum(), weight)
        found.append((tangent, second))
    for one_row, rows_apart in zip(*found, strict=True):
        torch.testing.assert_close(one_row, rows_apart, atol=1e-4, rtol=1e-3)


class _Distributions(torch.nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, rollout):
        return self.policy.log_distributions(rollout, 1.0)


def test_eager_attention_packs_too(tiny):
    policy = fresh_policy(tiny)
    rollout = sampled(policy)
    expected = policy.logprobs_of(rollout, 1.0)
    policy.lm.config._attn_implementation = "eager"
    torch.testing.assert_close(policy.logprobs_of(rollout, 1.0), expected, atol=1e-5, rtol=0)
    policy.reader = PaddedCausal(policy.lm)
    torch.testing.assert_close(policy.logprobs_of(rollout, 1.0), expected, atol=1e-5, rtol=0)


def test_a_sliding_window_is_not_packed():
    """And still gives the log-probs recorded while sampling."""
    loaded = scratch_model(
        model_type="mistral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4,
    )  # fmt: skip
    policy = fresh_policy(loaded)
    assert isinstance(policy.reader, PaddedCausal)
    rollout = sampled(policy)
    torch.testing.assert_close(policy.logprobs_of(rollout, 1.0), rollout.logprobs, atol=1e-5, rtol=0)


def test_a_model_that_mixes_tokens_outside_attention_is_not_packed(tiny):
    """A model that reads neighbouring tokens outside of attention must not be packed. A trial pass finds it."""
    policy = fresh_policy(tiny)
    mlp = policy.lm.transformer.h[0].mlp
    mlp.register_forward_hook(lambda _, __, out: out + 0.1 * out.cumsum(1))
    assert not PackedCausal.reads(policy.lm)


def test_the_attention_of_the_model_comes_back(tiny_policy):
    sequences = PackedCausal.lay_out(sampled(tiny_policy))
    with pytest.raises(ZeroDivisionError), packed(tiny_policy.lm.config, sequences.packing):
        raise ZeroDivisionError
    assert tiny_policy.lm.config._attn_implementation == "sdpa"


# -- the head ---------------------------------------------------------------------------------------------


def plainly(head, hidden, tokens, entropy_gradient, other):
    logp = log_distribution(
        hidden @ head.weight.T + (0 if head.bias is None else head.bias), head.temperature
    )
    with torch.set_grad_enabled(entropy_gradient):
        entropies = entropy(logp)
    exact = None
    if other is not None:
        q = log_distribution(other[1] @ other[0].weight.T, other[0].temperature)
        exact = kl.exact(logp, q)
    return token_logprobs(logp, tokens), entropies, exact


@pytest.mark.parametrize("with_other", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(
    ("chunk", "bias", "temperature"), [(10**6, False, 1.0), (40, True, 0.7), (1, False, 2.0)]
)
def test_the_head_in_chunks(with_other, entropy_gradient, chunk, bias, temperature):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(13, 5, generator=generator), torch.randn(13, generator=generator)]
    states, tokens = torch.randn(7, 5, generator=generator), torch.arange(7)
    upstream = torch.randn(3, 7, generator=generator)
    other = (
        (Head(torch.randn(13, 5, generator=generator), None, temperature), states + 0.3)
        if with_other
        else None
    )

    def gradients(figures_of):
        leaves = [x.clone().requires_grad_() for x in (states, *weights)]
        head = Head(leaves[1], leaves[2] if bias else None, temperature)
        figures = figures_of(head, leaves[0])
        loss = sum(
            (x * g).sum() for x, g in zip(figures, upstream, strict=True) if x is not None and x.requires_grad
        )
        loss.backward()
        return [x for x in figures if x is not None] + [leaf.grad for leaf in leaves if leaf.grad is not None]

    def chunked(head, hidden):
        figures = head_figures(
            head, hidden, tokens, entropy_gradient=entropy_gradient, other=other, chunk=chunk
        )
        return figures.logprobs, figures.entropy, figures.exact_kl

    expected = gradients(lambda head, hidden: plainly(head, hidden, tokens, entropy_gradient, other))
    for ours, theirs in zip(gradients(chunked), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_in_bf16_a_policy_has_no_kl_to_itself():
    """Both heads are cast, in the forward and the backward pass: the KL and its gradient are zero."""
    states = torch.randn(7, 5, requires_grad=True)
    head = Head(torch.randn(13, 5), None, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        other = (head, states.detach())
        figures = head_figures(head, states, torch.arange(7), entropy_gradient=False, other=other)
        figures.exact_kl.sum().backward()
    assert figures.exact_kl.abs().max() < 1e-6
    assert states.grad.abs().max() < 1e-5


def test_a_second_backward_pass_finds_what_the_first_found():
    states = torch.randn(4, 3, requires_grad=True)
    head = Head(torch.randn(6, 3), None, 1.0)
    figures = head_figures(head, states, torch.arange(4), entropy_gradient=False, other=None)
    first, second = (
        torch.autograd.grad(figures.logprobs.sum(), states, retain_graph=True)[0] for _ in range(2)
    )
    torch.testing.assert_close(first, second)


def test_logits_that_are_changed_after_the_head_are_not_chunked():
    """Granite divides its logits: the head alone would be wrong."""
    loaded = scratch_model(
        model_type="granite", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, logits_scaling=3.0,
    )  # fmt: skip
    policy = fresh_policy(loaded)
    assert policy.reader.head() is None
    rollout = sampled(policy)
    torch.testing.assert_close(policy.logprobs_of(rollout, 1.0), rollout.logprobs, atol=1e-5, rtol=0)


# -- the cut ----------------------------------------------------------------------------------------------


def test_micro_batches_keep_their_budget_and_every_row(tiny_policy):
    rollout = sampled(tiny_policy)
    rows = torch.tensor([11, 0, 5, 3, 8, 2, 7, 1])
    for tokens in (1, 14, 40, 10_000):
        for packs in (True, False):
            parts = cut(rollout, rows, tokens, packs=packs)
            assert sorted(torch.cat(parts).tolist()) == sorted(rows.tolist())
            for part in parts:
                kind = PackedCausal if packs else PaddedCausal
                used = kind.lay_out(rollout.select(part)).tokens.numel()
                assert used <= tokens or len(part) == 1
    assert len(cut(rollout, rows, 10_000, packs=True)) == 1
    assert len(cut(rollout, rows, 1, packs=True)) == len(rows)


def test_short_sequences_are_not_padded_to_a_long_one(tiny_policy, monkeypatch):
    """Attention scores are a grid, so one long sequence must not enlarge it for all short ones."""
    monkeypatch.setattr(micro_batches, "SCORES", 200)
    rollout = sampled(tiny_policy)
    for part in cut(rollout, torch.arange(12), 10_000, packs=True):
        piece = rollout.select(part)
        width = piece.tokens.shape[1]
        assert len(part) == 1 or len(part) * width * (width + int(piece.prompt_lengths.max())) <= 2 * 200


def test_completions_of_a_prompt_stay_together(tiny_policy):
    rollout = sampled(tiny_policy)
    parts = cut(rollout, torch.randperm(12), 40, packs=True)
    prompts = [set(rollout.prompt_ids[part].tolist()) for part in parts]
    assert sum(map(len, prompts)) <= len(PROMPTS) + len(parts) - 1


def fits(policy):
    return tokens_that_fit(policy, whole_distributions=False)


def test_larger_models_get_fewer_tokens(tiny):
    small = fresh_policy(tiny)
    large = fresh_policy(scratch_model(model_type="gpt2", n_layer=4, n_embd=64, n_head=2, n_positions=64))
    assert fits(small) == pytest.approx(4 * fits(large), rel=1e-3)
    assert tokens_that_fit(small, whole_distributions=True) < fits(small) / 2
    small.recomputes_layers = True
    assert fits(small) > 1.5 * tokens_that_fit(fresh_policy(tiny), whole_distributions=False)


class TestOutOfMemory:
    @pytest.fixture
    def train(self, compose, tmp_path):
        def run(*overrides, limit=None):
            from policylab.config.build import build

            config = compose([
                "hardware=cpu", "iterations=2", "callbacks=none", "callbacks.checkpoint=null", "algo=ppo",
                "rollout.prompts=4", "rollout.group_size=2", "rollout.max_new_tokens=8", "validation.prompts=4",
                *overrides,
            ])  # fmt: skip
            Path(config.paths.run).mkdir(exist_ok=True)
            experiment = build(config, tmp_path)
            module = experiment.module
            evaluate = module.policy.evaluate

            def tight(rollout, *args, **kwargs):
                if limit is not None and torch.is_grad_enabled() and int(rollout.lengths.sum()) > limit:
                    raise torch.OutOfMemoryError("as a GPU would say it")
                return evaluate(rollout, *args, **kwargs)

            module.policy.evaluate = tight
            experiment.trainer.fit(module, datamodule=experiment.data)
            return module

        return run

    def test_the_work_is_cut_finer_and_nothing_else_changes(self, train):
        whole = train()
        with pytest.warns(UserWarning, match=r"out of memory: from now on at most \d+ tokens"):
            cut = train(limit=20)
        assert cut.passes.tokens < whole.passes.tokens
        for ours, theirs in zip(cut.policy.parameters(), whole.policy.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        for name, value in whole.metrics.items():
            if not name.startswith("perf/"):
                assert cut.metrics[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name

    @pytest.mark.filterwarnings("ignore:out of memory")
    def test_when_nothing_fits_it_says_so(self, train):
        with pytest.raises(
            UserError, match=r"out of memory with 1 sequence of \d+ tokens in all in a forward pass"
        ):
            train(limit=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("algo", quick(["ppo", "trpo", "dqn"], ["ppo"]))
    def test_before_there_is_an_optimizer_and_whatever_the_algorithm(self, compose, tmp_path, algo):
        """The first forward passes are those of the preflight."""
        from policylab.config.build import build

        config = compose([
            "hardware=cpu", "iterations=1", "callbacks=none", "callbacks.checkpoint=null", f"algo={algo}",
            "rollout.prompts=4", "rollout.group_size=2", "rollout.max_new_tokens=8", "validation.prompts=4",
        ])  # fmt: skip
        Path(config.paths.run).mkdir(exist_ok=True)
        experiment = build(config, tmp_path)
        module = experiment.module
        read = module.policy._read

        def tight(rollout, **kwargs):
            if len(rollout) > 2:
                raise torch.OutOfMemoryError("as a GPU would say it")
            return read(rollout, **kwargs)

        module.policy._read = tight
        with pytest.warns(UserWarning, match="out of memory"):
            experiment.trainer.validate(module, datamodule=experiment.data, verbose=False)
        experiment.trainer.fit(module, datamodule=experiment.data)
        assert module.iteration == 1

    @pytest.mark.slow
    def test_what_was_found_is_resumed(self, train):
        with pytest.warns(UserWarning, match="out of memory"):
            cut = train(limit=20)
        state = {"state_dict": cut.state_dict()}
        cut.on_save_checkpoint(state)
        fresh = train()
        fresh.on_load_checkpoint(state)
        assert fresh.passes.tokens == cut.passes.tokens


def test_bf16_weights_are_cast_anew_after_each_step(compose, tmp_path):
    """With a cache, autocast would keep the casts of the first minibatch for the whole iteration."""
    from policylab.config.build import build

    overrides = [
        "hardware=cpu", "hardware.precision=bf16-mixed", "iterations=1", "callbacks=none", "callbacks.checkpoint=null",
        "algo=ppo", "algo.update.minibatches=2", "algo.update.epochs=1", "optim.lr=0.01", "rollout.prompts=4",
        "rollout.group_size=2", "rollout.max_new_tokens=8", "validation.prompts=4",
    ]  # fmt: skip
    config = compose(overrides)
    Path(config.paths.run).mkdir()
    experiment = build(config, tmp_path)
    module, seen = experiment.module, []
    loss = module.updater.loss

    def watched(rollout, denominator):
        fresh = module.policy.lm.lm_head.weight
        cast = torch.nn.functional.linear(torch.eye(fresh.shape[1]), fresh).T.detach()
        seen.append(cast.float() - fresh.detach().bfloat16().float())
        return loss(rollout, denominator)

    module.updater.loss = watched
    experiment.trainer.fit(module, datamodule=experiment.data)
    assert len(seen) == 2
    assert all(difference.abs().max() == 0 for difference in seen)
