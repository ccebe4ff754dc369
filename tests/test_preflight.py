"""The preflight accepts rounding differences, however confident the policy, and finds errors."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch

from policylab.errors import UserError
from policylab.training.preflight import preflight
from small_runs import Changed

#: Factors of the logits: the unchanged policy, and more and more confident ones.
SHARP = (1.0, 4.0, 30.0)


@pytest.fixture(scope="module")
def built():
    """Modules with the trained embedded model, built once per precision."""
    from pathlib import Path

    from conftest import composed
    from policylab.config.build import build

    made = {}
    for precision in ("32-true", "bf16-true"):
        overrides = [
            "algo=grpo", "model=tiny", "hardware=cpu", "callbacks=none", "callbacks.checkpoint=null", "logger.csv=null",
            f"hardware.precision={precision}", "paths.run=nowhere", "validation.prompts=1",
        ]  # fmt: skip
        config = composed("train", tuple(overrides))
        del config.hydra
        experiment = build(config, Path("nowhere"))
        experiment.module.trainer = experiment.trainer
        made[precision] = (experiment.module, list(experiment.data.train[:24]))
    return made


@pytest.fixture(params=["32-true", "bf16-true"])
def checked(request, built):
    """``checked(engine, sharp)`` runs the preflight with the policy's logits times ``sharp``."""
    module, prompts = built[request.param]
    own = module.sampler.engine
    weights = deepcopy(module.state_dict())

    def check(engine=lambda engine, module: engine, sharp=1.0):
        for policy in (module.policy, module.reference):
            with torch.no_grad():
                policy.lm.transformer.ln_f.weight *= sharp
                policy.lm.transformer.ln_f.bias *= sharp
        module.sampler.engine = engine(own, module)
        return preflight(module.sampler, prompts)

    check.module = module
    yield check
    module.sampler.engine = own
    module.load_state_dict(weights)


class Sampler(Changed):
    """An engine that applies a fault only while it samples."""

    def __init__(self, engine, module):
        super().__init__(engine)
        self.module = module
        self.temperature = engine.temperature


class WrongTemperature(Sampler):
    def sample(self, *args):
        return type(self._engine)(0.8, self._engine.max_new_tokens).sample(*args)


class WrongPositions(Sampler):
    def sample(self, policy, *args):
        def later(_, args, kwargs):
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + 1}

        hook = policy.lm.transformer.register_forward_pre_hook(later, with_kwargs=True)
        rollout = self._engine.sample(policy, *args)
        hook.remove()
        return rollout


class ShiftedMask(Sampler):
    def change(self, rollout):
        return rollout.replace(logprobs=rollout.logprobs.roll(1, -1))


class WrongAdapter(Sampler):
    """Adds a low-rank change to the products, as wrong adapters would."""

    def sample(self, policy, *args):
        other = deepcopy(policy)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for block in other.lm.transformer.h:
                weight = block.mlp.c_fc.weight
                change = torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])
                weight += (0.2 * weight.float().std() * change).to(weight)
        return self._engine.sample(other, *args)


FAULTS = [WrongTemperature, WrongPositions, ShiftedMask, WrongAdapter]


@pytest.mark.parametrize("sharp", [SHARP[0], pytest.param(SHARP[1], marks=pytest.mark.slow), SHARP[2]])
def test_a_confident_policy_passes(checked, sharp):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert checked(sharp=sharp).tokens > 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("sharp", [SHARP[0], pytest.param(SHARP[1], marks=pytest.mark.slow)])
def test_faults_are_found(checked, fault, sharp):
    with pytest.raises(UserError, match=r"log-probs recorded while sampling differ .* a token on average"):
        checked(fault, sharp)


@pytest.mark.parametrize("fault", [WrongPositions, WrongAdapter])
def test_an_engine_that_is_not_exact_is_warned_of(checked, fault):
    def inexact(engine, module):
        sampler = fault(engine, module)
        sampler.exact = False
        return sampler

    with pytest.warns(UserWarning, match=r"preflight: .* differ .* recomputed before"):
        checked(inexact)


def test_nan_is_found(checked):
    class NoNumbers(Sampler):
        def change(self, rollout):
            return rollout.replace(logprobs=rollout.logprobs / 0.0)

    with pytest.raises(UserError, match=r"by (nan|inf) a token"):
        checked(NoNumbers)


def test_a_policy_that_has_left_its_reference_is_found(checked):
    with torch.no_grad():
        checked.module.policy.lm.transformer.ln_f.weight *= 1.5
    with pytest.raises(UserError, match="the untrained policy differs from its reference"):
        checked()
