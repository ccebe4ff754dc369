"""beartype as the tests use it: jaxtyping decorates single methods, where beartype refuses ``Self``."""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
