"""A wrong config gives a message of one line, before a model is loaded."""

from __future__ import annotations

import pytest

from policylab.config import hardware
from policylab.config.settle import settle
from policylab.distributed.world import World
from policylab.errors import RunError, UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=abc"], r"optim\.lr='abc' is not a number"),
        (["+optim.learning_rate=1"], r"optim\.learning_rate is not a key of AdamW; did you mean optim\.lr\?"),
        (["+optim.warm_up=1"], r"did you mean optim\.warmup\?"),
        (["algo.kl.estimator=k4"], r"algo\.kl\.estimator='k4' is not one of k1, k2, k3, exact"),
        (["~algo.advantage.lam"], r"algo\.advantage\.lam is missing; GAE needs it"),
        (["algo.update.epochs=2.5"], r"algo\.update\.epochs=2\.5 is not a whole number"),
        (
            ["algo._target_=policylab.algorithms.PPO"],
            r"algo\._target_=policylab\.algorithms\.PPO cannot be imported: there is no PPO in policylab\.algorithms",
        ),
        (
            ["optim._target_=policylab.modules.optimizer.AdamW"],
            r"there is no module policylab\.modules\.optimizer; it is policylab\.training\.optimizer\.AdamW now$",
        ),
        (["reward._target_=nowhere.mine"], "cannot be imported: there is no module nowhere; looked in"),
        (
            ["reward._target_=policylab.rewards.sentiment.sentimental"],
            r"did you mean .*sentiment\.sentiment\?",
        ),
        (
            ["reward._target_=policylab.rewards.sentiment"],
            r"reward\._target_=policylab\.rewards\.sentiment is of type module; it must be a function or a class",
        ),
        (["reward._partial_=false"], "if sentiment is the reward itself, give reward._partial_=true"),
        (
            ["reward._target_=policylab.rewards.base.Score"],
            "reward Score is a class: give reward._partial_=false",
        ),
        (["reward._target_=policylab.rewards.base.checked"], "cannot be called with completions alone"),
        (["algo/surrogate=logprob"], "right for only one update"),
        (["algo/critic=none"], "needs a critic"),
        (["iterations=0"], "iterations is 0"),
        (["seed=-1"], "seed is -1"),
        (["validation.every=0"], r"validation\.every is 0"),
        (["rollout.temperature=0"], "it must be above 0"),
        (["algo.update.minibatches=7"], "cannot be cut into 7 minibatches"),
        (["seed=abc"], "seed='abc' is not a whole number"),
        (["iterations=2.5"], r"iterations=2\.5 is not a whole number"),
        (["rollout.prompts=0"], r"rollout\.prompts is 0; it must be at least 1"),
        (["+reward.words=3"], r"reward\.words is not a key of sentiment; it has none"),
        (["+foo=1"], "foo is not a key of the config"),
        (["tags=a"], r"tags='a' is not a list"),
        (["hardware.devices=two"], r"hardware\.devices='two' is not a whole number"),
        (["hardware.strategy=zero"], r"hardware\.strategy=zero is not one of auto, ddp, fsdp"),
        (["hardware.precision=fp8"], r"hardware\.precision=fp8 is not one of 32-true, bf16-mixed, bf16-true"),
        (["hardware.max_restarts=-1"], r"hardware\.max_restarts is -1; it must be at least 0"),
        (["hardware.cpu_offload=true"], r"hardware\.cpu_offload=true needs hardware\.strategy=fsdp"),
        (
            ["hardware.strategy=fsdp", "hardware.devices=2", "algo=trpo"],
            "a trust region works on all weights as one vector",
        ),
        (
            ["hardware.strategy=fsdp", "hardware.devices=2", "model/adapter=lora"],
            "cannot export the policy yet",
        ),
        (["algo.advantage.gamma=2"], r"algo\.advantage\.gamma is 2; it must be at least 0 and at most 1"),
        (["algo.surrogate.clip_low=-1"], r"algo\.surrogate\.clip_low is -1"),
        (
            ["algo/kl=in_reward_adaptive", "algo.kl.controller.target=0"],
            r"target is 0(\.0)?; it must be above 0",
        ),
        (["optim.betas=[0.9]"], r"optim\.betas is"),
        (["optim.max_grad_norm=0"], r"optim\.max_grad_norm is 0; it must be above 0"),
        (["algo.kl.estimator=k3"], "does not have the KL's gradient"),
        (
            ["rollout.max_new_tokens=500"],
            r"1536 of 1536 rows of train do not fit the 128 positions of the model",
        ),
        (["task.too_long=cut"], "task.too_long=cut is not one of drop, truncate, refuse"),
        (["algo=sft"], "has no completion, and algo=sft trains on completions"),
        (["max_tokens=0"], "max_tokens is 0; it must be at least 1"),
        (["max_tokens=1e4"], r"max_tokens=10000\.0 is not a whole number"),
        (["algo=sft", "task=random_walks", "max_tokens=100"], "algo=sft samples none; take max_tokens=null"),
        (["optim.schedule=square"], "is not one of constant, linear, cosine"),
    ],
)
def test_refused(compose, tmp_path, overrides, message):
    from policylab.config.build import build

    with pytest.raises(UserError, match=message):
        build(settle(compose(overrides)), tmp_path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "import a_missing_package",
            r"failed at .*broken_1\.py:1: ModuleNotFoundError: .*'a_missing_package'",
        ),
        ("raise StopIteration", r"failed at .*broken_2\.py:1: StopIteration"),
        ("def mine(completions:", r"failed at .*broken_3\.py:1: SyntaxError: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_blamed_once(
    compose, tmp_path, monkeypatch, caplog, request, module, message
):
    """The message names the missing module, not the one that imports it, and has no text of Hydra's."""
    from policylab.config.build import build

    name = f"broken_{request.node.callspec.indices['module'] + 1}"
    (tmp_path / f"{name}.py").write_text(module + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=rf"^reward\._target_={name}\.mine cannot be imported: it {message}"):
        build(compose([f"reward._target_={name}.mine"]), tmp_path)
    assert not caplog.records


def test_an_error_of_a_users_class_while_it_is_built_is_one_line(compose, tmp_path):
    from policylab.config.build import build

    mine = ["reward._target_=test_bad_config.Unbuilt", "reward._partial_=false"]
    with pytest.raises(
        RunError,
        match=r"test_bad_config\.Unbuilt could not be built: it failed at .*\.py:\d+: StopIteration$",
    ):
        build(compose(mine), tmp_path)


class Unbuilt:
    def __init__(self) -> None:
        raise StopIteration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=gpu"], "torch sees no GPU"),
        (["hardware=ddp"], "torch sees no GPU"),
        (["hardware=cpu", "hardware.num_nodes=2"], "start it on each machine with torchrun --nnodes=2"),
        (["hardware=cpu", "hardware.num_nodes=auto"], "takes the processes that SLURM has started"),
        (["hardware=cpu", "hardware.strategy=fsdp"], "and there is one; take hardware.devices=2 or more"),
    ],
)
def test_impossible_numbers_of_processes_are_refused(compose, monkeypatch, overrides, message):
    monkeypatch.setattr(hardware, "gpus", lambda: 0)
    with pytest.raises(UserError, match=message):
        hardware.with_devices(compose(overrides))


def test_devices_are_counted_where_the_run_starts(compose, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: 4)
    assert hardware.processes(hardware.with_devices(compose(["hardware=ddp"]))) == 4
    assert hardware.with_devices(compose(["hardware.devices=2"])).hardware.accelerator == "gpu"
    monkeypatch.setattr(hardware, "world", lambda: World(rank=3, size=6, local_rank=1, local_size=2))
    there = hardware.with_devices(compose(["hardware=slurm"])).hardware
    assert (there.devices, there.num_nodes) == (2, 3)


def test_many_more_processes_than_cores_are_refused(compose, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: 0)
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    assert hardware.with_devices(compose(["hardware.devices=8"])).hardware.devices == 8
    with pytest.raises(
        UserError, match=r"hardware\.devices=99 on the CPU, and this machine has 2 cores; take at most"
    ):
        hardware.with_devices(compose(["hardware.devices=99"]))
