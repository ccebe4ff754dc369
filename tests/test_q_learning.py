"""Q-learning on tokens: formulas by hand, optima by dynamic programming, the replay memory, and a whole run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from policylab.algorithms import (
    Boltzmann,
    Dueling,
    EpsilonGreedy,
    HardBackup,
    QLearning,
    Replay,
    SoftBackup,
    TargetNetwork,
)
from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError
from policylab.functional.advantages import actions_ahead, discounted_returns
from policylab.functional.behaviour import epsilon_greedy, greedy
from policylab.functional.q_learning import (
    LEVELS,
    n_step_targets,
    scale_gradient,
    taken,
    td_loss,
)
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import REPLAY, TRAIN, VALIDATION, uniforms
from policylab.rollouts.replay import Memory
from policylab.training.replay import ReplayMemory
from small_runs import quick

MASK = torch.tensor([[True, True, False, True, False]])
REWARDS = torch.tensor([[1.0, 2.0, 9.0, 4.0, 9.0]])  # 9: never looked at
VALUES = torch.tensor([[10.0, 20.0, 9.0, 30.0, 9.0]])
PATH = torch.tensor([[-1.0, -2.0, 9.0, -3.0, 9.0]])
NONE = torch.zeros(1, 5)
#: ``n_step``; the fast tests run only the general case.
STEPS = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(None, marks=pytest.mark.slow)]


def dqn(**changes) -> QLearning:
    parts = {
        "name": "test",
        "backup": HardBackup(double=True, corrected=False),
        "scale": 0.5,
        "dueling": Dueling("logsumexp", 1.0, 0),
        "gamma": 1.0,
        "n_step": 1,
        "huber": None,
        "conservative": 0.0,
        "exploration": Boltzmann(),
        "target": TargetNetwork(2, 1.0),
        "replay": Replay(1000, 1, 1, 4),
    }
    return QLearning(**(parts | changes))


# -- formulas by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "path", "gamma", "expected"),
    [
        (1, NONE, 0.5, [1 + 0.5 * 20, 2 + 0.5 * 30, 4]),
        (2, NONE, 0.5, [1 + 0.5 * 2 + 0.25 * 30, 2 + 0.5 * 4, 4]),
        (3, NONE, 0.5, [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]),
        (None, NONE, 1.0, [7, 6, 4]),
        (1, PATH, 0.5, [11, 17, 4]),  # nothing lies in between
        (2, PATH, 0.5, [1 + 0.5 * (2 + 2) + 0.25 * 30, 2 + 0.5 * (4 + 3), 4]),
        (None, PATH, 1.0, [1 + 4 + 7, 2 + 7, 4]),
        (9, NONE, 1.0, [7, 6, 4]),  # longer than the sequence: all of it
    ],
)
def test_targets_by_hand(n, path, gamma, expected):
    targets = n_step_targets(REWARDS, VALUES, path, MASK, gamma, n)
    torch.testing.assert_close(targets[MASK], torch.tensor(expected, dtype=torch.float32))
    assert not targets[~MASK].any()


def test_targets_to_the_end_are_returns():
    torch.testing.assert_close(
        n_step_targets(REWARDS, VALUES, NONE, MASK, 0.9, None), discounted_returns(REWARDS, MASK, 0.9)
    )


def test_corrected_targets_are_one_step_targets_plus_later_errors():
    """Q(lambda) with off-policy corrections at lambda 1, written as in its paper."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, path = torch.randn(3, 4, 6, generator=generator, dtype=torch.double)
    mask = torch.ones(4, 6, dtype=torch.bool)
    gamma, n = 0.9, 3
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    errors = rewards + gamma * following - (values + path)
    expected = rewards + gamma * following
    for k in range(1, n):
        expected[:, :-k] += gamma**k * errors[:, k:]
    torch.testing.assert_close(n_step_targets(rewards, values, path, mask, gamma, n), expected)


def test_actions_ahead_skips_what_is_masked():
    assert actions_ahead(VALUES, MASK, 1).tolist() == [[20, 30, 0, 0, 0]]
    assert actions_ahead(VALUES, MASK, 2).tolist() == [[30, 0, 0, 0, 0]]
    assert actions_ahead(VALUES, MASK, 7).tolist() == [[0, 0, 0, 0, 0]]


def test_value_of_a_state_by_hand():
    q = torch.tensor([[1.0, 3.0]], dtype=torch.double).log() * 2  # exp(q / 2): 1 and 3
    assert LEVELS["max"](q, 2.0).item() == pytest.approx(2 * math.log(3))
    assert LEVELS["mean"](q, 2.0).item() == pytest.approx(math.log(3))
    assert LEVELS["logsumexp"](q, 2.0).item() == pytest.approx(2 * math.log(4))
    assert taken(q, torch.tensor([0])).tolist() == [0.0]


def test_td_loss_by_hand():
    errors = torch.tensor([-3.0, 0.5, 1.0])
    assert td_loss(errors, None).tolist() == [4.5, 0.125, 0.5]
    assert td_loss(errors, 1.0).tolist() == [2.5, 0.125, 0.5]


def test_scale_gradient_changes_the_gradient_alone():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert y.tolist() == [2.0, 3.0]
    y.sum().backward()
    assert x.grad.tolist() == [0.25, 0.25]


def test_double_asks_the_online_network_which_and_the_target_how_much():
    online, target = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[1.0, 2.0, 5.0]])
    rollout = of_tokens(torch.tensor([[2]]))
    for double, corrected, value, path in (
        (True, False, 2.0, 0.0),
        (False, False, 5.0, 0.0),
        (True, True, 2.0, 3.0),
    ):
        algorithm = dqn(backup=HardBackup(double, corrected), scale=1.0, dueling=None)
        estimates = [algorithm.estimate(z, rollout, None) for z in (target, online)]
        # Corrected: Q of the token, 5, less the estimated value of the state, 2.
        assert [x.tolist() for x in algorithm.backup.bootstrap(*estimates)] == [[value], [path]]


@pytest.mark.parametrize("level", ["max", "mean", "logsumexp"])
def test_the_value_head_gives_the_level_of_q(level):
    """V = max Q, mean Q or scale logsumexp(Q / scale); the differences between tokens are the LM head's."""
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).repeat_interleave(5, 0)
    values = torch.tensor([3.0, -1.0]).repeat_interleave(5)  # two states, all five tokens
    rollout = of_tokens(torch.arange(5).repeat(2)[:, None])
    estimate = dqn(scale=0.7, dueling=Dueling(level, 1.0, 0)).estimate(z, rollout, values)
    q = estimate.q.reshape(2, 5)
    torch.testing.assert_close(LEVELS[level](q, 0.7), torch.tensor([3.0, -1.0]))
    torch.testing.assert_close(estimate.values.reshape(2, 5), q.amax(-1, keepdim=True).expand(2, 5))
    torch.testing.assert_close((q / 0.7).softmax(-1), z[::5].softmax(-1))  # the LM is the Boltzmann policy


def test_soft_value_is_that_of_q():
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).repeat_interleave(5, 0)
    values = torch.tensor([3.0, -1.0]).repeat_interleave(5)
    rollout = of_tokens(torch.arange(5).repeat(2)[:, None])
    estimate = dqn(backup=SoftBackup("uniform"), scale=0.7).estimate(z, rollout, values)
    torch.testing.assert_close(estimate.values, values)
    torch.testing.assert_close(
        0.7 * (estimate.q.reshape(2, 5) / 0.7).logsumexp(-1), torch.tensor([3.0, -1.0])
    )
    torch.testing.assert_close(estimate.advantages, 0.7 * taken(z.log_softmax(-1), rollout.tokens[:, 0]))


def test_without_dueling_the_scores_are_q():
    z = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    rollout = of_tokens(torch.arange(5)[:, None])
    for backup in (HardBackup(True, False), SoftBackup("uniform")):
        estimate = dqn(backup=backup, dueling=None).estimate(z, rollout, None)
        torch.testing.assert_close(estimate.q, 0.5 * z.diagonal())


def test_against_the_reference_an_untrained_policy_has_no_advantages():
    z = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(5)
    rollout = of_tokens(tokens[:, None]).replace(ref_logprobs=z.log_softmax(-1).diagonal()[:, None])
    estimate = dqn(backup=SoftBackup("reference")).estimate(z, rollout, torch.ones(5))
    torch.testing.assert_close(estimate.q, torch.ones(5))


@pytest.mark.parametrize("conservative", [0.0, 0.3])
def test_gradient_of_the_loss_is_that_of_a_policy_gradient_with_a_critic(conservative):
    """Soft backup: error x grad log pi, and coef x error for the value (arXiv:1704.06440, section 3)."""
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = torch.tensor([0.3], requires_grad=True)
    algorithm = dqn(
        backup=SoftBackup("uniform"), dueling=Dueling("logsumexp", 0.1, 0), conservative=conservative
    )
    rollout = of_tokens(torch.tensor([[2]]))
    estimate = algorithm.estimate(z, rollout, value)
    error = algorithm.errors(estimate, torch.ones(1, 1), rollout)
    algorithm.loss(estimate, error, rollout).sum().backward()
    torch.testing.assert_close(value.grad, 0.1 * error[0].detach())
    # The conservative term counts as an error of its own weight, for the logits alone.
    weight = error.item() - conservative
    (expected,) = torch.autograd.grad(z.log_softmax(-1)[0, 2] * weight, z)
    torch.testing.assert_close(z.grad, expected)


# -- exact optima ----------------------------------------------------------------------------------------

V, T = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [27, 3]; token 0 ends
ENDED = (SEQUENCES == 0).int()
ACTIONS = (ENDED.cumsum(-1) - ENDED) == 0
PREFIXES = {p: i for i, p in enumerate(p for n in range(T) for p in itertools.product(range(V), repeat=n))}
STATES = torch.tensor([[PREFIXES[tuple(s[:t])] for t in range(T)] for s in SEQUENCES.tolist()])
FIT = 150  # steps to fit one target
LIVE = sorted({int(s) for s in STATES[ACTIONS]})  # prefixes in which an action is taken


def world() -> tuple[Rollout, Tensor, Tensor]:
    """All 27 sequences with rewards of the part up to EOS, the reference's table, and a random table to start from."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V + 1, V + 1, V + 1, generator=generator, dtype=torch.double)
    visible = torch.where(ACTIONS, SEQUENCES, V)
    rewards = table[visible[:, 0], visible[:, 1], visible[:, 2]]
    reference, start = torch.randn(2, len(PREFIXES), V, generator=generator, dtype=torch.double)
    ref_logprobs = reference.log_softmax(-1)[STATES].gather(-1, SEQUENCES[..., None]).squeeze(-1)
    rollout = of_tokens(SEQUENCES, ACTIONS).replace(
        rewards=rewards, ref_logprobs=ref_logprobs.masked_fill(~ACTIONS, 0.0)
    )
    return rollout, reference, start


def optimal_q(rollout: Rollout, scale: float, log_prior: Tensor | None) -> Tensor:
    """Optimal Q ``[13, 3]`` by dynamic programming backwards from the last tokens. ``scale`` 0 is the hard maximum."""
    q = torch.full((len(PREFIXES), V), float("nan"), dtype=torch.double)
    rewards = {
        tuple(s[:n].tolist()): r for s, n, r in zip(SEQUENCES, ACTIONS.sum(-1), rollout.rewards, strict=True)
    }
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        if 0 in prefix:
            continue
        for token in range(V):
            after = (*prefix, token)
            if after in rewards:
                q[PREFIXES[prefix], token] = rewards[after]
            else:
                below = q[PREFIXES[after]]
                prior = 0.0 if log_prior is None else log_prior[PREFIXES[after]]
                soft = scale * ((below / scale if scale else below) + prior).logsumexp(-1)
                q[PREFIXES[prefix], token] = soft if scale else below.max()
    return q


def fitted(algorithm: QLearning, rollout: Rollout, start: Tensor, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """Score and value tables after several target networks, each fitted until convergence."""
    z = start.clone().requires_grad_()
    v = torch.zeros(len(PREFIXES), dtype=torch.double, requires_grad=True)
    states, parameters = STATES[ACTIONS], [z, v] if algorithm.dueling else [z]

    def values(of: Tensor) -> Tensor | None:
        return of[states] if algorithm.dueling else None

    for _ in range(rounds):
        old_z, old_v = z.detach().clone(), v.detach().clone()
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT)
        for _ in range(FIT):
            estimate = algorithm.estimate(z[states], rollout, values(v))
            with torch.no_grad():
                target = algorithm.estimate(old_z[states], rollout, values(old_v))
                targets = algorithm.targets(target, estimate, rollout)
            optimizer.zero_grad()
            algorithm.loss(estimate, algorithm.errors(estimate, targets, rollout), rollout).sum().backward()
            optimizer.step()
            schedule.step()
    return z.detach(), v.detach()


def learned_q(algorithm: QLearning, z: Tensor, v: Tensor) -> Tensor:
    """Q of every token in every reachable state, as the algorithm computes it from the tables."""
    states = torch.tensor(LIVE).repeat_interleave(V)
    rollout = of_tokens(torch.arange(V).repeat(len(LIVE))[:, None])
    reference = world()[1].log_softmax(-1)[LIVE].reshape(-1, 1)
    values = v[states] if algorithm.dueling else None
    return algorithm.estimate(z[states], rollout.replace(ref_logprobs=reference), values).q.reshape(-1, V)


@pytest.mark.parametrize(
    ("level", "double", "corrected", "n"),
    [
        pytest.param(None, False, False, 1, marks=pytest.mark.slow),
        pytest.param("max", True, False, 1, marks=pytest.mark.slow),
        pytest.param("mean", False, True, None, marks=pytest.mark.slow),
        ("logsumexp", True, True, 2),
    ],
)
def test_q_learning_finds_the_best_q(level, double, corrected, n):
    """From all sequences equally, most of them far from the best."""
    rollout, _, start = world()
    dueling = level and Dueling(level, 1.0, 0)
    algorithm = dqn(backup=HardBackup(double, corrected), dueling=dueling, n_step=n)
    q = learned_q(algorithm, *fitted(algorithm, rollout, start))
    torch.testing.assert_close(q, optimal_q(rollout, 0.0, None)[LIVE], atol=2e-2, rtol=0)


def test_uncorrected_steps_learn_what_the_sampling_policy_gets():
    """The documented bias of Rainbow's n-step targets: with n to the end, they are returns of the sampling policy."""
    rollout, _, start = world()
    algorithm = dqn(backup=HardBackup(False, False), dueling=None, n_step=None, target=None)
    q = learned_q(algorithm, *fitted(algorithm, rollout, start, rounds=1))
    first = torch.stack([rollout.rewards[SEQUENCES[:, 0] == token].mean() for token in range(V)])
    torch.testing.assert_close(q[0], first, atol=1e-3, rtol=0)
    assert (q - optimal_q(rollout, 0.0, None)[LIVE]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("n", STEPS)
def test_soft_q_finds_the_boltzmann_policy(n):
    rollout, _, start = world()
    algorithm = dqn(backup=SoftBackup("uniform"), dueling=None, n_step=n)
    z, v = fitted(algorithm, rollout, start)
    best = optimal_q(rollout, 0.5, None)[LIVE]
    torch.testing.assert_close(learned_q(algorithm, z, v), best, atol=1e-2, rtol=0)
    torch.testing.assert_close(z[LIVE].softmax(-1), (best / 0.5).softmax(-1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("n", STEPS)
def test_soft_q_with_the_reference_finds_the_kl_regularised_optimum(n):
    """Over whole sequences: ``reference * exp(reward / scale) / Z``, and V of the first state is ``scale log Z``."""
    rollout, reference, _ = world()
    algorithm = dqn(backup=SoftBackup("reference"), n_step=n)
    z, v = fitted(algorithm, rollout, reference)
    log_ref = rollout.ref_logprobs.sum(-1)
    log_pi = (
        z.log_softmax(-1)[STATES]
        .gather(-1, SEQUENCES[..., None])
        .squeeze(-1)
        .masked_fill(~ACTIONS, 0.0)
        .sum(-1)
    )
    spare = torch.tensor(V, dtype=torch.double).log() * (T - ACTIONS.sum(-1))  # rows with one visible part
    log_z = (log_ref + rollout.rewards / 0.5 - spare).logsumexp(0)
    torch.testing.assert_close(log_pi, log_ref + rollout.rewards / 0.5 - log_z, atol=2e-2, rtol=0)
    torch.testing.assert_close(v[0], 0.5 * log_z, atol=1e-2, rtol=0)


# -- exploration, and what makes no sense ----------------------------------------------------------------


def test_epsilon_greedy_by_hand():
    logp = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).log()
    uniform, policy = torch.tensor([[[0.05, 0.85, 0.05, 0.05]], [[0.02, 0.92, 0.04, 0.02]]])
    torch.testing.assert_close(epsilon_greedy(logp, 0.2, "uniform").exp(), uniform)
    torch.testing.assert_close(epsilon_greedy(logp, 0.2, "policy").exp(), policy)
    torch.testing.assert_close(epsilon_greedy(logp, 0.0, "uniform"), greedy(logp))
    torch.testing.assert_close(epsilon_greedy(logp, 1.0, "policy"), logp)


def test_epsilon_falls_linearly_and_stays():
    exploration = EpsilonGreedy("uniform", 0.5, 0.1, 4)
    assert [exploration.epsilon(i) for i in (0, 1, 2, 4, 9)] == pytest.approx([0.5, 0.4, 0.3, 0.1, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backup": SoftBackup("reference"), "dueling": None}, "does not set the level of Q"),
        (
            {"backup": SoftBackup("uniform"), "exploration": EpsilonGreedy("uniform", 1, 0, 1)},
            "never follows it",
        ),
        ({"backup": SoftBackup("uniform"), "dueling": Dueling("max", 1, 0)}, "level=logsumexp"),
        ({"n_step": None}, "uses no network's values"),
        ({"target": None}, "needs two networks"),
        ({"scale": 0.0}, "algo.scale is 0.0; it must be above 0"),
    ],
)
def test_senseless_combinations_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dqn(**changes)


def test_a_target_network_that_does_not_lag_is_refused():
    with pytest.raises(UserError, match="algo/target=none, which saves it"):
        TargetNetwork(1, 1.0)


def test_bounds():
    for wrong in (
        lambda: EpsilonGreedy("uniform", 2, 0, 1),
        lambda: Dueling("logsumexp", 0.0, 0),
        lambda: Dueling("logsumexp", 1.0, -1),
        lambda: TargetNetwork(0, 1.0),
        lambda: TargetNetwork(1, 0.0),
        lambda: EpsilonGreedy("uniform", 0, 0, 0),
        lambda: Replay(0, 1, 1, 1),
    ):
        with pytest.raises(UserError, match="it must be"):
            wrong()


def test_a_memory_that_could_never_warm_up_is_refused(compose, tmp_path):
    from policylab.config.build import build

    with pytest.raises(UserError, match=r"algo\.replay\.capacity=100 tokens may not hold 128 sequences"):
        build(compose(["algo=dqn", "algo.replay.capacity=100"]), tmp_path)


# -- the memory ------------------------------------------------------------------------------------------

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]


@pytest.fixture
def sampled(tiny_policy) -> Rollout:
    """Eight completions of different lengths, with rewards and reference log-probs."""
    with torch.no_grad():
        tiny_policy.lm.get_output_embeddings().weight[tiny_policy.eos_id] *= 80
    rollout = CachedEngine(1.0, 10).sample(tiny_policy, PROMPTS, 2, uniforms(0, TRAIN, 0, range(8), 10))
    assert len(rollout.lengths.unique()) > 2
    return rollout.replace(rewards=torch.linspace(-1, 1, 8), ref_logprobs=rollout.logprobs * 2)


def test_the_memory_returns_the_stored_sequences(sampled):
    memory = Memory.of(sampled, 3)
    assert len(memory.tokens) == int((sampled.prompt_lengths + sampled.lengths).sum())
    rows = torch.tensor([5, 0, 5])
    back, expected = memory.rollout(rows), sampled.select(rows)
    for name in (
        *("prompt_tokens", "prompt_lengths", "tokens", "lengths", "action_mask", "ended"),
        *("prompt_ids", "logprobs", "ref_logprobs", "rewards"),
    ):
        assert torch.equal(getattr(back, name), getattr(expected, name)), name
    assert memory.iterations.tolist() == [3] * 8


def test_the_oldest_leave_first_and_the_bound_holds(sampled):
    sizes = (sampled.prompt_lengths + sampled.lengths).tolist()
    capacity = sum(sizes) + sum(sizes[5:])
    halves = [sampled.select(rows) for rows in torch.arange(8).split(4)]  # of two processes
    memory = Memory.empty().join([Memory.of(sampled, 0)]).newest(capacity)
    memory = memory.join(Memory.of(half, 1) for half in halves).newest(capacity)
    assert len(memory.tokens) == capacity
    assert memory.iterations.tolist() == [0] * 3 + [1] * 8
    last = memory.rollout(torch.tensor([0]))
    assert torch.equal(last.tokens[0], sampled.tokens[5, : int(sampled.lengths[5])])
    assert len(memory.newest(capacity - 1).tokens) == capacity - sizes[5]


def test_every_sequence_is_drawn_and_none_beyond(sampled):
    memory = Memory.of(sampled, 0)
    drawn = memory.draw(uniforms(0, REPLAY, 0, [0], 500)[0])
    assert drawn.unique().tolist() == list(range(8))
    assert memory.draw(torch.tensor([0.0, 1 - 1e-16], dtype=torch.double)).tolist() == [0, 7]


@pytest.mark.parametrize("capacity", [10_000, 1])
def test_the_memory_is_saved_as_plain_tensors(sampled, tmp_path, capacity):
    """A smaller memory keeps as many of them as it can hold."""
    runtime, progress = SimpleNamespace(gather=lambda item: [item]), SimpleNamespace(iteration=0)
    parts = SimpleNamespace(seed=0, runtime=runtime, recorder=None, progress=progress)
    memories = [ReplayMemory(Replay(size, 1, 1, 1), None, parts) for size in (10_000, capacity)]
    memories[0].add(sampled)
    torch.save(memories[0].state(), tmp_path / "memory.pt")
    memories[1].load(torch.load(tmp_path / "memory.pt", weights_only=True))
    before, after = (memory.memory for memory in memories)
    for name, value in before.newest(capacity).state().items():
        assert torch.equal(value, after.state()[name]), name


def test_values_do_not_depend_on_padding(tiny_policy, sampled):
    """Scores of a sequence are the same alone and in a batch with longer ones."""
    together = tiny_policy.scores_of(sampled, 0.7)
    alone = [tiny_policy.scores_of(sampled.select(torch.tensor([row])), 0.7) for row in range(8)]
    for part in (0, 1):
        torch.testing.assert_close(
            together[part], torch.cat([scores[part] for scores in alone]), atol=1e-5, rtol=1e-4
        )


# -- a whole run -----------------------------------------------------------------------------------------

BRIEF = [
    *("debug=fast", "task=random_walks", "algo.replay.batch_size=8", "optim.lr=1e-3", "hardware=cpu"),
    *("callbacks=none", "callbacks.checkpoint=null"),
]
NAMES = ("dqn", "soft_q")


def trained(compose, tmp_path, *overrides):
    """The module after a brief run."""
    from policylab.config.build import build

    (tmp_path / "run").mkdir(exist_ok=True)
    experiment = build(compose([*BRIEF, *overrides]), tmp_path)
    experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    return experiment.module


def flat(policy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_updates_do_not_depend_on_the_micro_batch(compose, tmp_path, name):
    whole = flat(trained(compose, tmp_path, f"algo={name}").policy)
    cut = flat(trained(compose, tmp_path, f"algo={name}", "optim.micro_batch_tokens=40").policy)
    other = flat(trained(compose, tmp_path, f"algo={name}", "seed=1").policy)
    assert (whole - cut).abs().max() < 2e-4  # AdamW enlarges the rounding of tiny gradients
    assert (whole - other).abs().max() > 1e-3


@pytest.mark.slow
def test_the_target_network_follows(compose, tmp_path):
    still = trained(compose, tmp_path, "algo=dqn", "algo.target.every=100")
    start = trained(compose, tmp_path, "algo=dqn", "algo.target.every=100", "optim.lr=0")
    assert torch.equal(flat(still.target), flat(start.policy))
    assert still.replay.updates == 8  # two iterations of four
    copied = trained(compose, tmp_path, "algo=dqn", "algo.target.every=4", "algo.target.rate=1")
    assert torch.equal(flat(copied.target), flat(copied.policy))
    half = trained(compose, tmp_path, "algo=dqn", "algo.target.every=8", "algo.target.rate=0.5")
    torch.testing.assert_close(flat(half.target), (flat(half.policy) + flat(start.policy)) / 2)
    assert not any(p.requires_grad for p in half.target.parameters())


@pytest.mark.slow
def test_learning_waits_for_the_warm_up(compose, tmp_path):
    module = trained(compose, tmp_path, "algo=dqn", "algo.replay.warmup=9")
    assert module.replay.updates == 4  # eight sequences after the first iteration, sixteen after the second
    assert "train/loss" in module.metrics


@pytest.mark.slow
def test_epsilon_rules_training_and_the_best_token_validation(compose, tmp_path):
    exploring = ["algo/exploration=epsilon", "algo.exploration.start=0.5", "algo.exploration.others=uniform"]
    module = trained(compose, tmp_path, "algo=dqn", *exploring)
    epsilon = module.algorithm.exploration.epsilon(1)
    assert module.metrics["train/epsilon"] == pytest.approx(epsilon)
    lowest = math.log(epsilon / module.policy.lm.config.vocab_size)  # of a token that is not the best
    assert float(module.rollout.logprobs.min()) == pytest.approx(lowest, abs=1e-4)
    again = [module.sampler.generate(PROMPTS, 1, VALIDATION, range(4)) for _ in range(2)]
    assert not again[0].logprobs.any()  # certain
    assert torch.equal(again[0].tokens, again[1].tokens)


@pytest.mark.parametrize("name", quick(NAMES, ["dqn"]))
def test_every_metric_is_in_the_glossary(compose, tmp_path, name):
    glossary = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    module = trained(
        compose, tmp_path, f"algo={name}", "algo/exploration=epsilon" if name == "dqn" else "seed=0"
    )
    missing = [
        metric for metric in module.metrics if f"`{metric}`" not in glossary and "/reward/" not in metric
    ]
    assert not missing
    assert {"train/q_mean", "train/td_error", "train/target_mean", "train/replay_tokens", "train/kl"} <= set(
        module.metrics
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_one_that_went_through(compose, tmp_path, name):
    """Weights, target network, memory and metrics, bit for bit; the memory is full, so its order matters."""
    from policylab.config.settle import settle
    from policylab.launch.run import train
    from policylab.runs.command import with_command_of
    from policylab.runs.metrics_file import read_rows

    folder = tmp_path / "run"

    def run(*words: str) -> Path:
        folder.mkdir(exist_ok=True)
        command = with_command_of(list(words))
        train(settle(compose(command)), folder, command)
        return folder

    def state(where: Path) -> dict[str, Tensor]:
        checkpoint = torch.load(where / "checkpoints" / "last.ckpt", weights_only=True)
        return {**checkpoint["state_dict"], **checkpoint["policylab"]["replay"]}

    def figures(where: Path) -> list[dict[str, float]]:
        rows = read_rows(where / "metrics.csv")
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]

    options = [*BRIEF[:-1], "callbacks.checkpoint.export=false", f"algo={name}", "algo.replay.capacity=100"]
    options += ["algo/target=polyak", "algo.target.every=3"] if name == "dqn" else []
    through = run(*options, "validation.every=2", "iterations=4").rename(tmp_path / "through")
    run(*options, "validation.every=2", "iterations=2")
    resumed = run(f"resume={folder}", "iterations=4")
    expected, found = state(through), state(resumed)
    assert expected.keys() == found.keys()
    assert any(key.startswith("target.") for key in expected) == (name == "dqn")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(found["lengths"]) < 4 * 8  # some have left
    assert figures(through) == figures(resumed)


def of_tokens(tokens: Tensor, mask: Tensor | None = None) -> Rollout:
    """A rollout of these tokens with only the required fields."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    n = len(tokens)
    return Rollout(
        prompt_tokens=torch.zeros(n, 1, dtype=torch.long),
        prompt_lengths=torch.ones(n, dtype=torch.long),
        tokens=tokens,
        lengths=mask.sum(-1),
        action_mask=mask,
        ended=torch.ones(n, dtype=torch.bool),
        group_ids=torch.zeros(n, dtype=torch.long),
        prompt_ids=torch.zeros(n, dtype=torch.long),
        logprobs=torch.zeros(tokens.shape),
    )
