"""The Fisher matrix of a policy, used only through its products with vectors.

``F`` is the Hessian of the mean KL(old | new) over actions, at new = old. With ``J`` the Jacobian of the log-probs of
all tokens at an action and ``p`` their probabilities, ``F = mean J' diag(p) J``. This needs no second derivative of the
network, because the gradient of the KL with respect to the logits is zero at new = old.

Axes: ``n`` weights, ``N`` actions, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from policylab.data.rollout import Rollout
from policylab.functional import kl
from policylab.functional.logprobs import token_logprobs
from policylab.functional.masks import AllSum
from policylab.models.policy import Policy

#: Number of gradients whose squares estimate the diagonal; its relative error is about sqrt(2 / GROUPS).
GROUPS = 16

Product = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]


@dataclass(frozen=True)
class Actor:
    """The policy's trainable weights, without the critic's, as one vector."""

    policy: Policy
    parameters: tuple[nn.Parameter, ...]  #: those with a gradient; a shared one is listed once
    temperature: float

    def flat(self, tensors: Sequence[Tensor | None]) -> Float[Tensor, " n"]:
        """Concatenates one tensor per weight into one fp32 vector; None counts as zeros."""
        pairs = zip(self.parameters, tensors, strict=True)
        return torch.cat([(torch.zeros_like(p) if x is None else x).detach().flatten() for p, x in pairs])

    def split(self, vector: Float[Tensor, " n"]) -> list[Tensor]:
        """Views of the vector in the shapes of the weights."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for p, part in zip(self.parameters, parts, strict=True)]

    @contextmanager
    def at(self, weights: Float[Tensor, " n"]) -> Iterator[None]:
        """While active, the policy has other weights; its own are restored afterwards. Nothing is copied."""
        own = [p.data for p in self.parameters]
        try:
            for parameter, other in zip(self.parameters, self.split(weights), strict=True):
                parameter.data = other
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    @torch.no_grad()
    def move_to(self, weights: Float[Tensor, " n"]) -> None:
        """Overwrites the weights."""
        for parameter, new in zip(self.parameters, self.split(weights), strict=True):
            parameter.copy_(new)

    def log_distributions(self, rollout: Rollout) -> Float[Tensor, "N V"]:
        """Log-probs of the whole vocabulary at each action."""
        return self.policy.log_distributions(rollout, self.temperature)

    def gradient(
        self, output: Tensor, weight: Tensor | None = None, *, keep: bool = False
    ) -> Float[Tensor, " n"]:
        """Gradient of ``sum(output * weight)`` by the weights. Never runs the hooks that average over processes."""
        return self.flat(
            torch.autograd.grad(output, self.parameters, weight, retain_graph=keep, allow_unused=True)
        )


@dataclass
class FisherProducts:
    """``v -> F v`` over some sequences of all processes, one micro-batch at a time.

    The graph of a single micro-batch is kept between products. With several micro-batches each graph is rebuilt, so
    that memory does not grow with the number of sequences.
    """

    actor: Actor
    pieces: Sequence[Rollout]  #: this process's micro-batches
    actions: float  #: number of actions in the pieces of all processes
    kind: Literal["gauss_newton", "exact_kl"]  #: see :class:`~policylab.algorithms.TrustRegion`
    all_sum: AllSum

    def __post_init__(self) -> None:
        self.of_piece = {"gauss_newton": gauss_newton, "exact_kl": exact_kl}[self.kind]
        self._kept: Product | None = None

    def __call__(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        total = torch.zeros_like(v)
        with twice_differentiable(v.device):
            if len(self.pieces) == 1:
                self._kept = self._kept or self.of_piece(self.actor, self.pieces[0])
                total += self._kept(v)
            else:
                for piece in self.pieces:
                    total += self.of_piece(self.actor, piece)(v)
        return self.all_sum(total / self.actions)

    def curvature(self, v: Float[Tensor, " n"]) -> float:
        """``v F v``: the variance of ``J v`` under the policy, at half the cost of a product."""
        if self.kind == "exact_kl":
            return float(v @ self(v))
        total = torch.zeros((), device=v.device)
        with twice_differentiable(v.device):
            for piece in self.pieces:
                logp, tangent = _Words(self.actor).moved(piece, v)
                total += (logp.exp() * tangent**2).sum()
        return float(self.all_sum(total)) / self.actions


def gauss_newton(actor: Actor, rollout: Rollout) -> Product:
    """``v -> sum J' diag(p) J v``: ``J v`` by forward-mode differentiation, the rest by one backward pass.

    "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Schraudolph 2002, section 3.
    """
    logp = actor.log_distributions(rollout)
    words = _Words(actor)

    def product(v: Tensor) -> Tensor:
        _, tangent = words.moved(rollout, v)
        return actor.gradient(logp, logp.detach().exp() * tangent, keep=True)

    return product


def exact_kl(actor: Actor, rollout: Rollout) -> Product:
    """``v -> d/dw (dKL/dw . v)``, two backward passes through KL(old | new), as arXiv:1502.05477, appendix C.1."""
    logp = actor.log_distributions(rollout)
    old = logp.detach()
    slopes = torch.autograd.grad(
        kl.exact(old, logp).sum(), actor.parameters, create_graph=True, allow_unused=True
    )
    used = [(slope, i) for i, slope in enumerate(slopes) if slope is not None]

    def product(v: Tensor) -> Tensor:
        parts = actor.split(v)
        outputs, weights = [slope for slope, _ in used], [parts[i] for _, i in used]
        return actor.flat(
            torch.autograd.grad(outputs, actor.parameters, weights, retain_graph=True, allow_unused=True)
        )

    return product


def fisher_diagonal(
    actor: Actor, groups: Sequence[Sequence[Rollout]], actions: float, all_sum: AllSum
) -> Float[Tensor, " n"]:
    """An estimate of ``F``'s diagonal from squared scores, at the cost of one gradient.

    Given the tokens before it, the score of a sampled token has mean zero and covariance ``J' diag(p) J``. So scores of
    different actions are uncorrelated, and the squared sum of scores has the sum of their squares as its mean. Each
    group gives one such sum. "A Natural Policy Gradient", Kakade 2001, section 2; the diagonal as a preconditioner as
    in "Deep learning via Hessian-free optimization", Martens 2010, section 4.7.

    Args:
        groups: this process's micro-batches of each group; all processes have the same number of groups.
        actions: number of actions in all groups of all processes.
    """
    like = actor.flat([None] * len(actor.parameters))
    total = like.clone()
    for pieces in groups:
        score = like.clone()
        for piece in pieces:
            words = piece.tokens[piece.action_mask]
            score += actor.gradient(token_logprobs(actor.log_distributions(piece), words).sum())
        total += all_sum(score) ** 2
    return total / actions


@contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Attention with the derivatives that fused kernels lack, in full precision: CG needs a symmetric matrix."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
        yield


class _Words(nn.Module):
    """The actor's log-distributions as a module, for ``functional_call`` with other weights."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.policy = actor.policy
        self.actor = actor
        position = {id(p): i for i, p in enumerate(actor.parameters)}
        self.names = {position[id(p)]: name for name, p in self.named_parameters() if id(p) in position}

    def forward(self, rollout: Rollout) -> Tensor:
        return self.actor.log_distributions(rollout)

    def moved(
        self, rollout: Rollout, v: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
        """Log-probs of the whole vocabulary, and ``J v``: how they change as the weights move along ``v``."""
        with torch.no_grad(), forward_ad.dual_level():
            duals = {
                self.names[i]: forward_ad.make_dual(p.detach(), part)
                for i, (p, part) in enumerate(zip(self.actor.parameters, self.actor.split(v), strict=True))
            }
            logp, tangent = forward_ad.unpack_dual(functional_call(self, duals, (rollout,), tie_weights=True))
        return logp, torch.zeros_like(logp) if tangent is None else tangent
