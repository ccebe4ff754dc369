"""Numbers and times for people."""

from __future__ import annotations

from collections.abc import Mapping


def duration(seconds: float) -> str:
    """Seconds in a readable unit.

    >>> duration(42), duration(75), duration(7300)
    ('42 s', '1 min 15 s', '2 h 2 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def number(value: float | None) -> str:
    """A metric with four significant digits."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-5 else "0"


def headlines(metrics: Mapping[str, float]) -> list[str]:
    """Names of the main validation metrics, reward and KL first; without parts of the reward and counts."""
    first = ["val/reward", "val/kl", "val/loss"]
    names = [name for name in metrics if name.count("/") == 1 and name not in ("val/kl_token", "val/prompts")]
    return [name for name in first if name in names] + [name for name in names if name not in first]
