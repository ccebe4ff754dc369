"""beartype with ``Self`` allowed: jaxtyping decorates single methods, where beartype refuses ``Self``."""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int is accepted for a float (PEP 484), because YAML has 1 for 1.0.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any}), is_pep484_tower=True))
