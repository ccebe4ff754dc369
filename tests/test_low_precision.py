"""hardware.precision=bf16-true: weights change as in fp32, because steps are added to an fp32 copy."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policylab.training.average import Average
from policylab.training.optimizer import MasterAdamW
from small_runs import algo, flat, levels, quiet, small

RATE = 1e-5
STEPS = 24


def gradients(weight: Tensor) -> Iterator[Tensor]:
    """bf16 noise around a direction."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(weight.shape, generator=generator)
    for _ in range(STEPS):
        yield (direction + torch.randn(weight.shape, generator=generator)).bfloat16()


def walked(dtype: torch.dtype, kind: type[torch.optim.AdamW]) -> tuple[Tensor, torch.optim.AdamW]:
    """The weight after 24 steps at a rate below bf16's resolution."""
    weight = nn.Parameter(
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(0.1).bfloat16().to(dtype)
    )
    optimizer = kind([weight], lr=RATE, fused=True)
    for gradient in gradients(weight):
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return weight.detach(), optimizer


def test_bf16_weights_step_as_fp32_weights_do() -> None:
    start, _ = walked(torch.float32, lambda weights, **_: torch.optim.SGD(weights, lr=0.0))  # type: ignore[arg-type]
    right, _ = walked(torch.float32, torch.optim.AdamW)
    rounded, optimizer = walked(torch.bfloat16, MasterAdamW)
    (state,) = optimizer.state.values()
    assert torch.equal(state["master"], right)
    assert torch.equal(rounded, right.bfloat16())
    lost, _ = walked(torch.bfloat16, torch.optim.AdamW)  # what it is for
    assert (lost.float() != start).float().mean() < 0.5 < (right != start).float().mean()


def test_its_state_comes_back_to_the_bit() -> None:
    weight, whole = walked(torch.bfloat16, MasterAdamW)
    (saved,) = copy.deepcopy(whole.state_dict())["state"].values()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    other = nn.Parameter(weight.clone())
    again = MasterAdamW([other], lr=RATE, fused=True)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    for name, value in again.state[other].items():
        assert torch.equal(value, saved[name])
        assert value.dtype == torch.float32


def test_a_slow_network_follows_in_fp32() -> None:
    slow = nn.Linear(32, 32).bfloat16()
    fast = copy.deepcopy(slow)
    with torch.no_grad():
        fast.weight.mul_(1.25)
    slow32, fast32, start = copy.deepcopy(slow).float(), copy.deepcopy(fast).float(), slow.weight.clone()
    average, plain = Average(slow, fast), Average(slow32, fast32)
    assert not list(plain.buffers())
    for _ in range(20):
        average.move(slow, fast, 1e-3)
        plain.move(slow32, fast32, 1e-3)
    assert torch.allclose(dict(average.named_buffers())["weight"], slow32.weight, rtol=1e-6)
    assert torch.equal(slow.weight, slow32.weight.bfloat16())
    assert not torch.equal(slow.weight, start)


# Whole runs


def experiment(preset: str, options: tuple[str, ...], folder: Path, precision: str, **changes: Any) -> Any:
    from policylab.config.build import build

    config = small(algo(preset, *options), {"hardware.precision": precision, **changes})
    with quiet():
        built = build(config, folder)
    built.module.sampler.scorer.reward = levels
    built.module._checked = True
    built.trainer.limit_val_batches = 0
    return built


def run(built: Any, start: Path | None = None) -> Any:
    with quiet():
        built.trainer.fit(built.module, datamodule=built.data, ckpt_path=start, weights_only=True)
    return built.module


def test_a_run_in_bf16_moves_its_weights_as_one_in_fp32(tmp_path: Path) -> None:
    settings = {"iterations": 10, "optim.lr": RATE, "optim.eps": 1e-8}
    moves = []
    for precision in ("32-true", "bf16-true"):
        module = experiment("sft", (), tmp_path, precision, **settings).module
        start = flat(module.policy.parameters()).float()
        built = experiment("sft", (), tmp_path, precision, **settings)
        module = run(built)
        state = module.optimizers().optimizer.state
        end = flat(state[weight].get("master", weight) for weight in module.policy.parameters())
        moves.append(end - start)
    fp32, bf16 = moves
    changed = [float((move != 0).float().mean()) for move in moves]
    assert changed[1] == pytest.approx(changed[0], abs=0.02)
    assert float(torch.cosine_similarity(fp32, bf16, dim=0)) > 0.9
    assert float(bf16.norm() / fp32.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("preset", "options", "changes"),
    [
        ("grpo", ("algo/reference=moving",), {}),
        ("dqn", (), {"algo.target.rate": 1e-3, "algo.target.every": 1}),
    ],
    ids=["moving reference", "target network"],
)
def test_a_run_in_bf16_resumes_to_the_bit(
    preset: str, options: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    from policylab.callbacks.checkpoint import Checkpoint
    from policylab.runs.checkpoints import LAST, PREVIOUS

    ends = []
    for name in ("through", "resumed"):
        built = experiment(preset, options, tmp_path / name, "bf16-true", **changes)
        folder = tmp_path / name / "checkpoints"
        start = None
        if name == "resumed":
            folder.mkdir(parents=True)
            start = tmp_path / "through" / "checkpoints" / PREVIOUS
            shutil.copy(start, folder / LAST)
        keeps = Checkpoint(str(folder.parent), every=1, monitor="val/reward", mode="max", export=False)
        built.trainer.callbacks.append(keeps)
        module = run(built, start)
        averages = dict(module.average.named_buffers())
        assert averages
        assert {value.dtype for value in averages.values()} == {torch.float32}
        ends.append((module, torch.cat([flat(module.parameters()), flat(averages.values())])))
    assert torch.equal(ends[0][1], ends[1][1])
    states = [list(module.optimizers().optimizer.state.values()) for module, _ in ends]
    for ours, theirs in zip(*states, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
