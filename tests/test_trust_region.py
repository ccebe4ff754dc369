"""Fisher products, conjugate gradients, and the effect of a trust-region step on a policy."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from policylab.algorithms import LineSearch, TrustRegion
from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError
from policylab.functional import kl
from policylab.functional.conjugate_gradient import conjugate_gradient
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.training.fisher import Actor, FisherProducts, fisher_diagonal, twice_differentiable
from policylab.training.line_search import Outcome, search
from policylab.training.metrics import means_of
from policylab.training.natural_step import NaturalStep, Step
from policylab.training.skipping import NotFinite
from small_runs import algo as preset
from small_runs import quick, small, train

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]  # of different lengths: padding
KINDS = ["gauss_newton", "exact_kl"]

close = torch.testing.assert_close


def same(x):
    return x


# -- conjugate gradients ---------------------------------------------------------------------------------


@pytest.fixture
def system():
    """A symmetric, positive definite matrix of very different curvatures, in fp64, and a right-hand side."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.double))
    return (basis * torch.logspace(-3, 1, 30, dtype=torch.double)) @ basis.T, torch.randn(
        30, dtype=torch.double
    )


def solve(matrix, b, *, damping=0.0, diagonal=None, iterations=200, tolerance=1e-10):
    return conjugate_gradient(
        matrix.matmul, b, damping=damping, diagonal=diagonal, iterations=iterations, tolerance=tolerance
    )


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_solve(system, damping, preconditioned):
    matrix, b = system
    solution = solve(matrix, b, damping=damping, diagonal=matrix.diagonal() if preconditioned else None)
    assert solution.damping == pytest.approx(damping * float(b @ matrix @ b / (b @ b)))
    damped = matrix + solution.damping * torch.eye(30, dtype=torch.double)
    close(solution.x, torch.linalg.solve(damped, b), rtol=1e-5, atol=1e-6)
    close(solution.product, matrix @ solution.x, rtol=1e-6, atol=1e-8)
    assert solution.residual == pytest.approx(float((damped @ solution.x - b).norm() / b.norm()), abs=1e-9)


def test_conjugate_gradients_stop_at_the_tolerance_or_the_bound(system):
    matrix, b = system
    loose = solve(matrix, b, tolerance=0.3)
    assert loose.residual <= 0.3
    assert loose.iterations < solve(matrix, b).iterations
    assert solve(matrix, b, iterations=3).iterations == 3


def test_a_preconditioner_saves_iterations():
    matrix = torch.diag(torch.logspace(-2, 2, 50, dtype=torch.double))
    b = torch.ones(50, dtype=torch.double)
    plain = solve(matrix, b, tolerance=1e-3)
    scaled = solve(matrix, b, diagonal=matrix.diagonal(), tolerance=1e-3)
    assert plain.iterations > 60
    assert scaled.iterations < 20


def test_conjugate_gradients_of_zero_and_without_curvature():
    zero = torch.zeros(3)
    nothing = solve(torch.eye(3), zero)
    assert (nothing.x.tolist(), nothing.residual, nothing.iterations) == ([0, 0, 0], 0, 0)
    flat = solve(torch.zeros(3, 3), torch.ones(3))
    assert (flat.x.tolist(), flat.residual) == ([0, 0, 0], 1)
    unseen = solve(
        torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 1.0]), diagonal=torch.tensor([1.0, 0.0])
    )
    assert unseen.x.isfinite().all()


# -- the parts of a step, alone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_kl", "shrink", "taken"),
    [
        (0.3, 0.5, (0.5, 2, 0.5)),  # the full step gains nothing
        (0.1, 0.5, (0.25, 3, 0.25)),  # half of it is too far
        (0.1, 0.9, (0.0, 4, None)),
        (0.1, None, (1.0, 1, 1.0)),  # unchecked
    ],
)
def test_the_first_step_that_gains_within_the_bound_is_taken(max_kl, shrink, taken):
    """The loss is least half way, and the KL is the square of the step."""
    moved = []
    objective = SimpleNamespace(
        actor=SimpleNamespace(parameters=(), flat=lambda _: torch.zeros(1), move_to=moved.append),
        outcome=lambda new: Outcome(loss=abs(float(new) - 0.5), kl=float(new) ** 2),
    )
    line = None if shrink is None else LineSearch(4, shrink)
    region = TrustRegion(max_kl, "gauss_newton", 1.0, 10, 0.0, 0.0, "none", line, 1, 1)
    scale, tried, outcome = search(objective, Step(torch.ones(1), max_kl, 0.0), 0.5, region)
    assert (scale, tried, float(moved[0]) if moved else None) == taken
    assert outcome.loss == abs(scale - 0.5)


def test_a_subset_of_the_sequences_does_not_depend_on_the_number_of_processes():
    def taken(shares, share):
        found = []
        for rank, count in enumerate(shares):
            runtime = SimpleNamespace(
                rank=rank, world_size=len(shares), all_sum=lambda _: torch.tensor(shares)
            )
            step = NaturalStep(None, SimpleNamespace(runtime=runtime))
            rows, group = step.rows(SimpleNamespace(action_mask=torch.ones(count, 1).bool()), share)
            found += zip((rows + sum(shares[:rank])).tolist(), group.tolist(), strict=True)
        return found

    assert taken([12], 0.3) == taken([5, 7], 0.3) == taken([4, 4, 4], 0.3)
    assert len(taken([12], 0.3)) == 4
    assert [row for row, _ in taken([5, 7], 1.0)] == list(range(12))


# -- products with the Fisher matrix ---------------------------------------------------------------------


def sampled(policy, temperature=1.0) -> Rollout:
    with torch.no_grad():  # some completions end early, so that there is padding on the right as well
        policy.lm.get_output_embeddings().weight[policy.eos_id] *= 80
    noise = uniforms(0, TRAIN, 0, range(8), 10)
    rollout = CachedEngine(temperature, 10).sample(policy, PROMPTS, 2, noise)
    assert rollout.lengths.min() < rollout.lengths.max()
    return rollout


def actor_of(policy, temperature=1.0) -> Actor:
    return Actor(policy, tuple(policy.actor_parameters()), temperature)


def products(actor, rollout, kind, rows_a_piece=8) -> FisherProducts:
    pieces = [rollout.select(rows) for rows in torch.arange(len(rollout)).split(rows_a_piece)]
    return FisherProducts(actor, pieces, float(rollout.action_mask.sum()), kind, same)


def random_vector(actor, seed=0):
    count = sum(p.numel() for p in actor.parameters)
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["tiny_policy", "llama_policy"])
def policy(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_fisher_matrix(policy, kind):
    """F = mean over actions of sum_v p_v grad log p_v (grad log p_v)', for a few weights."""
    few = tuple(p for p in policy.actor_parameters() if p.numel() <= 32)[:3]
    actor = Actor(policy, few, 0.7)
    rollout = sampled(policy, temperature=0.7).select(torch.arange(2))
    rollout = rollout.replace(action_mask=rollout.action_mask & (torch.arange(rollout.tokens.shape[1]) < 2))
    logp = actor.log_distributions(rollout)
    with twice_differentiable(torch.device("cpu")):
        dense = torch.zeros(96, 96)
        for at_action in actor.log_distributions(rollout):
            every_word = torch.eye(len(at_action))
            rows = torch.autograd.grad(at_action, few, every_word, retain_graph=True, is_grads_batched=True)
            jacobian = torch.cat([row.flatten(1) for row in rows], dim=1)
            dense += jacobian.T @ (at_action.detach().exp()[:, None] * jacobian) / len(logp)
    v = random_vector(actor)
    close(products(actor, rollout, kind)(v), dense @ v, rtol=1e-3, atol=1e-4 * float((dense @ v).abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_products_tell_the_kl_of_a_small_move(policy, kind):
    actor, rollout = actor_of(policy), sampled(policy)
    v = random_vector(actor)
    curvature = float(v @ products(actor, rollout, kind)(v))
    size = 0.01 / curvature**0.5
    with torch.no_grad():
        old = actor.log_distributions(rollout)
        with actor.at(actor.flat(actor.parameters) + size * v):
            new = actor.log_distributions(rollout)
    measured = float(kl.exact(old, new).mean())
    assert measured == pytest.approx(0.5 * size**2 * curvature, rel=0.03)


def test_both_kinds_agree_and_micro_batches_change_nothing(policy):
    actor, rollout = actor_of(policy), sampled(policy)
    v = random_vector(actor)
    whole = products(actor, rollout, "gauss_newton")(v)
    for kind in KINDS:
        for rows_a_piece in (8, 3, 1):
            cut = products(actor, rollout, kind, rows_a_piece)(v)
            close(cut, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_products_are_symmetric_and_never_negative(policy):
    actor, rollout = actor_of(policy), sampled(policy)
    fisher = products(actor, rollout, "gauss_newton")
    u, v = random_vector(actor, 1), random_vector(actor, 2)
    assert float(u @ fisher(v)) == pytest.approx(float(v @ fisher(u)), rel=1e-3)
    assert float(u @ fisher(u)) == pytest.approx(fisher.curvature(u), rel=1e-3)
    assert fisher.curvature(u) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(policy, kind):
    actor, rollout = actor_of(policy), sampled(policy)
    wide = rollout.replace(
        **{
            name: torch.nn.functional.pad(getattr(rollout, name), (0, 5))
            for name in ("tokens", "action_mask", "logprobs", "values")
        },
        prompt_tokens=torch.nn.functional.pad(rollout.prompt_tokens, (4, 0), value=7),
    )
    v = random_vector(actor)
    total = float(rollout.action_mask.sum())
    expected = products(actor, rollout, kind)(v)
    padded = FisherProducts(actor, [wide], total, kind, same)(v)
    close(padded, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_weights_that_do_not_train_have_no_part(tiny_policy):
    tiny_policy.lm.transformer.h[0].requires_grad_(False)
    actor, rollout = actor_of(tiny_policy), sampled(tiny_policy)
    everything = sum(p.numel() for p in tiny_policy.lm.parameters())
    frozen = sum(p.numel() for p in tiny_policy.lm.transformer.h[0].parameters())
    v = random_vector(actor)
    assert len(v) == everything - frozen  # tied embeddings count once
    one, other = (products(actor, rollout, kind)(v) for kind in KINDS)
    close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


@pytest.mark.slow
def test_the_diagonal_is_that_of_the_fisher_matrix(tiny_policy):
    """Its sum over many rollouts. The estimate of one rollout is noisy, and is used only as a preconditioner."""
    small = tuple(p for p in tiny_policy.actor_parameters() if p.numel() == 32)[-2:]
    actor = Actor(tiny_policy, small, 1.0)
    count = sum(p.numel() for p in small)
    rollout = sampled(tiny_policy)
    fisher = products(actor, rollout, "gauss_newton")
    exact = sum(float(fisher(row) @ row) for row in torch.eye(count))
    estimates = []
    for iteration in range(20):
        noise = uniforms(0, TRAIN, iteration, range(8), 10)
        fresh = CachedEngine(1.0, 10).sample(tiny_policy, PROMPTS, 2, noise)
        groups = [[fresh.select(torch.tensor([row]))] for row in range(8)]
        estimates.append(float(fisher_diagonal(actor, groups, float(fresh.action_mask.sum()), same).sum()))
    mean = sum(estimates) / len(estimates)
    error = (sum((e - mean) ** 2 for e in estimates) / len(estimates) / (len(estimates) - 1)) ** 0.5
    assert mean == pytest.approx(exact, abs=4 * error + 0.05 * exact)


def test_temporary_weights_are_undone(tiny_policy):
    actor = actor_of(tiny_policy)
    before = [p.detach().clone() for p in actor.parameters]
    places = [p.data_ptr() for p in actor.parameters]
    with actor.at(torch.zeros(len(random_vector(actor)))):
        assert not any(p.any() for p in actor.parameters)
    assert all(torch.equal(p, b) for p, b in zip(actor.parameters, before, strict=True))
    assert [p.data_ptr() for p in actor.parameters] == places


# -- the step --------------------------------------------------------------------------------------------

SMALL = [
    *(
        "task=random_walks",
        "debug=fast",
        "iterations=1",
        "callbacks=none",
        "callbacks.checkpoint=null",
        "hardware=cpu",
    ),
    *("rollout.prompts=8", "rollout.max_new_tokens=6", "optim.critic_lr=1e-2"),
]


@pytest.fixture
def iterate(compose, tmp_path):
    """``iterate("algo=trpo")`` gives a module after one small iteration, and its weights before it."""

    def run(*overrides):
        from policylab.config.build import build

        (tmp_path / "run").mkdir(exist_ok=True)
        experiment = build(compose([*SMALL, *overrides]), tmp_path)
        module = experiment.module
        before = [p.detach().clone() for p in module.policy.parameters()]
        experiment.trainer.fit(module, datamodule=experiment.data)
        assert module.iteration == 1
        return module, before

    return run


@pytest.fixture
def prepared(compose, tmp_path):
    """A module of TRPO that has not trained, and a rollout with advantages: ``prepared("algo.update.damping=1")``."""

    def make(*overrides):
        from policylab.config.build import build

        return with_rollout(build(compose([*SMALL, "algo=trpo", *overrides]), tmp_path))

    return make


def with_rollout(experiment):
    """The experiment's module, its trainer attached, and a rollout of its policy."""
    module = experiment.module
    module.trainer = experiment.trainer
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.stepper.set_learning_rate()
    module.updater.ratio_max = torch.ones(())
    rollout = module.sampler.generate(experiment.data.train[:8], 2, TRAIN, range(16))
    random = torch.Generator().manual_seed(0)
    advantages = torch.randn(rollout.tokens.shape, generator=random).masked_fill(~rollout.action_mask, 0.0)
    returns = torch.rand(rollout.tokens.shape, generator=random).masked_fill(~rollout.action_mask, 0.0)
    return module, rollout.replace(advantages=advantages, returns=returns)


def moved(module, before):
    """The step of the actor's weights, flat."""
    old = dict(zip(map(id, module.policy.parameters()), before, strict=True))
    return torch.cat([(p.detach() - old[id(p)]).flatten() for p in module.policy.actor_parameters()])


def metrics_of(module):
    return means_of(module.recorder.totals(module.recorder.means))


def actor_weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.policy.actor_parameters()])


def step_of(module, rollout):
    """The change of the weights by one step of the policy, and the metrics."""
    before = actor_weights(module)
    module.updater.move_policy(rollout)
    return actor_weights(module) - before, metrics_of(module)


def cosine(a, b) -> float:
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("algo", quick(["trpo", "npg"], ["trpo"]))
def test_the_kl_is_what_was_predicted_and_within_the_bound(iterate, algo):
    module, before = iterate(f"algo={algo}", "algo.update.max_kl=1e-4", "algo.update.fisher_share=0.5")
    metrics = module.metrics
    assert metrics["train/kl_predicted"] == pytest.approx(1e-4 * metrics["train/step_scale"] ** 2, rel=1e-4)
    assert metrics["train/kl_measured"] == pytest.approx(metrics["train/kl_predicted"], rel=0.1)
    if algo == "trpo":
        assert metrics["train/kl_measured"] <= 1e-4
    assert metrics["train/surrogate_gain"] > 0
    assert 0 <= metrics["train/cg_residual"] < 1
    assert moved(module, before).any()


@pytest.mark.slow
def test_a_tiny_step_of_trpo_points_along_that_of_npg(iterate):
    tiny = "algo.update.max_kl=1e-5"
    trpo, npg = (moved(*iterate(f"algo={algo}", tiny)) for algo in ("trpo", "npg"))
    assert cosine(trpo, npg) > 0.9999


@pytest.mark.slow
def test_an_iteration_does_not_depend_on_the_micro_batch(iterate):
    whole = moved(*iterate("algo=trpo"))
    cut = moved(*iterate("algo=trpo", "optim.micro_batch_tokens=40"))
    other = moved(*iterate("algo=trpo", "seed=1"))
    close(cut, whole, rtol=1e-2, atol=1e-3 * float(whole.abs().max()))
    assert cosine(whole, other) < 0.9


@pytest.mark.slow
def test_how_products_are_taken_changes_nothing(prepared):
    exactly = ("algo.update.cg_iterations=200", "algo.update.cg_tolerance=1e-5")
    steps = [
        step_of(*prepared(f"algo.update.products={kind}", f"algo.update.preconditioner={scaled}", *exactly))[
            0
        ]
        for kind in KINDS
        for scaled in ("none", "diagonal")
    ]
    for step in steps[1:]:
        assert cosine(step, steps[0]) > 0.9999


def test_excluded_sequences_have_no_influence(prepared):
    module, rollout = prepared()
    kept = torch.arange(len(rollout)) % 3 > 0
    masked = rollout.replace(action_mask=rollout.action_mask & kept[:, None])
    with_masked, _ = step_of(module, masked)
    module, _ = prepared()
    without, _ = step_of(module, rollout.select(kept.nonzero().squeeze(-1)))
    close(with_masked, without, rtol=1e-3, atol=1e-4 * float(without.abs().max()))


def test_a_step_that_lowers_the_surrogate_is_refused_and_undone(prepared):
    module, rollout = prepared("algo.update.line_search.max_steps=3")
    natural = module.updater.natural_step

    def backwards(*args):
        step = natural(*args)
        return dataclasses.replace(step, vector=-step.vector)

    module.updater.natural_step = backwards
    step, metrics = step_of(module, rollout)
    assert not step.any()
    assert metrics["train/search_steps"] == 3
    assert metrics["train/step_scale"] == metrics["train/kl_measured"] == metrics["train/surrogate_gain"] == 0


def test_a_step_beyond_the_bound_is_shortened(prepared):
    module, rollout = prepared("algo.update.line_search.shrink=0.5")
    natural = module.updater.natural_step

    def too_far(*args):
        step = natural(*args)
        return dataclasses.replace(step, vector=2 * step.vector, kl=4 * step.kl)

    module.updater.natural_step = too_far
    step, metrics = step_of(module, rollout)
    assert step.any()
    assert metrics["train/step_scale"] <= 0.5
    assert metrics["train/kl_measured"] <= module.updater.settings.max_kl


@pytest.mark.parametrize("algo", quick(["trpo", "npg"], ["trpo"]))
def test_without_advantages_or_actions_nothing_moves(prepared, algo):
    module, rollout = prepared(f"algo={algo}")
    step, metrics = step_of(module, rollout.replace(advantages=torch.zeros_like(rollout.advantages)))
    assert not step.any()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["train/step_scale"] == metrics["train/search_steps"] == metrics["train/grad_norm"] == 0
    module, rollout = prepared(f"algo={algo}")
    step, metrics = step_of(module, rollout.replace(action_mask=torch.zeros_like(rollout.action_mask)))
    assert not step.any()
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(prepared):
    module, rollout = prepared()
    broken = rollout.replace(advantages=rollout.advantages / 0.0)
    before = actor_weights(module)
    with pytest.raises(NotFinite, match="the loss"):
        module.updater.move_policy(broken)
    assert torch.equal(actor_weights(module), before)


def test_the_critic_is_fitted_without_moving_the_policy(prepared):
    module, rollout = prepared("algo.update.critic_epochs=8")

    @torch.no_grad()
    def loss():
        return float(module.algorithm.value_loss(rollout, module.policy.values(rollout)).sum())

    policy, critic = actor_weights(module), loss()
    module.updater.fit_critic(rollout)
    assert torch.equal(actor_weights(module), policy)
    assert loss() < 0.9 * critic


@pytest.mark.slow
def test_without_a_critic_there_is_none_to_fit(iterate):
    module, before = iterate("algo=trpo", "algo/advantage=leave_one_out")
    assert module.policy.critic is None
    assert moved(module, before).any()
    assert "train/value_loss" not in module.metrics


@pytest.mark.slow
def test_mixed_precision_moves_within_the_bound(iterate):
    module, before = iterate("algo=trpo", "hardware.precision=bf16-mixed")
    assert moved(module, before).any()
    assert module.metrics["train/kl_measured"] <= module.updater.settings.max_kl


def test_weights_too_coarse_are_refused(compose, tmp_path):
    from policylab.config.build import build

    with pytest.raises(UserError, match=r"too small for torch\.bfloat16 weights"):
        build(compose([*SMALL, "algo=trpo", "model.dtype=bfloat16"]), tmp_path)


# -- bounds ----------------------------------------------------------------------------------------------


def test_bounds_are_held():
    with pytest.raises(UserError, match="shrink is 1"):
        LineSearch(10, 1.0)
    with pytest.raises(UserError, match="max_kl"):
        TrustRegion(0.0, "exact_kl", 1.0, 10, 0.1, 0.1, "none", None, 1, 1)
    assert LineSearch(3, 0.5).scales() == [1.0, 0.5, 0.25]
    assert math.isclose(sum(LineSearch(2, 0.8).scales()), 1.8)


def test_a_mixture_of_experts_takes_a_natural_step():
    """Grouped products have no forward-mode derivative; separate products of experts have one."""
    mixtral = {
        "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "num_local_experts": 4,
    }  # fmt: skip
    trace = train(small(preset("trpo"), {"model.architecture": mixtral, "iterations": 1}))
    assert trace.metrics[-1]["train/step_scale"] > 0
