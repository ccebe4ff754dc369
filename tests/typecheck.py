"""beartype as the tests use it: jaxtyping decorates single methods, where beartype refuses ``Self``."""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int may stand for a float, as everywhere in Python (PEP 484): YAML writes 1 for 1.0.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any}), is_pep484_tower=True))
