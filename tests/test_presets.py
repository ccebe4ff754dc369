"""All presets, by glob: every field has an effect, metrics stay the same, and micro-batches do not change results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig

import golden_metrics
from fields import Engine, Field, Variation, fields, save_reward_model, values, variations
from policylab.config.build import instantiate
from policylab.errors import RunError, UserError
from small_runs import CONFIGS, OF_EACH_KIND, PRESETS, Drifting, Padded, Trace, algo, quick, small, train

#: ``axis/option`` of every file below ``configs/algo``.
OPTIONS = sorted(f"{path.parent.name}/{path.stem}" for path in (CONFIGS / "algo").glob("*/*.yaml"))
#: Presets with several updates per rollout and penalties, in which most options have an effect.
FIRST_HOSTS = ("ppo", "cispo")
#: Options that must not change the weights: the first only measures less; the second has the same gradient as the
#: ratio in a single update.
SAME_WEIGHTS = {"reference/none", "surrogate/logprob"}
#: Differences between weights: at most this much is rounding, more than this much is an effect.
ROUNDING, VISIBLE = 1e-4, 1e-4


Models = tuple[Path, Path]  # two reward models that a critic can be initialized from


@dataclass(frozen=True)
class Specimen:
    """A preset, unchanged or with another option of one axis (``advantage/vtrace``)."""

    preset: str
    option: str = ""

    def __str__(self) -> str:
        return f"{self.preset} {self.option}".strip()

    @property
    def algo(self) -> DictConfig:
        return algo(self.preset, *([f"algo/{self.option.replace('/', '=')}"] if self.option else []))

    @property
    def node(self) -> str:
        """Config path of the option, or of the whole preset."""
        axis = self.option.split("/")[0]
        return "algo.kl.reference" if axis == "reference" else f"algo.{axis}".rstrip(".")

    def needs(self, models: Models) -> dict[str, Any]:
        """Settings without which the option is incomplete or has no effect."""
        if self.option == "critic/reward_model":
            return {"algo.critic.init": str(models[0])}
        # Completions have 8 tokens: with n_step of 8 or more, the target network is not used.
        return {"algo.n_step": 2} if self.option.startswith("target/") else {}

    def fields(self, models: Models) -> list[Field]:
        """Fields of the whole ``algo``."""
        return list(fields(small(self.algo, self.needs(models)).algo, "algo"))

    def own_fields(self, models: Models) -> list[Field]:
        """Fields of the option."""
        return [field for field in self.fields(models) if f"{field.path}.".startswith(f"{self.node}.")]


def own_options(preset: str) -> dict[str, str]:
    """The option of each axis that the preset's YAML selects."""
    defaults = yaml.safe_load((CONFIGS / "algo" / f"{preset}.yaml").read_text()).get("defaults", [])
    return {axis: option for entry in defaults if isinstance(entry, dict) for axis, option in entry.items()}


@cache
def host(option: str) -> Specimen | None:
    """The first preset that selects another option of the axis and also works with this one."""
    axis, name = option.split("/")
    for preset in (*FIRST_HOSTS, *PRESETS):
        own = own_options(preset).get(axis, name)
        # A preset without a critic has no advantage that reads values, so the critic would not be built.
        if own != name and (axis, own) != ("critic", "none"):
            specimen = Specimen(preset, option)
            try:
                instantiate(small(specimen.algo, specimen.needs((Path("some"), Path("other")))).algo)
            except UserError:
                continue
            return specimen
    return None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folders = tmp_path_factory.mktemp("reward_model"), tmp_path_factory.mktemp("reward_model")
    for seed, folder in enumerate(folders):
        save_reward_model(folder, seed)
    return folders


@cache
def before(specimen: Specimen, changes: str, engine: Engine | None) -> Trace | str:
    """:func:`outcome`, cached, because many fields are compared with the same run; the changes as JSON."""
    return outcome(specimen, json.loads(changes), engine)


def outcome(specimen: Specimen, changes: Mapping[str, Any], engine: Engine | None) -> Trace | str:
    """A small run; or the message, if the config is refused or the run fails."""
    try:
        return train(small(specimen.algo, changes), engine=engine or (lambda engine: engine))
    except (UserError, RunError) as error:
        return str(error)


def untouched(preset: str) -> Trace:
    """A small run of an unchanged preset."""
    trace = before(Specimen(preset), "{}", None)
    assert isinstance(trace, Trace), trace
    return trace


def verdict(specimen: Specimen, field: Field, variation: Variation, given: Mapping[str, Any]) -> str:
    """The result of changing a field: ``acts``, ``refused``, or a sentence that says what is wrong."""
    given = {**given, **variation.given}
    candidates = values(field) if variation.value is None else [variation.value]
    results = [outcome(specimen, {**given, field.path: value}, variation.engine) for value in candidates]
    old = before(specimen, json.dumps(given), variation.engine)
    accepted = [result for result in results if isinstance(result, Trace)]
    if not accepted:
        explained = all(field.node in str(result) for result in results)
        return "refused" if explained else f"{specimen}: {field.path} cannot be {candidates}: {results}"
    if isinstance(old, str) or all(acts(variation, old, new) for new in accepted):
        return "acts"
    moved = ", ".join(f"{new.distance(old):.1e}" for new in accepted)
    return f"{specimen}: {field.path}={field.value} -> {candidates} moves weights by {moved}"


def acts(variation: Variation, old: Trace, new: Trace) -> bool:
    """Whether the runs differ where they should, and nowhere else."""
    distance = old.distance(new)
    if variation.seen_in == "weights":
        return distance > VISIBLE
    if variation.seen_in == "rounding":
        return 0 < distance <= ROUNDING
    if variation.seen_in == "passes":
        return old.passes != new.passes and distance <= ROUNDING
    return old.metrics != new.metrics and distance == 0


def verdicts(specimen: Specimen, chosen: list[Field], models: Models) -> dict[str, str]:
    """Verdict of each field, by path."""
    table, given = variations(models[1]), specimen.needs(models)
    return {
        field.path: verdict(specimen, field, table.get(field.kind, Variation()), given) for field in chosen
    }


# -- every field has an effect ------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_field_acts(models):
    """Each field of each part, in the first preset or option that accepts another value for it."""
    hosts = [specimen for option in OPTIONS if (specimen := host(option)) is not None]
    said = dict[str, str]()  # by kind
    for specimen in [*map(Specimen, PRESETS), *hosts]:
        fresh = [field for field in specimen.fields(models) if said.get(field.kind, "refused") == "refused"]
        of_path = verdicts(specimen, fresh, models)
        said |= {field.kind: of_path[field.path] for field in fresh}
    assert {kind: text for kind, text in said.items() if text != "acts"} == {}
    unused = variations(models[1]).keys() - said.keys()
    assert all(kind.startswith("AdamW.") for kind in unused), unused


@pytest.mark.parametrize("preset", quick(OF_EACH_KIND, ["ppo"]))
def test_every_field_of_a_preset_acts(preset, models):
    """Or its other values are refused, with the reason."""
    specimen = Specimen(preset)
    assert set(verdicts(specimen, specimen.fields(models), models).values()) <= {"acts", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_acts(option, models):
    """An option changes the training of a preset, and so does each of its fields."""
    specimen = host(option)
    if specimen is None:
        # The option is the own one of some preset, where the other options are compared with it.
        axis, name = option.split("/")
        assert name in {own_options(preset).get(axis) for preset in PRESETS}
        return
    engine = Drifting if option in ("importance/truncated", "advantage/vtrace") else None
    given = specimen.needs(models)
    shared = {path: value for path, value in given.items() if not path.startswith(f"{specimen.node}.")}
    without = before(Specimen(specimen.preset), json.dumps(shared), engine)
    with_it = before(specimen, json.dumps(given), engine)
    assert isinstance(without, Trace), without
    assert isinstance(with_it, Trace), with_it
    assert without.metrics != with_it.metrics
    assert without.distance(with_it) > VISIBLE or option in SAME_WEIGHTS
    assert set(verdicts(specimen, specimen.own_fields(models), models).values()) <= {"acts", "refused"}


@pytest.mark.slow
def test_every_field_of_the_optimizer_acts(models):
    specimen = Specimen("ppo")
    found = verdicts(specimen, list(fields(small(specimen.algo, {}).optim, "optim")), models)
    assert set(found.values()) == {"acts"}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_run_is_named_after_the_algorithm(preset):
    names = {small(algo(preset), {"algo.name": name}).paths.run_name for name in (preset, "other")}
    assert len(names) == 2


def test_a_field_without_effect_is_found():
    """Here: a bound that is never reached."""
    specimen = Specimen("grpo")
    field = Field("algo.update", "MinibatchEpochs", "kl_stop", float | None, None)
    assert verdict(specimen, field, Variation(1e9), {}).endswith("moves weights by 0.0e+00")


def test_the_small_runs_have_all_cases():
    metrics = untouched("dapo").metrics
    assert all(0 < row["train/ended"] < 1 for row in metrics)
    assert any(0 < row["train/flat_groups"] < 1 for row in metrics)
    assert all(0 < row["train/clip_fraction"] < 1 for row in metrics)


# -- micro-batches and padding do not change results ---------------------------------------------------


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 30])
@pytest.mark.parametrize("preset", quick(PRESETS))
def test_size_of_micro_batches_changes_nothing(preset, tokens):
    """With a budget of one token, each pass has one sequence."""
    whole = untouched(preset)
    cut = outcome(Specimen(preset), {"optim.micro_batch_tokens": tokens}, None)
    assert isinstance(cut, Trace), cut
    assert cut.passes > whole.passes
    check_same(cut, whole)


@pytest.mark.parametrize("preset", quick(PRESETS))
def test_padding_changes_nothing(preset):
    wide = outcome(Specimen(preset), {}, Padded)
    assert isinstance(wide, Trace), wide
    check_same(wide, untouched(preset))


def check_same(one: Trace, other: Trace) -> None:
    """Asserts the same weights and the same metrics in all iterations, up to rounding."""
    torch.testing.assert_close(one.policy, other.policy, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(one.critic, other.critic, rtol=0, atol=ROUNDING)
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# -- golden metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", quick(PRESETS))
def test_metrics_are_those_on_file(preset):
    """Equal to the last bit on a machine like that of the file. On others, only the first iteration is compared, up to
    rounding: later ones may sample another token."""
    golden, metrics = golden_metrics.read(preset), golden_metrics.run(preset)
    update = f"if the change is intended: python tests/golden_metrics.py {preset}"
    assert [row.keys() for row in metrics] == [row.keys() for row in golden["metrics"]], update
    if golden["platform"] == golden_metrics.fingerprint():
        assert metrics == golden["metrics"], update
    else:
        assert metrics[0] == pytest.approx(golden["metrics"][0], rel=1e-3, abs=1e-4), update


def test_there_is_a_file_for_each_preset():
    assert sorted(path.stem for path in golden_metrics.FOLDER.iterdir()) == PRESETS
