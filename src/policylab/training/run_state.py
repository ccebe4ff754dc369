"""The state of a run, besides weights and optimizer, that a checkpoint must hold for an exact resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from policylab.contracts import check_members, returned
from policylab.errors import UserError
from policylab.functional import products
from policylab.models.fingerprint import fingerprint
from policylab.training.means import SAMPLED, TRAINED, Total
from policylab.training.parts import Parts

log = logging.getLogger(__name__)

#: Counters that are saved.
SAVED = ("iteration", "kl_coef", "tokens_sampled", "tokens_trained")


class Stateful(Protocol):
    """A part with state. Its names must be unique among all parts of a trainer."""

    def state(self) -> dict[str, Any]:
        """Plain values and tensors; called on all processes at once."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Loads its own names from the merged state of all parts."""
        ...


@dataclass
class Progress:
    """The progress of a run; all parts of a trainer share one object.

    Args:
        iterations: length of the whole run.
        max_tokens: limit on tokens sampled in training, which may end the run earlier; None for no limit.

    Attributes:
        iteration: number of finished iterations.
        tokens_sampled: in training, over all processes; validation and preflight do not count.
        tokens_trained: tokens trained on, counted once per pass.
        kl_coef: coefficient of the KL penalty in the next iteration.
        expected_tokens: tokens per iteration, estimated by the preflight.
    """

    iterations: int
    max_tokens: int | None = None
    iteration: int = 0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    kl_coef: float = 0.0
    expected_tokens: float = 0.0

    @property
    def budget_is_spent(self) -> bool:
        """Whether ``max_tokens`` have been sampled."""
        return self.max_tokens is not None and self.tokens_sampled >= self.max_tokens

    @property
    def last_iteration(self) -> int:
        """The iteration after which the run ends; with a token limit, an estimate from the tokens so far."""
        if self.max_tokens is None:
            return self.iterations
        tokens = self.tokens_sampled / self.iteration if self.iteration else self.expected_tokens
        left = math.ceil((self.max_tokens - self.tokens_sampled) / max(tokens, 1.0))
        return min(self.iterations, self.iteration + max(left, 0))

    def count(self, totals: dict[str, Total]) -> None:
        """Counts a finished iteration; takes the counters of tokens out of its totals."""
        none = Total(0.0, 0.0)
        self.iteration += 1
        self.tokens_sampled += int(totals.pop(SAMPLED, none).sum)
        self.tokens_trained += int(totals.pop(TRAINED, none).sum)

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAVED}

    def load(self, state: dict[str, Any]) -> None:
        for name in SAVED:
            setattr(self, name, state[name])


class RunState:
    """The state of all parts, and the fingerprints that identify the run.

    Attributes:
        origin: fingerprints of the weights and the data that the run starts from.
        checks_data: whether the state of a run on other data is refused.
    """

    def __init__(self, parts: Parts, stateful: Sequence[Stateful]) -> None:
        self.stateful = list(stateful)
        self.origin = {"weights": fingerprint(parts.policy.loaded_parameters()), "data": parts.data}
        self.checks_data = True
        self.warned = False  #: about a checkpoint without `origin`
        self._config = parts.resolved_config
        self._source, self._task = parts.policy.source, parts.task

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint; called on all processes at once."""
        state = {"config": self._config, "origin": self.origin, "products": products.chosen().plain()}
        for part in self.stateful:
            name = type(part).__name__
            check_members("run_state.stateful holds", part, Stateful)
            own = returned(f"{name}.state", part.state(), dict)
            if twice := state.keys() & own.keys():
                raise UserError(
                    f"{name}.state returned the names {sorted(twice)}, which another part has; rename them"
                )
            state |= own
        return state

    def load(self, state: dict[str, Any] | None) -> None:
        """Continues from a saved state; None where a checkpoint has none.

        Raises:
            UserError: when the state belongs to another run, or there is none.
        """
        if state is None:
            raise UserError(
                "the checkpoint was not written by policylab; take one of a run's checkpoints/ folder"
            )
        self.check_origin(state)
        for part in self.stateful:
            part.load(state)
        if "products" in state:
            products.restore(state["products"])

    def check_origin(self, state: dict[str, Any]) -> None:
        """Refuses the state of a run that started from other weights or on other data. The initial weights are needed
        as its reference and as the base of its adapters.

        Raises:
            UserError: naming the weights or the data of this command.
        """
        origin = state.get("origin")
        if origin is None and self.warned:
            return  # a resumed run loads its checkpoint for validation and again for training
        if origin is None:
            self.warned = True
            log.warning(
                "the checkpoint is of an older version, and does not say from which weights and data its run started"
            )
            return
        if origin["weights"] != self.origin["weights"]:
            raise UserError(
                f"the checkpoint belongs to a run that started from other weights than these ({self._source}); "
                "restore the weights that it started from, or give their path: model.path=..."
            )
        if self.checks_data and origin["data"] != self.origin["data"]:
            raise UserError(
                f"the checkpoint belongs to a run on other data than task {self._task.name} has now; restore the data "
                "that it started with, or give its path: task.source=..."
            )
