"""A world so small that every completion can be listed: expectations are sums, not samples.

Vocabulary 3, length 3, and token 0 ends: the 27 strings of three tokens are 15 different completions of the one
prompt. The policy is a table of logits, one row for each prefix that can be continued. Algorithms use the same objects
as in training. The expectation over batches is a sum over multisets of completions, each times its number of orders,
which equals the sum over all ordered batches.

Axes: ``C`` completions, ``T`` positions, ``S`` prefixes, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from policylab.algorithms import (
    Advantage,
    Algorithm,
    Critic,
    FixedCoefficient,
    FrozenReference,
    KLPenalty,
    LogProb,
    MinibatchEpochs,
    NoPenalty,
    SequenceSum,
    SingleStep,
)
from policylab.algorithms.reduction import Reduction
from policylab.algorithms.surrogate import Surrogate
from policylab.data.rollout import Evaluation, Rollout
from policylab.functional import kl

VOCABULARY, LENGTH, END = 3, 3, 0
#: Prefixes after which a token is chosen: those without an end.
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
COMPLETIONS = [
    *((*prefix, END) for prefix in PREFIXES),
    *((*prefix, last) for prefix in PREFIXES if len(prefix) == LENGTH - 1 for last in range(1, VOCABULARY)),
]


def _grid(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


TOKENS = _grid([list(c) for c in COMPLETIONS])  # [C, T]
LENGTHS = torch.tensor([len(c) for c in COMPLETIONS])
MASK = torch.arange(LENGTH) < LENGTHS[:, None]  # [C, T]
STATES = _grid(
    [[PREFIXES.index(c[:t]) for t in range(len(c))] for c in COMPLETIONS]
)  # [C, T], 0 outside the mask
VISITS = torch.zeros(len(COMPLETIONS), len(PREFIXES)).scatter_add_(1, STATES, MASK.float()).double()  # [C, S]

NO_PENALTY = NoPenalty(FrozenReference())


def one_process(x: Tensor) -> Tensor:
    """The sum over processes, for a single one."""
    return x


@dataclass(frozen=True)
class World:
    """The sampling policy, the trained policy, and the rewards of completions. All in float64."""

    logits: Tensor  #: [S, V] of the policy that is trained; has a gradient
    ref_logits: Tensor  #: [S, V] of the reference
    rewards: Tensor  #: [C]
    values: Tensor  #: [S] what the critic says
    sampler: Tensor | None = None  #: [S, V] of the policy that samples; None: the one that is trained

    @classmethod
    def random(cls, seed: int = 0) -> World:
        """Everything drawn from a standard normal distribution, so that nothing holds by symmetry."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        states = (len(PREFIXES), VOCABULARY)
        return cls(draw(*states).requires_grad_(), draw(*states), draw(len(COMPLETIONS)), draw(len(PREFIXES)))

    def replace(self, **changes: Tensor) -> World:
        """The same world with these changes."""
        return replace(self, **changes)

    @property
    def sampling_logits(self) -> Tensor:
        return (self.logits if self.sampler is None else self.sampler).detach()

    def true_values(self) -> Tensor:
        """Expected reward of the policy after each prefix, ``[S]``: a perfect critic."""
        reached = probabilities(self.logits.detach())[:, None] * VISITS
        return (reached * self.rewards[:, None]).sum(0) / reached.sum(0)

    def action_values(self, values: Tensor) -> Tensor:
        """Reward of an action that ends, and value of the prefix that another leads to, ``[S, V]``."""
        next_states = [[(*p, token) for token in range(VOCABULARY)] for p in PREFIXES]
        return torch.stack(
            [
                torch.stack(
                    [
                        self.rewards[COMPLETIONS.index(n)] if n in COMPLETIONS else values[PREFIXES.index(n)]
                        for n in row
                    ]
                )
                for row in next_states
            ]
        )

    def greedy_reward(self) -> Tensor:
        """Reward of the completion that takes the likeliest token each time."""
        prefix: tuple[int, ...] = ()
        while prefix not in COMPLETIONS:
            prefix = (*prefix, int(self.logits[PREFIXES.index(prefix)].argmax()))
        return self.rewards[COMPLETIONS.index(prefix)]

    def table(self) -> Rollout:
        """All completions, one row each, with all fields that any algorithm needs."""
        sampling, policy = self.sampling_logits, self.logits.detach()
        exact = kl.exact(sampling.log_softmax(-1), self.ref_logits.log_softmax(-1))
        every = len(COMPLETIONS)
        return Rollout(
            prompt_tokens=torch.zeros(every, 1, dtype=torch.long),
            prompt_lengths=torch.ones(every, dtype=torch.long),
            tokens=TOKENS,
            lengths=LENGTHS,
            action_mask=MASK,
            ended=torch.ones(every, dtype=torch.bool),
            group_ids=torch.zeros(every, dtype=torch.long),
            prompt_ids=torch.zeros(every, dtype=torch.long),
            logprobs=logprobs_of(sampling),
            policy_logprobs=logprobs_of(policy),
            ref_logprobs=logprobs_of(self.ref_logits),
            values=self.values[STATES].masked_fill(~MASK, 0.0),
            exact_kl=exact[STATES].masked_fill(~MASK, 0.0),
            rewards=self.rewards,
            greedy_rewards=self.greedy_reward().expand(every),
        )


def logprobs_of(logits: Tensor) -> Tensor:
    """Log-probs ``[C, T]`` of every token, zero where a completion has ended."""
    logp = logits.log_softmax(-1)[STATES].gather(-1, TOKENS[..., None]).squeeze(-1)
    return logp.masked_fill(~MASK, 0.0)


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities of the completions, ``[C]``."""
    return logprobs_of(logits).sum(-1).exp()


def occupancy(logits: Tensor) -> Tensor:
    """Probability that a completion passes through each prefix, ``[S]``."""
    return probabilities(logits) @ VISITS


def penalty(beta: float, place: str = "reward", estimator: str = "k1") -> KLPenalty:
    """The KL to the world's reference with a fixed coefficient."""
    return KLPenalty(place, estimator, FixedCoefficient(beta), FrozenReference())  # type: ignore[arg-type]


def algorithm(
    advantage: Advantage,
    surrogate: Surrogate = LogProb(),  # noqa: B008
    reduction: Reduction = SequenceSum(constant=1.0),  # noqa: B008
    kl: KLPenalty | NoPenalty = NO_PENALTY,
) -> Algorithm:
    """By default the loss whose gradient is the policy gradient itself."""
    return Algorithm(
        name="enumerated",
        advantage=advantage,
        surrogate=surrogate,
        reduction=reduction,
        kl=kl,
        # Refused if bounds have no effect; the enumeration computes one gradient, whatever the update.
        update=SingleStep() if surrogate.on_policy else MinibatchEpochs(2, 1, None, False),
        critic=Critic(0.0, None, 0, None),
        sampling=None,
        truncation=None,
        importance=None,
        entropy_coef=0.0,
    )


@cache
def batches(size: int) -> tuple[Tensor, Tensor]:
    """Every multiset of completions of this size, ``[N, size]``, and in how many orders it can be drawn, ``[N]``."""
    sets = list(itertools.combinations_with_replacement(range(len(COMPLETIONS)), size))
    same = [math.prod(math.factorial(count) for count in Counter(rows).values()) for rows in sets]
    return torch.tensor(sets), math.factorial(size) / torch.tensor(same, dtype=torch.double)


def loss_of(algo: Algorithm, world: World, rollout: Rollout, logits: Tensor, rows: Tensor) -> Tensor:
    """The loss that the algorithm gives to a policy for the rows of a rollout that are its batch."""
    coefficient = algo.kl.controller.initial
    columns = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    rollout = Rollout(**{name: x[rows] if isinstance(x, Tensor) else x for name, x in columns.items()})
    rollout = algo.estimate_advantages(algo.shape_rewards(rollout, coefficient), one_process)
    rollout = algo.correct_sampler(rollout)
    logprobs = logprobs_of(logits)[rows]
    exact = kl.exact(logits.log_softmax(-1), world.ref_logits.log_softmax(-1))[STATES][rows]
    mask = rollout.loss_mask
    evaluation = Evaluation(
        logprobs, torch.zeros_like(logprobs), rollout.values, exact.masked_fill(~mask, 0.0)
    )
    loss = algo.loss(algo.loss_terms(rollout, evaluation), coefficient)
    return algo.reduction(loss, mask, algo.reduction.denominator(mask).double())


def gradients(algo: Algorithm, world: World, size: int) -> tuple[Tensor, Tensor]:
    """Probability ``[N]`` and ascent direction ``[N, S, V]`` of every batch of this size."""
    rollout = world.table()
    if not algo.recomputes_logprobs(exact=True):
        rollout = rollout.replace(policy_logprobs=None)
    rows, orders = batches(size)

    def ascent(batch: Tensor) -> Tensor:
        return -torch.func.grad(lambda logits: loss_of(algo, world, rollout, logits, batch))(
            world.logits.detach()
        )

    return orders * probabilities(world.sampling_logits)[rows].prod(-1), torch.vmap(ascent)(rows)


def expected_gradient(algo: Algorithm, world: World, size: int) -> Tensor:
    """Expected ascent direction ``[S, V]`` over all batches of this size."""
    weights, directions = gradients(algo, world, size)
    return torch.einsum("n,nsv->sv", weights, directions)


def true_gradient(world: World, beta: float = 0.0) -> Tensor:
    """Gradient of ``E[reward] - beta KL(policy | reference)``, by automatic differentiation of the sum, ``[S, V]``."""
    p = probabilities(world.logits)
    log_ratio = (logprobs_of(world.logits) - logprobs_of(world.ref_logits)).sum(-1)
    (gradient,) = torch.autograd.grad((p * (world.rewards - beta * log_ratio)).sum(), world.logits)
    return gradient
