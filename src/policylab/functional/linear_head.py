"""Log-probs, entropy and KL of sampled tokens under a linear LM head, without holding the logits of all positions.

The head is applied to chunks of positions. The forward pass keeps only a few numbers per position, and the backward
pass recomputes a chunk's logits ``z``; if there is only one chunk, its probabilities are kept. The gradients are
written out, because autograd would make several more passes over a chunk's ``[N, V]`` numbers: with
``p = softmax(z)``, ``H`` the entropy and ``K = KL(p | q)``,

    d log p_a / dz = 1[a] - p,    dH / dz = -p (log p + H),    dK / dz = p (log p - log q - K).

Axes: ``N`` positions, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from policylab.functional.products import common_length, linear, outer

#: Limit on logits held at once (elements; 256 MiB of fp32).
CHUNK = 2**26


def tables_at_once(elements: float, *, compares: bool) -> float:
    """Bytes of logits, and of tables computed from them, that a pass holds at once.

    Args:
        elements: positions times vocabulary.
        compares: whether another head's logits are held too.
    """
    if elements <= CHUNK:
        return (2 + compares) * elements * 4
    return (3 + compares) * CHUNK * 4


@dataclass(frozen=True)
class Head:
    """A linear map from hidden states to logits, and the temperature that divides them."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None
    temperature: float

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """fp32 logits divided by the temperature, in new memory that the caller may overwrite."""
        z = linear(hidden, self.weight, self.bias).float()
        return z if self.temperature == 1 else z.div_(self.temperature)


@dataclass(frozen=True)
class HeadFigures:
    """Results for each position."""

    logprobs: Float[Tensor, " N"]  #: log-prob of the position's token
    entropy: Float[Tensor, " N"]  #: nats
    exact_kl: Float[Tensor, " N"] | None  #: KL to the other head's distribution; None without another head


def head_figures(
    head: Head,
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " N"],
    *,
    entropy_gradient: bool,
    other: tuple[Head, Float[Tensor, "N H"]] | None,
    chunk: int = CHUNK,
) -> HeadFigures:
    """Log-prob of each token, entropy, and KL to another head's distribution on its own hidden states.

    Args:
        entropy_gradient: whether the entropy has a gradient.
        other: the other head with its hidden states; it gets no gradient.
        chunk: elements of logits that are held at once.
    """
    n = len(tokens)
    filler = common_length(n, hidden.device) - n
    if filler:
        hidden, tokens = F.pad(hidden, (0, 0, 0, filler)), F.pad(tokens, (0, filler))
        other = None if other is None else (other[0], F.pad(other[1], (0, 0, 0, filler)))
    figures = _HeadFigures.apply(
        hidden, head.weight, head.bias, tokens, head.temperature, entropy_gradient, other, chunk
    )
    logprobs, entropy, exact_kl = (figure[:n] for figure in figures)
    return HeadFigures(logprobs, entropy, None if other is None else exact_kl)


class _HeadFigures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        entropy_gradient: bool,
        other: tuple[Head, Tensor] | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # autocast applies to the products, never to sums and exponentials
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            if other is not None:
                theirs, states = other
                own_bias = None if theirs.bias is None else theirs.bias.to(dtype)
                other = Head(theirs.weight.to(dtype), own_bias, theirs.temperature), states.to(dtype)
        head = Head(weight, bias, temperature)
        rows = max(1, chunk // weight.shape[0])
        logprobs, entropy, exact_kl, normalizer = hidden.new_zeros(4, len(hidden), dtype=torch.float32)
        kept = None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                z = head.logits(hidden[part])
                top = z.amax(-1)
                z.sub_(top[:, None])  # otherwise large logits would leave too few digits for differences
                p = z.softmax(-1)
                lse = -p.amax(-1).log()
                logprobs[part] = z.gather(-1, tokens[part, None]).squeeze(-1) - lse
                entropy[part] = lse - _dot(p, z)
                normalizer[part] = top + lse
                if other is not None:
                    q = other[0].logits(other[1][part]).log_softmax(-1)
                    # the difference first: it is exactly zero where both are equal
                    exact_kl[part] = _dot(p, z.sub_(lse[:, None]).sub_(q))
                if rows >= len(hidden) and other is None and not entropy_gradient:
                    kept = p
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizer, entropy, exact_kl)
        ctx.head, ctx.other, ctx.rows, ctx.kept = head, other, rows, kept
        ctx.entropy_gradient = entropy_gradient
        return logprobs, entropy, exact_kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _HeadFigures._slopes(ctx, *grads)

    @staticmethod
    def _slopes(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, _, tokens, normalizer, entropy, exact_kl = ctx.saved_tensors
        of_logprob, of_entropy, of_kl = grads
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = to_bias = None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            slope = -of_logprob[part, None]
            if ctx.kept is not None:
                dz = ctx.kept.mul_(slope)
                ctx.kept = None  # overwritten below; a second backward pass recomputes it
            else:
                logp = ctx.head.logits(hidden[part]).sub_(normalizer[part, None])
                if ctx.entropy_gradient:
                    slope = slope - of_entropy[part, None] * (logp + entropy[part, None])
                if ctx.other is not None:
                    head, states = ctx.other
                    logq = head.logits(states[part]).log_softmax(-1)
                    slope = slope + of_kl[part, None] * (logp - logq - exact_kl[part, None])
                dz = logp.exp_().mul_(slope)
            dz.scatter_add_(-1, tokens[part, None], of_logprob[part, None])
            if ctx.head.temperature != 1:
                dz.div_(ctx.head.temperature)
            dz = dz.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[part] = linear(dz, weight.t(), None)
            if wants_weight:
                to_weight = _add_outer(to_weight, dz, hidden[part])
            if wants_bias:
                to_bias = dz.sum(0, dtype=torch.float32) + (0 if to_bias is None else to_bias)
        return to_hidden, to_weight, to_bias, None, None, None, None, None


def _add_outer(
    total: Tensor | None, a: Float[Tensor, "N V"], b: Float[Tensor, "N H"]
) -> Float[Tensor, "V H"]:
    """``total + a^T b`` in fp32, in place where possible."""
    if total is None:
        return outer(a, b).float()
    return total.addmm_(a.t(), b) if a.dtype == total.dtype else total.add_(a.t() @ b)


def _dot(a: Float[Tensor, "N V"], b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """``sum_v a_v b_v``, without storing the products."""
    return torch.bmm(a[:, None, :], b[:, :, None]).flatten()
