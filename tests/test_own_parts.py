"""User-defined parts (a family, an engine, a reader, a trainer): a missing member or a wrong return value is reported
in one line that names the class, the method and what is expected."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning import Callback
from omegaconf import OmegaConf

from policylab.algorithms import Advantage, Estimate
from policylab.cli.messages import is_mistake, one_line
from policylab.config.build import build_policy, engine_of, instantiate, named_parts
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Evaluation
from policylab.errors import RunError, UserError
from policylab.models.policy import Policy
from policylab.models.readers import PackedCausal
from policylab.models.readers.packed import trial_rollout
from policylab.rewards.base import check_reward
from policylab.rewards.weighted_sum import WeightedSum
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.row_limit import RowLimit
from policylab.tasks.base import examples
from policylab.training.methods import Method, method_of, register
from policylab.training.metrics import check_numbers
from policylab.training.run_state import RunState
from policylab.training.stepper import check_loss
from policylab.user_code import cut
from small_runs import algo

PLAN = BatchPlan(2, 1, 1, 1, 1)


# -- state that would be lost at a resume ---------------------------------------------------------------------


class Reward:
    def __call__(self, completions):
        return [1.0] * len(completions)


class Saves(Reward):
    def state_dict(self):
        return {}


class Loads(Reward):
    def load_state_dict(self, state):
        pass


class OtherNames(Reward):
    def state(self):
        return {}

    def load_state(self, state):
        pass


class Whole(Saves, Loads):
    pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Saves, "reward Saves has state_dict and no load_state_dict: its state would be lost at a resume"),
        (Loads, "reward Loads has load_state_dict and no state_dict"),
        (OtherNames, "reward OtherNames has load_state and no state_dict and load_state_dict"),
    ],
)
def test_a_reward_keeps_its_state_by_both_methods(kind, message):
    with pytest.raises(UserError, match=message):
        check_reward(kind())
    with pytest.raises(UserError, match=message):
        WeightedSum({"a": kind()}, {"a": 1.0})
    check_reward(Whole())
    check_reward(torch.nn.Linear(1, 1))


class Task:
    name, instruction, train, val = "mine", None, (), ()

    def metrics(self, completions):
        return {}


class Remembering(Task, Whole):
    pass


def test_a_task_keeps_no_state():
    assert examples(Task(), "train") == []
    with pytest.raises(UserError, match="task mine has state_dict, but checkpoints hold no state of it"):
        examples(Remembering(), "train")


class Half(Callback):
    def state_dict(self):
        return {}


def test_a_callback_keeps_its_state_by_both_methods():
    config = OmegaConf.create({"half": {"_target_": f"{__name__}.Half"}})
    with pytest.raises(UserError, match="callback half has state_dict and no load_state_dict"):
        named_parts(config, Callback)
    config.half["_target_"] = "lightning.Callback"
    assert len(named_parts(config, Callback)) == 1


# -- a family -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine:
    """An algorithm."""


class Abstract(Method[Mine]):
    """Has no trainer."""


class Nonsense(Method[Mine]):
    def plan(self, rollout, processes):
        return None

    def needs(self):
        return {"reference": "frozen"}

    def check(self, config):
        return False

    def check_lengths(self):
        pass

    def cost(self, plan, *, exact):
        raise NotImplementedError

    def trainer(self, parts):
        return "trainer"


def test_return_values_of_a_family_are_checked():
    method = Nonsense(Mine())
    for call, message in [
        (lambda: method.plan(None, 1), r"Nonsense\.plan returned None; it must return BatchPlan$"),
        (method.needs, r"Nonsense\.needs returned \{'reference': 'frozen'\}; it must return Needs$"),
        (
            lambda: method.check(None),
            r"Nonsense\.check returned False; it must return nothing, and raise UserError",
        ),
        (
            lambda: method.trainer(None),
            r"Nonsense\.trainer returned 'trainer'; it must return TrainingModule$",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(
        RunError, match=r"Nonsense\.cost failed at .*test_own_parts\.py:\d+: NotImplementedError$"
    ):
        method.cost(PLAN, exact=True)
    with pytest.raises(
        RunError, match=r"Nonsense\.check_lengths failed: TypeError: .* takes 1 positional argument"
    ):
        method.check_lengths(PLAN, 9)
    with pytest.raises(UserError, match=r"Attribute\.needs is 3; it must be a method"):
        type("Attribute", (Nonsense,), {"needs": 3})


def test_a_registered_function_must_return_a_method(monkeypatch):
    monkeypatch.setattr("policylab.training.methods.METHODS", {})
    register(Mine, Abstract)
    with pytest.raises(
        RunError, match=r"Abstract, registered for Mine, failed: TypeError: .*abstract.*trainer"
    ):
        method_of(Mine())
    with pytest.raises(UserError, match="Mine is already registered with another method; register it once"):
        register(Mine, Nonsense)
    register(Mine, Abstract)  # the same again, as when a module is imported twice
    monkeypatch.setattr("policylab.training.methods.METHODS", {Mine: lambda algorithm: None})
    with pytest.raises(UserError, match=r"registered for Mine, returned None; it must return Method"):
        method_of(Mine())


# -- a model, a reader and a decoder --------------------------------------------------------------------------


class NoReader:
    packs = False

    def __init__(self, lm):
        self.lm = lm

    def read(self, rollout, *, logits, watch=(), recompute=False):
        return None


class Blind(PackedCausal):
    def read(self, rollout, *, logits, watch=(), recompute=False):
        return self.lm


class Undecided(PackedCausal):
    def decoder(self, dtype):
        return None


class Silent(PackedCausal):
    def decoder(self, dtype):
        return SimpleNamespace(prefill=lambda *_, room: None, step=None, keep=None)


def test_a_reader_has_all_members_and_reads(tiny):
    with pytest.raises(
        UserError, match=r"reader NoReader has no context and no decoder .*readers\.reader\.Reader$"
    ):
        Policy(replace(tiny, reader=NoReader), None)
    policy = Policy(replace(tiny, reader=Blind), None)
    with pytest.raises(UserError, match=r"Blind\.read returned GPT2LMHeadModel.*; it must return Pass$"):
        policy.logprobs_of(trial_rollout(policy.lm), 1.0)


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (Undecided, "decoder NoneType has no keep and no prefill and no step; see .*Decoder"),
        (Silent, "decoder SimpleNamespace has no hidden and no logits; see .*Decoder"),
    ],
)
def test_a_decoder_has_all_members(tiny, reader, message):
    policy = Policy(replace(tiny, reader=reader), None)
    with pytest.raises(UserError, match=message):
        CachedEngine(1.0, 2).sample(policy, policy.prompts([("a", "", None)], None), 1, torch.rand(1, 2))


def nothing():
    return None


def test_a_model_is_a_loaded_model():
    config = OmegaConf.create(
        {"model": {"_target_": f"{__name__}.nothing"}, "hardware": {"precision": "32-true"}}
    )
    with pytest.raises(
        UserError, match=r"test_own_parts\.nothing returned None; it must return LoadedModel$"
    ):
        build_policy(config, None)


# -- an engine ------------------------------------------------------------------------------------------------


class Engine:
    temperature, exact = 1.0, True

    def __init__(self, max_new_tokens=2):
        self.max_new_tokens = max_new_tokens
        self.rollout = None

    def sample(self, policy, prompts, group_size, noise, behaviour=None):
        return self.rollout


def test_an_engine_has_all_members():
    config = OmegaConf.create({"rollout": {"_target_": f"{__name__}.Engine", "group_size": 1}})
    assert engine_of(config).max_new_tokens == 2
    config.rollout["_target_"] = f"{__name__}.Mine"
    with pytest.raises(UserError, match="engine Mine has no exact and no max_new_tokens and no sample"):
        engine_of(config)


def test_an_engine_returns_a_rollout_of_as_many_rows(tiny):
    policy, engine, limit = Policy(tiny, None), Engine(), RowLimit(4)
    prompts = policy.prompts([("a", "", None)], None)
    for rollout, message in [
        (None, r"Engine\.sample returned None; it must return Rollout$"),
        (trial_rollout(policy.lm), r"Engine\.sample returned 3 completions, and 2 were asked for$"),
    ]:
        engine.rollout = rollout
        with pytest.raises(UserError, match=message):
            limit.sample(engine, policy, prompts, 2, torch.rand(2, 2))


# -- parts of an algorithm ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(Advantage):
    answer: object

    def __call__(self, rollout, all_sum):
        return self.answer


@dataclass(frozen=True)
class GivenLoss:
    answer: object
    on_policy: ClassVar[bool] = False

    def loss(self, logprobs, old_logprobs, advantages, mask):
        return self.answer

    def clipped(self, logprobs, old_logprobs, advantages, mask):
        return self.answer


def test_parts_of_an_algorithm_return_a_number_for_each_token(tiny):
    rollout = trial_rollout(tiny.lm).replace(rewards=torch.zeros(3))
    grid, column = torch.zeros(3, 3), torch.zeros(3, 1)
    algorithm = instantiate(algo("reinforce"))
    for answer, message in [
        (grid, r"Given returned tensor.*; it must return Estimate$"),
        (
            Estimate(column, grid),
            r"the advantages of Given: a tensor of shape \(3, 1\); it must be a tensor of .*\(3, 3\)",
        ),
        (Estimate(grid, None), r"the returns of Given: None; it must be a tensor of shape \(3, 3\)"),
    ]:
        with pytest.raises(UserError, match=message):
            replace(algorithm, advantage=Given(answer)).estimate_advantages(rollout, lambda x: x)
    with pytest.raises(
        UserError, match=r"what GivenLoss\.loss returned: a tensor of shape \(3, 1\); it must be"
    ):
        replace(algorithm, surrogate=GivenLoss(column)).loss_terms(
            rollout.replace(advantages=grid), Evaluation(grid, grid, None, None)
        )


# -- a trainer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "Trainer gave None as metrics of an iteration; it must be a dict"),
        ({"train/lr": 0.1}, "Trainer gave no 'tokens' among the metrics of an iteration"),
        ({"tokens": 3, "x": None}, "Trainer gave None as the metric x; it must be one number"),
        ({"tokens": torch.zeros(2)}, r"Trainer gave tensor\(\[0., 0.\]\) as the metric tokens"),
    ],
)
def test_metrics_of_an_iteration_are_numbers(metrics, message):
    check_numbers("Trainer", {"tokens": torch.tensor(3), "train/lr": 0.1})
    with pytest.raises(UserError, match=message):
        check_numbers("Trainer", metrics)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (None, "None"),
        ({"loss": 1.0}, r"\{'loss': 1.0\}"),
        (torch.zeros(3, requires_grad=True), r"a tensor of shape \(3,\)"),
        (torch.zeros(()), r"a tensor of shape \(\)"),
    ],
)
def test_a_loss_is_a_number_with_a_gradient(loss, what):
    def mine(piece):
        return loss

    check_loss(mine, torch.zeros((), requires_grad=True))
    with pytest.raises(
        UserError, match=rf"mine returned {what}; it must return the loss: a tensor of one number"
    ):
        check_loss(mine, loss)


def test_a_part_with_state_has_load_and_unique_names():
    state = RunState.__new__(RunState)
    state.origin, state._config = {}, ""
    for part, message in [
        (SimpleNamespace(state=dict), "run_state.stateful holds SimpleNamespace has no load"),
        (
            SimpleNamespace(state=list, load=None),
            r"SimpleNamespace\.state returned \[\]; it must return dict",
        ),
        (
            SimpleNamespace(state=lambda: {"origin": 1}, load=None),
            r"returned the names \['origin'\], which another",
        ),
    ]:
        state.stateful = [part]
        with pytest.raises(UserError, match=message):
            state.state()


# -- errors in user code ---------------------------------------------------------------------------------------


def careless(rollout):
    return rollout["tokens"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: careless({}), r"^careless failed at \S*test_own_parts\.py:\d+: KeyError: 'tokens'$"),
        (
            lambda: torch.zeros(2) @ torch.zeros(3),
            r" failed at \S*test_own_parts\.py:\d+: RuntimeError: .*size",
        ),
    ],
)
def test_an_error_in_user_code_is_one_line(act, message):
    """Raised by the line itself, or by the library that it calls."""
    with pytest.raises((KeyError, RuntimeError)) as caught:
        act()
    assert re.search(message, one_line(caught.value))
    assert not is_mistake(caught.value), "exit code 1"


def test_an_error_of_this_package_has_its_traceback():
    with pytest.raises(TypeError) as caught:
        cut("text", None)
    assert one_line(caught.value) is None
