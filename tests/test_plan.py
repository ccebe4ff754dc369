"""Plans compared with built models and with hand-computed sums, and the text that they must print."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import fresh_policy
from policylab.config.build import build_policy, instantiate, model_config
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models.critic import value_model
from policylab.models.decoders import GPT2, Llama
from policylab.models.layers import freeze_below
from policylab.models.size import CriticSize, Size, critic_size, size_of
from policylab.planning.advice import changes, helpful
from policylab.planning.job import Hardware, Job
from policylab.planning.memory import GIB, checkpoint_copy, moments, peak
from policylab.planning.plan import plan_job, problem_of, rates_for
from policylab.planning.read import describe, outline
from policylab.planning.work import Rates, exchanged, work
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.training.methods import Cost, Needs, method_of
from small_runs import PRESETS, quick

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "data" / "models" / "smollm2"
#: Models with embedded or random weights.
BUILT = ["tiny", "walker", "tiny_scratch", "walker_scratch", "gpt2_scratch"]
OTHERS = {"gpt2", "gpt2-medium", "hf"}
LLAMA = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
#: Hidden size 4, one layer, MLP of 16, 10 words, all in fp32: 4 x 3 x 4 + 4 x 4 + 2 x 4 x 16 = 192 weights in the
#: linear layers, 40 in the tied embeddings, and 24 in biases and norms.
SIZE = Size(
    parameters=256, trained=256, adapters=0, weight_bytes=4, layers=1, hidden=4, ffn=16, gated=False, heads=2,
    kv_heads=2, head_dim=2, vocab=10, layer_parameters=200, linear=192, qkv=48, lora=1024, tied=True,
    network=GPT2, packs=True, eager=False,
)  # fmt: skip
#: Two prompts of three tokens, two completions of five each, in one update.
PLAN = BatchPlan(prompts=2, group_size=2, epochs=1, minibatches=1, processes=1)
HARDWARE = Hardware(
    gpu=True, memory=80 * GIB, host_memory=None, local=1, sharded=False, offload=False, precision="32-true",
    gradient_checkpointing=False,
)  # fmt: skip
JOB = Job(
    "a folder", False, SIZE, CriticSize(), HARDWARE, PLAN, prompt_tokens=3.0, longest_prompt=3, new_tokens=5,
    needs=Needs(reference="frozen"), cost=Cost(forwards=1), engine=CachedEngine(1.0, 5), sampling_bytes=4,
    micro_batch_tokens=None, max_rows=None, validation=1, checkpoints=True, keys=frozenset(),
)  # fmt: skip


def by_moment(job):
    return {moment.name: moment.parts for moment in moments(job)}


def folder_of(path, size):
    """A folder that contains only a config."""
    path.mkdir()
    words = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **LLAMA[size]}
    (path / "config.json").write_text(json.dumps(words))
    return [f"model.path={path}", f"model.name=llama-{size}", "model=hf"]


def big(path, size, *more):
    return [
        *folder_of(path / size, size), "algo=grpo", "hardware=fsdp", "hardware.devices=8", "plan_memory=80",
        "plan_flops=4e14", "rollout.prompts=128", "rollout.max_new_tokens=512", "hardware.precision=bf16-true", *more,
    ]  # fmt: skip


# -- what models are made of -------------------------------------------------------------------------------


def test_every_model_config_is_planned_for():
    assert {p.stem for p in (ROOT / "configs" / "model").glob("*.yaml")} == {*BUILT, *OTHERS, "smollm2"}


@pytest.mark.parametrize("name", [*BUILT, "smollm2"])
def test_parameters_are_those_of_the_model(compose, name):
    if name == "smollm2" and not SMOLLM2.is_dir():
        pytest.skip("its weights are not here")
    task = "random_walks" if name.startswith("walker") else "reviews"
    config = compose([f"task={task}", f"model={name}"])
    size = size_of(outline(config).lm)
    loaded = instantiate(model_config(config))
    assert size.parameters == sum(p.numel() for p in loaded.lm.parameters())
    assert size.network is (Llama if name == "smollm2" else GPT2)


@pytest.mark.parametrize("own_layers", [0, 1, "all"])
@pytest.mark.parametrize("algo", ["ppo", "dqn"])
def test_a_critics_parameters_are_those_it_will_have(compose, algo, own_layers):
    part = "critic" if algo == "ppo" else "dueling"
    overrides = [f"algo={algo}", "model=tiny", f"algo.{part}.own_layers={own_layers}"]
    config = compose([*overrides, "algo/critic=separate"] if algo == "ppo" else overrides)
    loaded = instantiate(model_config(config))
    critic = value_model(loaded.lm, own_layers, init=None)
    need = method_of(instantiate(config.algo)).needs().critic
    planned = critic_size(loaded.lm, size_of(loaded.lm), need.own_layers)
    assert planned.parameters == sum(p.numel() for p in critic.parameters())


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_frozen_layers_are_counted(request, model):
    policy = fresh_policy(request.getfixturevalue(model))
    planned = size_of(policy.lm, None, 1)
    freeze_below(policy.lm, 1)
    assert planned.trained == sum(p.numel() for p in policy.lm.parameters() if p.requires_grad)


def test_adapters_are_counted(compose):
    pytest.importorskip("peft")
    config = compose(["model/adapter=lora", "model.adapter.rank=3", "optim.frozen_layers=1"])
    policy = build_policy(config, method_of(instantiate(config.algo)).needs().critic)
    assert describe(config).size.trained == sum(p.numel() for p in policy.lm.parameters() if p.requires_grad)


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_a_layer_keeps_what_autograd_saves(request, model):
    """Counts distinct memory; the plan ignores a few small numbers per token."""
    policy = fresh_policy(request.getfixturevalue(model))
    prompts = [Prompt(i, "", tuple(range(i + 1, i + 9)), None, ()) for i in range(4)]
    rollout = CachedEngine(1.0, 24).sample(policy, prompts, 2, uniforms(0, TRAIN, 0, range(8), 24))
    own, saved, tensors = {p.data_ptr() for p in policy.parameters()}, {}, []

    def note(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            saved[memory.data_ptr()] = memory.nbytes()
            tensors.append(x)  # kept alive, so that no two have the same address
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None)
    size = size_of(policy.lm)
    tokens = 4 * 8 + int((rollout.lengths - 1).sum())
    new = float(rollout.lengths.float().mean())
    kept = size.keeps(4, 8, new, 32, recomputes_layers=False, critic_layers=0)
    assert tokens * kept == pytest.approx(sum(saved.values()), rel=0.1)


# -- sums done by hand -------------------------------------------------------------------------------------


def test_what_stays_in_memory():
    parts = by_moment(JOB)["rollout"]
    assert parts["weights"] == 256 * 4
    assert parts["reference"] == 256 * 4
    assert parts["optimizer"] == 2 * 256 * 4
    assert checkpoint_copy(JOB) == 3 * 256 * 4  # weights and both moments


def test_what_stays_in_memory_in_bf16():
    """Weights of 2 bytes; two moments and a copy of the weights in fp32, and the average that a reference moves by."""
    job = replace(JOB, size=replace(SIZE, weight_bytes=2), needs=Needs(reference="moving"))
    parts = by_moment(job)["rollout"]
    assert parts["weights"] == 256 * 2
    assert parts["reference"] == 256 * (2 + 4)
    assert parts["optimizer"] == 3 * 256 * 4
    assert checkpoint_copy(job) == 256 * (2 + 6) + 3 * 256 * 4


def test_a_rollout_by_hand():
    """Keys and values: 2 x 1 layer x 2 heads x 2 numbers x 4 bytes = 32 a token, of 4 x 5 own ones and 2 x 3
    of prompts. Logits: 4 rows x 10 words x 4 bytes, twice."""
    parts = by_moment(JOB)["rollout"]
    assert parts["KV cache"] == 32 * (4 * 5 + 2 * 3)
    assert parts["logits"] == 2 * 4 * 10 * 4
    assert "weights for sampling" not in parts
    on_cpu = by_moment(replace(JOB, hardware=replace(HARDWARE, gpu=False)))["rollout"]
    assert on_cpu["weights for sampling"] == (192 + 40) * 4


def test_an_engine_states_its_own_memory():
    engine = SimpleNamespace(
        memory=lambda size, piece: {"tables": piece.rows},
        reserved=lambda size, piece, device_memory: {"reserve": device_memory / 2},
    )
    found = by_moment(replace(JOB, engine=engine))
    assert found["rollout"]["tables"] == 4
    assert "KV cache" not in found["rollout"]
    assert all(parts["reserve"] == 40 * GIB for parts in found.values())


def test_an_update_by_hand():
    """Tokens: 2 prompts x 3 + 4 completions x 4 = 22, without the last token. A layer keeps 2 x 4 for norms,
    3 x 4 before products, 2 x 16 in the MLP, 3 x 4 queries, keys, values, 4 out of attention, and 8 x 1.6 keys and
    values beside the prompt's: 80.8 numbers; embeddings, norm and head 4 x 4 more."""
    parts = by_moment(JOB)
    assert JOB.pass_tokens == 22
    assert parts["backward"]["activations"] == pytest.approx(22 * 4 * (80.8 + 16))
    assert parts["backward"]["logits"] == 2 * (4 * 5 * 10 * 4)
    assert parts["step"]["gradients"] == 256 * 4


def test_work_by_hand():
    """Forward: 2 operations a weight of 192, and attention over 3 + 5 / 2 tokens of 4 numbers, 4 operations each: 472 a
    token. 26 tokens in the rollout and 22 in a pass; the head 80 for each of 20 actions."""
    needed = work(JOB, Rates(1e3, 1e9))
    assert needed.flops["rollout"] == 26 * 472 + 20 * 80
    assert needed.flops["evaluation"] == 22 * 472 + 20 * 80
    assert needed.flops["update"] == 3 * (22 * 472 + 20 * 80)
    assert needed.tokens == 20
    assert needed.seconds["rollout"] == pytest.approx((26 * 472 + 20 * 80) / 1e3, rel=0.1)


def test_processes_share():
    ddp = replace(JOB, plan=replace(PLAN, prompts=8, processes=4), hardware=replace(HARDWARE, local=4))
    fsdp = replace(ddp, hardware=replace(ddp.hardware, sharded=True))
    assert by_moment(ddp)["rollout"]["optimizer"] == 2 * 256 * 4
    assert by_moment(ddp)["rollout"]["gradients"] == 256 * 4  # the buckets stay
    assert by_moment(fsdp)["rollout"]["optimizer"] == 2 * 256 * 4 / 4
    assert by_moment(fsdp)["rollout"]["gathered weights"] == 256 * 4
    assert by_moment(fsdp)["step"]["gradients"] == 256 * 4 / 4
    assert by_moment(ddp)["rollout"]["KV cache"] == by_moment(JOB)["rollout"]["KV cache"]
    assert exchanged(JOB) == 0
    assert exchanged(ddp) == 2 * 256 * 4
    # weights once to sample, once for the reference and twice for the pass; gradients once
    assert exchanged(fsdp) == 5 * 256 * 4


# -- properties --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_changes_save_the_printed_memory(compose, tmp_path):
    """A plan with the change has the printed peak."""
    for overrides in (big(tmp_path, "7b", "hardware.strategy=ddp"), ["algo=ppo", "algo/critic=separate"]):
        job = describe(compose(overrides))
        assert helpful(job) or not job.hardware.gpu
        for change in changes(job):
            if "num_nodes" in change.overrides or "adapter" in change.overrides:
                continue
            changed = describe(compose([*overrides, *change.overrides.split()]))
            assert peak(changed).total == pytest.approx(change.peak, rel=0.02), change.overrides


def test_only_changes_of_a_runs_own_settings_are_listed(compose):
    """Q-learning without a target network keeps a reference, but has no setting algo.kl."""
    words = {
        algo: {change.overrides for change in helpful(describe(compose([f"algo={algo}", *more])))}
        for algo, more in {
            "grpo": ["model=gpt2_scratch"],
            "ppo": ["algo/critic=separate"],
            "soft_q": ["algo/dueling=value_head", "algo.dueling.own_layers=1"],
        }.items()
    }
    assert "algo/kl=none algo/reference=none" in words["grpo"]
    assert "algo/critic=shared_trunk" in words["ppo"]
    assert not any(word.startswith("algo/") for word in words["soft_q"])
    compose(["algo=soft_q", *" ".join(words["soft_q"]).split()])


def test_more_own_layers_than_there_are_are_refused_alike(compose):
    loaded = instantiate(model_config(compose(["model=tiny"])))
    for refused in (
        lambda: critic_size(loaded.lm, size_of(loaded.lm), 99),
        lambda: value_model(loaded.lm, 99, None),
    ):
        with pytest.raises(
            UserError, match=r"^own_layers=99, but the policy has \d+ layers; take at most \d+, or all"
        ):
            refused()


def test_more_processes_take_less_each(compose, tmp_path):
    overrides = big(tmp_path, "7b")
    peaks = []
    for nodes in (1, 2, 4):
        job = describe(compose([*overrides, f"hardware.num_nodes={nodes}"]))
        assert job.plan.processes == 8 * nodes
        peaks.append(peak(job).total)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[2]


@pytest.mark.parametrize("preset", quick(PRESETS))
def test_every_preset_is_planned(compose, preset):
    job = describe(compose([f"algo={preset}", "task=random_walks", "rollout.group_size=4"]))
    assert all(size >= 0 for moment in moments(job) for size in moment.parts.values())
    assert work(job, Rates.of(1e12)).total_seconds > 0


def test_processes_of_a_cpu_share_its_cores(compose, monkeypatch):
    """More processes than cores are together not faster than one."""
    monkeypatch.setattr(Rates, "measured", lambda *_: Rates(1e9, 1e9))
    seconds = []
    for devices in (1, 8):
        config = compose(["hardware=ddp_cpu", f"hardware.devices={devices}", "plan_memory=64"])
        job = describe(config)
        needed = work(job, rates_for(config, job))
        seconds.append(sum(needed.flops.values()) / job.plan.processes / rates_for(config, job).flops)
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-3)


# -- printed text, and files ---------------------------------------------------------------------------------


def test_no_weights_are_loaded_and_the_plan_is_complete(compose, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    plan_job(compose(["plan=true", "plan_flops=1e11"]))
    said = capsys.readouterr().out
    for word in (
        "1,071,872", "weights", "reference", "critic", "optimizer", "gradients", "activations", "KV cache", "logits",
        "checkpoint copy", "3,072 tokens sampled at most, 4 updates", "1e+11 operations", "fits:",
    ):  # fmt: skip
        assert word in said, word


def test_a_folder_with_a_config_alone_is_enough(compose, tmp_path, capsys):
    plan_job(compose([*big(tmp_path, "7b"), "plan=true"]))
    said = " ".join(capsys.readouterr().out.split())  # a long path wraps the line
    assert "6,738,415,616" in said
    assert "8 x GPU of 80 GiB" in said
    assert "counted with another tokenizer" in said


def test_an_engine_that_holds_its_own_model_needs_a_larger_gpu():
    engine = SimpleNamespace(reserved=lambda *_: {"my engine": 90.0 * GIB}, memory=lambda *_: {})
    problem = problem_of(replace(JOB, engine=engine))
    assert "90.0 GiB, is my engine: with every engine, rollouts need the whole model on each GPU" in problem


def test_a_plan_that_no_setting_makes_fit_says_so(compose, tmp_path):
    """70 B in bf16 is 128 GiB, and a rollout gathers all of it."""
    with pytest.raises(
        UserError, match=r"rollout takes 1\d\d\.\d of .* 128\.\d GiB, is gathered weights: .* smaller model"
    ):
        plan_job(compose([*big(tmp_path, "70b", "hardware.num_nodes=8"), "plan=true"]))


def test_a_plan_that_does_not_fit_names_the_settings_that_help(compose, tmp_path):
    job = describe(compose(big(tmp_path, "7b", "hardware.strategy=ddp")))
    problem = problem_of(job)
    assert "the plan does not fit" in problem
    assert "take model/adapter=lora" in problem
    assert problem_of(replace(job, hardware=replace(job.hardware, memory=10_000 * GIB))) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=ddp", "hardware.devices=8"], r"no GPU here; .* plan_memory=80"),
        (["hardware=ddp", "plan_memory=80"], r"hardware.devices=auto, and there is no GPU here to count"),
        (["hardware=gpu", "plan_memory=80"], r"no GPU here to measure; .* plan_flops=4e14"),
        (["plan_memory=-1"], "plan_memory is -1; it must be above 0"),
        (["plan_flops=fast"], "plan_flops='fast' is not a number"),
        (["plan=maybe"], "plan=maybe is neither true nor false"),
        (["model=hf", "model.name=nobody/nothing"], "nobody/nothing is not in the local cache"),
        (["model=hf", "model.name=a", "model.path=nowhere"], "model.path=nowhere: there is no such folder"),
        (["rollout.max_new_tokens=500"], r"need \d+ positions, but the model has 128"),
    ],
)
def test_refused(compose, monkeypatch, overrides, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        plan_job(compose(["plan=true", *overrides]))


@pytest.mark.slow
def test_a_plan_leaves_nothing_and_its_exit_code_says_whether_it_fits(tmp_path):
    words = ["plan=true", "plan_flops=1e11", "plan_memory=0.1", f"paths.logs={tmp_path}/logs"]
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=_without_gpu(tmp_path),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the plan does not fit")
    assert "does not fit: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def _without_gpu(folder):
    import os

    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder)}
