"""The overrides of a multirun: one value for all jobs, several values, or one value by choice.

With ``algo=ppo,rloo 'optim.lr={ppo:7e-4,rloo:3e-4}'`` each job gets the rate of its algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from policylab.errors import UserError
from policylab.runs.same_run import below


class Choices:
    """The overrides of a multirun.

    Args:
        words: overrides of a recipe, then those of the command; the last one of a key is used.
        loader: Hydra's loader, which has the config groups.

    Attributes:
        values: values of each key; an empty list for an interval, from which the sweeper draws them.
        several: keys with several values, or an interval.
        shared: overrides that all jobs have.
        swept: keys that have different values in different jobs.
    """

    def __init__(self, words: Sequence[str], loader: ConfigLoader) -> None:
        self.loader = loader
        self.parser = OverridesParser.create(config_loader=loader)
        found = {
            override.get_key_element(): override for override in self.parser.parse_overrides(list(words))
        }
        self.values = {key: values_of(override) for key, override in found.items()}
        self.several = {key for key, override in found.items() if override.is_sweep_override()}
        one = {key: o for key, o in found.items() if not o.is_sweep_override() and self.group_of(o) is None}
        self.shared = [f"{key}={override.get_value_element_as_str()}" for key, override in one.items()]
        self.swept = found.keys() - one.keys()

    def group_of(self, override: Override) -> str | None:
        """The group that the value of an override has choices of, such as ``algo``; None for a value for all jobs.

        If a group has one choice only, a dict inside its own part is a value: ``reward=sentiment
        +reward.weights={sentiment:1.0}``.
        """
        value = override.value()
        if not isinstance(value, dict):
            return None
        names, key = set(map(str, value)), override.key_or_group
        groups = (group for group in self.values if "." not in group)
        named = (g for g in groups if not names.isdisjoint(self.loader.get_group_options(g)))
        return next((g for g in named if g in self.several or not below(key, [g.replace("/", ".")])), None)

    def own(self, words: Sequence[str]) -> list[str]:
        """The overrides of one job, in which its own value replaces values by choice. If its choice has no value, the
        override is left out, so the config's value is used.

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
    """The overrides of a multirun: those of ``hydra.sweeper.params``, then those of the command."""
    return [*(f"{key}={value}" for key, value in (params or {}).items()), *task]
