"""Checks that both sides make the same update with the same batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from race.work import Work


@dataclass(frozen=True)
class Limits:
    """Largest differences that count as agreement."""

    cosine: float  #: at least
    length: float  #: relative error of the gradient's length, at most
    loss: float  #: difference, at most


#: fp32. What is left is TRL's 1e-4 beside a group's standard deviation (ours has 1e-6), and in PPO its unbiased
#: variance in whitening.
EXACT = Limits(0.9999, 1e-3, 1e-4)
#: PPO where completions end before the limit: TRL puts the reward one position behind the EOS, and trains the value
#: there as well.
ONE_MORE_VALUE = Limits(0.99, 0.05, 1e-2)
#: bf16 autocast, which rounds at other places in other code.
ROUNDED = Limits(0.98, 0.05, 2e-2)


def limits(race: Work) -> Limits:
    """The limits of a race."""
    if race.precision == "bf16":
        return ROUNDED
    return ONE_MORE_VALUE if race.algo == "ppo" and race.lengths == "varied" else EXACT


@dataclass(frozen=True)
class Agreement:
    """Differences of the two gradients, over all parameters that both sides have."""

    cosine: float
    length: float  #: relative error of TRL's length
    losses: (
        tuple[float, float] | None
    )  #: ours and TRL's; None in RLOO, where ours is -A log pi and TRL's -A ratio
    limits: Limits
    parameters: int
    only_ours: list[str]
    only_theirs: list[str]

    @property
    def refused(self) -> bool:
        """Whether this is no agreement."""
        apart = 0.0 if self.losses is None else abs(self.losses[0] - self.losses[1])
        limits = self.limits
        # Negated, so that NaN is refused.
        return not (self.cosine >= limits.cosine and self.length <= limits.length and apart <= limits.loss)

    def __str__(self) -> str:
        losses = "" if self.losses is None else f", loss {self.losses[0]:.6f} and {self.losses[1]:.6f}"
        alone = [*self.only_ours, *self.only_theirs]
        return (
            f"gradients of {self.parameters:,} parameters: 1 - cosine {1 - self.cosine:.1e}, "
            f"length off by {self.length:.1e}{losses}"
            + (f"; not shared: {', '.join(alone)}" if alone else "")
        )


def compare(race: Work, losses: tuple[float, float], ours: Path, theirs: Path) -> Agreement:
    """Compares the gradients in two folders, in float64, one parameter at a time."""
    names, others = ({file.name for file in folder.iterdir()} for folder in (ours, theirs))
    dot = own = its = 0.0
    parameters = 0
    for name in sorted(names & others):
        x, y = (np.load(folder / name).astype(np.float64).ravel() for folder in (ours, theirs))
        dot, own, its = dot + x @ y, own + x @ x, its + y @ y
        parameters += x.size
    return Agreement(
        cosine=float(dot / np.sqrt(own * its)),
        length=float(abs(np.sqrt(its / own) - 1)),
        losses=None if race.algo == "rloo" else losses,
        limits=limits(race),
        parameters=parameters,
        only_ours=named(names - others),
        only_theirs=named(others - names),
    )


def named(files: Iterable[str]) -> list[str]:
    return sorted(file.removesuffix(".npy") for file in files)
