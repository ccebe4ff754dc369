"""What the words of a multirun give its jobs: one value for all, several, or one by choice.

With ``algo=ppo,rloo 'optim.lr={ppo:7e-4,rloo:3e-4}'`` each job gets the rate of its algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from policylab.errors import UserError


class Choices:
    """The words of a multirun.

    Args:
        words: of the command, and before them those of a recipe: the last one of a key counts.
        loader: Hydra's, which knows the config groups.

    Attributes:
        values: of each key; none where they are drawn from an interval.
        shared: the words that all jobs have.
        swept: keys of which jobs have different values.
    """

    def __init__(self, words: Sequence[str], loader: ConfigLoader) -> None:
        self.loader = loader
        self.parser = OverridesParser.create(config_loader=loader)
        found = {
            override.get_key_element(): override for override in self.parser.parse_overrides(list(words))
        }
        self.values = {key: values_of(override) for key, override in found.items()}
        one = {key: o for key, o in found.items() if not o.is_sweep_override() and self.group_of(o) is None}
        self.shared = [f"{key}={override.get_value_element_as_str()}" for key, override in one.items()]
        self.swept = found.keys() - one.keys()

    def group_of(self, override: Override) -> str | None:
        """The group whose choices the value of an override is for, such as ``algo``; None for a value for all."""
        value = override.value()
        if not isinstance(value, dict):
            return None
        names = set(map(str, value))
        groups = (key for key in self.values if "." not in key)
        return next((key for key in groups if not names.isdisjoint(self.loader.get_group_options(key))), None)

    def own(self, words: Sequence[str]) -> list[str]:
        """The words of one job, with its own value in place of values by choice. Where its choice has none, the word
        is left out: what the config says holds.

        Raises:
            UserError: when there is a value for a choice that the sweep does not have.
        """
        overrides = self.parser.parse_overrides(list(words))
        chosen = {override.key_or_group: override.get_value_element_as_str() for override in overrides}
        kept = list[str]()
        for word, override in zip(words, overrides, strict=True):
            group = self.group_of(override)
            if group is None:
                kept.append(word)
                continue
            values = override._value
            assert isinstance(values, dict)
            if foreign := [name for name in map(str, values) if name not in self.values[group]]:
                raise UserError(
                    f"{override.key_or_group} has a value for {', '.join(foreign)}, and this sweep has "
                    f"{group}={','.join(self.values[group])}; add it there, or leave its value out"
                )
            if chosen[group] in values:
                own = replace(override, _value=values[chosen[group]])
                kept.append(f"{own.get_key_element()}={own.get_value_element_as_str()}")
        return kept


def values_of(override: Override) -> list[str]:
    """All values of an override."""
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    return [] if override.is_sweep_override() else [override.get_value_element_as_str()]


def sweep_words(params: Mapping[str, object] | None, task: Sequence[str]) -> list[str]:
    """The words of a multirun: those of ``hydra.sweeper.params``, and those of the command."""
    return [*(f"{key}={value}" for key, value in (params or {}).items()), *task]
