"""All presets, by glob: no field is dead, no refactor goes unnoticed, and how the work is cut makes no difference."""

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
from knobs import Engine, Knob, Turn, knobs, save_reward_model, turns, values
from policylab.config.build import instantiate
from policylab.errors import RunError, UserError
from small_runs import CONFIGS, OF_EACH_KIND, PRESETS, Drifting, Padded, Trace, algo, quick, small, train

#: ``axis/option`` of every file below ``configs/algo``.
OPTIONS = sorted(f"{path.parent.name}/{path.stem}" for path in (CONFIGS / "algo").glob("*/*.yaml"))
#: Presets with several updates a rollout and penalties, in which most options have something to do.
FIRST_HOSTS = ("ppo", "cispo")
#: Options that are to leave the weights alone: one measures less; of the other, a single update has the gradient that
#: it has of a ratio.
SAME_WEIGHTS = {"reference/none", "surrogate/logprob"}
#: A difference of two weights that is rounding at most, and one that is no rounding.
ROUNDING, VISIBLE = 1e-4, 1e-4


Models = tuple[Path, Path]  # two reward models that a critic may start as


@dataclass(frozen=True)
class Specimen:
    """A preset, as it is or with one option of an axis (``advantage/vtrace``) in place of its own."""

    preset: str
    option: str = ""

    def __str__(self) -> str:
        return f"{self.preset} {self.option}".strip()

    @property
    def algo(self) -> DictConfig:
        return algo(self.preset, *([f"algo/{self.option.replace('/', '=')}"] if self.option else []))

    @property
    def node(self) -> str:
        """Where the option stands in the config, or the whole preset."""
        axis = self.option.split("/")[0]
        return "algo.kl.reference" if axis == "reference" else f"algo.{axis}".rstrip(".")

    def needs(self, models: Models) -> dict[str, Any]:
        """What must be given for the option to be complete and to act."""
        if self.option == "critic/reward_model":
            return {"algo.critic.init": str(models[0])}
        # Completions are of 8 tokens: with as many rewards counted, the target network has no say.
        return {"algo.n_step": 2} if self.option.startswith("target/") else {}

    def knobs(self, models: Models) -> list[Knob]:
        """Those of the whole ``algo``."""
        return list(knobs(small(self.algo, self.needs(models)).algo, "algo"))

    def own_knobs(self, models: Models) -> list[Knob]:
        """Those of the option."""
        return [knob for knob in self.knobs(models) if f"{knob.path}.".startswith(f"{self.node}.")]


def own_options(preset: str) -> dict[str, str]:
    """The option of each axis that a preset takes, by its YAML."""
    defaults = yaml.safe_load((CONFIGS / "algo" / f"{preset}.yaml").read_text()).get("defaults", [])
    return {axis: option for entry in defaults if isinstance(entry, dict) for axis, option in entry.items()}


@cache
def host(option: str) -> Specimen | None:
    """The first preset that takes another option of the axis, and goes together with this one."""
    axis, name = option.split("/")
    for preset in (*FIRST_HOSTS, *PRESETS):
        own = own_options(preset).get(axis, name)
        # Without an advantage that reads values, no critic is built.
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
    """As :func:`outcome`, once for all knobs that start from the same run; the changes as JSON."""
    return outcome(specimen, json.loads(changes), engine)


def outcome(specimen: Specimen, changes: Mapping[str, Any], engine: Engine | None) -> Trace | str:
    """A small run; or what is said when the config is refused, or the run cannot go on."""
    try:
        return train(small(specimen.algo, changes), engine=engine or (lambda engine: engine))
    except (UserError, RunError) as error:
        return str(error)


def untouched(preset: str) -> Trace:
    """A small run of a preset as it is."""
    trace = before(Specimen(preset), "{}", None)
    assert isinstance(trace, Trace), trace
    return trace


def verdict(specimen: Specimen, knob: Knob, turn: Turn, given: Mapping[str, Any]) -> str:
    """The result of changing a field: ``acts``, ``refused``, or a sentence that says what is wrong."""
    given = {**given, **turn.given}
    candidates = values(knob) if turn.value is None else [turn.value]
    results = [outcome(specimen, {**given, knob.path: value}, turn.engine) for value in candidates]
    old = before(specimen, json.dumps(given), turn.engine)
    accepted = [result for result in results if isinstance(result, Trace)]
    if not accepted:
        explained = all(knob.node in str(result) for result in results)
        return "refused" if explained else f"{specimen}: {knob.path} cannot be {candidates}: {results}"
    if isinstance(old, str) or all(acts(turn, old, new) for new in accepted):
        return "acts"
    moved = ", ".join(f"{new.distance(old):.1e}" for new in accepted)
    return f"{specimen}: {knob.path}={knob.value} -> {candidates} moves weights by {moved}"


def acts(turn: Turn, old: Trace, new: Trace) -> bool:
    """Whether the difference is where it should be, and nowhere else."""
    distance = old.distance(new)
    if turn.seen_in == "weights":
        return distance > VISIBLE
    if turn.seen_in == "rounding":
        return 0 < distance <= ROUNDING
    if turn.seen_in == "passes":
        return old.passes != new.passes and distance <= ROUNDING
    return old.metrics != new.metrics and distance == 0


def verdicts(specimen: Specimen, chosen: list[Knob], models: Models) -> dict[str, str]:
    """By path of the knob."""
    table, given = turns(models[1]), specimen.needs(models)
    return {knob.path: verdict(specimen, knob, table.get(knob.kind, Turn()), given) for knob in chosen}


# -- no dead knobs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_knob_acts(models):
    """Each field of each part, in the first preset or option that takes another value for it."""
    hosts = [specimen for option in OPTIONS if (specimen := host(option)) is not None]
    said = dict[str, str]()  # by kind
    for specimen in [*map(Specimen, PRESETS), *hosts]:
        fresh = [knob for knob in specimen.knobs(models) if said.get(knob.kind, "refused") == "refused"]
        of_path = verdicts(specimen, fresh, models)
        said |= {knob.kind: of_path[knob.path] for knob in fresh}
    assert {kind: text for kind, text in said.items() if text != "acts"} == {}
    unused = turns(models[1]).keys() - said.keys()
    assert all(kind.startswith("AdamW.") for kind in unused), unused


@pytest.mark.parametrize("preset", quick(OF_EACH_KIND, ["ppo"]))
def test_every_knob_of_a_preset_acts(preset, models):
    """Where its other values make no sense, they are refused with the reason."""
    specimen = Specimen(preset)
    assert set(verdicts(specimen, specimen.knobs(models), models).values()) <= {"acts", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_acts(option, models):
    """Taking it changes what a preset does, and so does each of its fields."""
    specimen = host(option)
    if specimen is None:
        # Some presets take it themselves: other options are held against it there.
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
    assert set(verdicts(specimen, specimen.own_knobs(models), models).values()) <= {"acts", "refused"}


@pytest.mark.slow
def test_every_knob_of_the_optimizer_acts(models):
    specimen = Specimen("ppo")
    found = verdicts(specimen, list(knobs(small(specimen.algo, {}).optim, "optim")), models)
    assert set(found.values()) == {"acts"}


@pytest.mark.parametrize("preset", PRESETS)
def test_name_names_the_run(preset):
    names = {small(algo(preset), {"algo.name": name}).paths.run_name for name in (preset, "other")}
    assert len(names) == 2


def test_a_dead_knob_is_found():
    """A bound that is never reached is one."""
    specimen = Specimen("grpo")
    knob = Knob("algo.update", "MinibatchEpochs", "kl_stop", float | None, None)
    assert verdict(specimen, knob, Turn(1e9), {}).endswith("moves weights by 0.0e+00")


def test_the_small_runs_give_each_knob_a_chance():
    metrics = untouched("dapo").metrics
    assert all(0 < row["train/ended"] < 1 for row in metrics)
    assert any(0 < row["train/flat_groups"] < 1 for row in metrics)
    assert all(0 < row["train/clip_fraction"] < 1 for row in metrics)


# -- the same answer however the work is cut ----------------------------------------------------------


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 30])
@pytest.mark.parametrize("preset", quick(PRESETS))
def test_size_of_micro_batches_changes_nothing(preset, tokens):
    """One token: a sequence a pass."""
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
    """All weights and the metrics of all iterations, up to rounding."""
    torch.testing.assert_close(one.policy, other.policy, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(one.critic, other.critic, rtol=0, atol=ROUNDING)
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# -- golden metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", quick(PRESETS))
def test_metrics_are_those_on_file(preset):
    """To the last bit on a machine like that of the file. Elsewhere, the first iteration up to rounding: in later ones
    a token may be sampled differently."""
    golden, metrics = golden_metrics.read(preset), golden_metrics.run(preset)
    mend = f"if the change is meant: python tests/golden_metrics.py {preset}"
    assert [row.keys() for row in metrics] == [row.keys() for row in golden["metrics"]], mend
    if golden["platform"] == golden_metrics.fingerprint():
        assert metrics == golden["metrics"], mend
    else:
        assert metrics[0] == pytest.approx(golden["metrics"][0], rel=1e-3, abs=1e-4), mend


def test_there_is_a_file_for_each_preset():
    assert sorted(path.stem for path in golden_metrics.FOLDER.iterdir()) == PRESETS
