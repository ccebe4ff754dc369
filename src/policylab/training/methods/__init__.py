"""The registry of method families: type of ``algo`` -> `Method`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from policylab.algorithms import Algorithm, QLearning, Supervised, TrustRegion
from policylab.contracts import returned
from policylab.errors import UserError
from policylab.training.methods.base import Method
from policylab.training.methods.policy_gradient import PolicyGradientMethod
from policylab.training.methods.q_learning import QLearningMethod
from policylab.training.methods.supervised import SupervisedMethod
from policylab.training.methods.trust_region import TrustRegionMethod
from policylab.training.needs import Cost, CriticNeed, Needs
from policylab.user_code import call

__all__ = ["Cost", "CriticNeed", "Method", "Needs", "method_of", "register"]


def _policy_gradient(algorithm: Algorithm) -> PolicyGradientMethod:
    """Chooses between policy gradient and trust region by the update axis."""
    family = TrustRegionMethod if isinstance(algorithm.update, TrustRegion) else PolicyGradientMethod
    return family(algorithm)


#: Type of an algorithm -> constructor of its method.
METHODS: dict[type, Callable[[Any], Method[Any]]] = {
    Algorithm: _policy_gradient,
    QLearning: QLearningMethod,
    Supervised: SupervisedMethod,
}


def register(algorithm: type, method: Callable[[Any], Method[Any]]) -> None:
    """Registers ``method`` as the constructor of the method for algorithms of this type.

    Raises:
        UserError: when the type already has another one.
    """
    if METHODS.setdefault(algorithm, method) is not method:
        raise UserError(f"{algorithm.__name__} is already registered with another method; register it once")


def method_of(algorithm: object) -> Method[Any]:
    """The method of an algorithm.

    Raises:
        UserError: when no family is registered for its type, or what is registered makes no `Method`.
        RunError: when it raises anything.
    """
    for kind in type(algorithm).__mro__:
        if kind in METHODS:
            made_by = METHODS[kind]
            owner = f"{getattr(made_by, '__name__', made_by)}, registered for {kind.__name__},"
            return returned(owner, call(owner, made_by, algorithm), Method)  # type: ignore[type-abstract]
    name = type(algorithm).__name__
    raise UserError(
        f"algo._target_ is {type(algorithm).__module__}.{name}, which no family of methods trains (known are "
        f"{', '.join(kind.__name__ for kind in METHODS)}); for your own, call "
        f"policylab.training.methods.register({name}, METHOD) where it is defined (docs/your_own_family.md)"
    )
