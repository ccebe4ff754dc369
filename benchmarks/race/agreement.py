"""Whether both sides make the same update of the same batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from race.work import Work

#: Least cosine, and greatest relative error of the gradient's length, in fp32 and under bf16 autocast.
LIMITS = {"fp32": (0.9999, 1e-3), "bf16": (0.98, 0.05)}
#: Greatest difference of the losses. RLOO's differ by construction: ours is -A log pi, TRL's -A ratio.
LOSS_LIMIT = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Agreement:
    """Of the two gradients, over all parameters that both sides have."""

    cosine: float
    length: float  #: relative error of TRL's length
    losses: tuple[float, float] | None  #: ours and TRL's, where they are the same function
    precision: str
    parameters: int
    only_ours: list[str]
    only_theirs: list[str]

    @property
    def refused(self) -> bool:
        """Whether this is no agreement."""
        least, most = LIMITS[self.precision]
        apart = self.losses is not None and abs(self.losses[0] - self.losses[1]) > LOSS_LIMIT[self.precision]
        return apart or not (self.cosine >= least and self.length <= most)

    def __str__(self) -> str:
        losses = "" if self.losses is None else f", loss {self.losses[0]:.6f} and {self.losses[1]:.6f}"
        alone = [*self.only_ours, *self.only_theirs]
        return (
            f"gradients of {self.parameters:,} parameters: 1 - cosine {1 - self.cosine:.1e}, "
            f"length off by {self.length:.1e}{losses}"
            + (f"; not shared: {', '.join(alone)}" if alone else "")
        )


def compare(race: Work, losses: tuple[float, float], ours: Path, theirs: Path) -> Agreement:
    """Holds the two files of gradients against each other, in float64, a tensor at a time."""
    with safe_open(ours, "np") as mine, safe_open(theirs, "np") as other:
        names, others = set(mine.keys()), set(other.keys())
        dot = own = its = 0.0
        parameters = 0
        for name in sorted(names & others):
            x, y = (file.get_tensor(name).astype(np.float64).ravel() for file in (mine, other))
            dot, own, its = dot + x @ y, own + x @ x, its + y @ y
            parameters += x.size
    return Agreement(
        cosine=float(dot / np.sqrt(own * its)),
        length=float(abs(np.sqrt(its / own) - 1)),
        losses=None if race.algo == "rloo" else losses,
        precision=race.precision,
        parameters=parameters,
        only_ours=sorted(names - others),
        only_theirs=sorted(others - names),
    )
