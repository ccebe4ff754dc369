"""How often an iteration would wait for an accelerator, counted on the CPU with a tensor class in its place."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

from policylab.functional import ragged
from small_runs import algo, quiet, small

#: Functions that return a number or a list to Python, or a tensor whose size depends on values.
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "cpu")


class Host(torch.Tensor):
    """A tensor that was copied to the CPU, or is computed from one: reading it does not wait."""


@pytest.fixture
def waits(monkeypatch):
    """Counts the waits by the last function of ours in the call stack."""
    counted = Counter()

    def count():
        frames = [f for f in traceback.extract_stack() if "/policylab/" in f.filename]
        if frames:
            counted[f"{Path(frames[-1].filename).stem}.{frames[-1].name}"] += 1

    def watched(name):
        original = getattr(torch.Tensor, name)

        def ask(self, *args, **kwargs):
            if not isinstance(self, Host):
                count()
            result = original(self, *args, **kwargs)
            return result.as_subclass(Host) if name == "cpu" else result

        return ask

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    pick, make, send = torch.Tensor.__getitem__, torch.tensor, ragged.on_device
    noise = torch.from_numpy

    def picked(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if any(type(part) is torch.Tensor and part.dtype == torch.bool for part in parts):
            count()
        return pick(self, index)

    def made(*args, **kwargs):
        if "device" in kwargs:
            count()
            return make(*args, **kwargs)
        return make(*args, **kwargs).as_subclass(Host)

    def sent(tensors, device):
        count()
        return [x.as_subclass(torch.Tensor) for x in send(tensors, device)]

    monkeypatch.setattr(torch.Tensor, "__getitem__", picked)
    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(torch, "from_numpy", lambda array: noise(array).as_subclass(Host))
    for module in (
        "models.readers.packing",
        "models.readers.packed",
        "training.micro_batches",
        "training.updater",
    ):
        monkeypatch.setattr(f"policylab.{module}.on_device", sent)
    return counted


def iteration(preset, waits, prompts):
    """The counts of the second iteration, with sampling separate."""
    from policylab.config.build import build

    sizes = {"iterations": 2, "rollout.prompts": prompts, "rollout.group_size": 4}
    with quiet():
        experiment = build(small(algo(preset), sizes), Path("nowhere"))
        module = experiment.module
        experiment.trainer.limit_val_batches = 0
        module._checked = True
        train, sample = module.training_step, module.sampler.engine.sample

        class Sampler:
            temperature, max_new_tokens, exact = 1.0, module.sampler.engine.max_new_tokens, True

            def sample(self, policy, prompts, group_size, noise, behaviour=None):
                before = waits.copy()
                on_device = noise.as_subclass(torch.Tensor)
                rollout = sample(policy, prompts, group_size, on_device, behaviour)
                waits.clear()
                waits.update(before)
                return rollout

        def step(batch, batch_idx):
            waits.clear()
            return train(batch, batch_idx)

        module.sampler.engine, module.training_step = Sampler(), step
        experiment.trainer.fit(module, datamodule=experiment.data)
    assert module.iteration == 2
    return Counter(waits), module


def test_waits_of_ppo_by_hand(waits):
    """Two epochs of two minibatches, each in one pass, and one pass of the reference."""
    counted, module = iteration("ppo", waits, 32)
    epochs, updates, passes = 2, 4, 4 + 1
    assert (module.plan.epochs, module.plan.updates, module.plan.sequences) == (epochs, updates, 128)
    assert counted == {
        "sampler.completions": 1,  # text for 128 rewards
        "sampler.rewarded": 1,  # and these back
        "metrics.describe": 1,
        "collector.sample": 1,  # the groups
        "updater.minibatches": 2 * epochs,  # to the CPU and back
        "micro_batches.cut": 2 * passes,
        "rollout.select": passes,
        "packed.lay_out": 2 * passes,
        "packing.of": passes,
        "stepper.apply_gradients": updates,  # is all finite?
        "means.reduce": 1,  # all means
        "metrics.on_host": 1,  # all other metrics
    }


@pytest.mark.parametrize("preset", ["ppo", "dapo", "dr_grpo", "dqn"])
def test_as_many_whatever_the_number_of_sequences(waits, preset):
    """The count must not grow with them: that would be one wait per sequence."""
    few, _ = iteration(preset, waits, 4)
    many, _ = iteration(preset, waits, 16)
    assert few["sampler.completions"] == many["sampler.completions"]
    assert sum(many.values()) <= sum(few.values()) + 4, many - few


def test_a_samples_length_counts_the_policys_tokens_alone(tmp_path):
    """Here an environment wrote the first position."""
    from policylab.config.build import build
    from policylab.rewards.base import Scores
    from policylab.rollouts.noise import TRAIN
    from policylab.training.metrics import describe
    from policylab.training.sampler import rewarded

    with quiet():
        module = build(small(algo("ppo"), {}), tmp_path).module
    prompt = module.policy.prompts([("a", "", None)], None)
    rollout = module.sampler.generate(prompt, 2, TRAIN, range(2))
    mask = rollout.action_mask.clone()
    mask[:, 0] = False
    rollout = rewarded(rollout.replace(action_mask=mask), Scores([0.5, 1.0], {"part": [0.25, 0.0]}))
    completions = module.sampler.completions(rollout, prompt * 2)
    samples = describe(rollout, completions, "train", 1)
    assert [sample.length for sample in samples] == (rollout.lengths - 1).tolist()
    assert [(s.reward, s.parts, s.kl) for s in samples] == [
        (0.5, {"part": 0.25}, None),
        (1.0, {"part": 0.0}, None),
    ]
