"""Options that save memory or time and must not change results: layers that are recomputed, frozen or compiled, and
log-probs that are recomputed only when necessary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import fresh_policy
from policylab.config.settle import settle
from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models.layers import decoder_layers, freeze_below
from policylab.models.readers import PackedCausal, PaddedCausal
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.noise import TRAIN, uniforms
from small_runs import quick

PROMPTS = [Prompt(i, "", tuple(range(1, 3 + i)), None, ()) for i in range(4)]
SMALL = [
    "hardware=cpu", "iterations=2", "callbacks=none", "callbacks.checkpoint=null", "rollout.prompts=4",
    "rollout.group_size=2", "rollout.max_new_tokens=8", "validation.prompts=4",
]  # fmt: skip


@pytest.fixture
def build_run(compose, tmp_path):
    def build_it(*overrides):
        from policylab.config.build import build

        config = compose([*SMALL, *overrides])
        Path(config.paths.run).mkdir(exist_ok=True)
        return build(config, tmp_path)

    return build_it


def weights(experiment):
    experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    return torch.cat([p.detach().flatten() for p in experiment.module.policy.parameters()])


def gradient(policy):
    rollout = CachedEngine(1.0, 10).sample(policy, PROMPTS, 2, uniforms(0, TRAIN, 0, range(8), 10))
    now = policy.evaluate(rollout, 1.0, entropy_gradient=True, reference=None)
    ((now.logprobs * now.logprobs.detach()).sum() + now.entropy.sum() + (now.values**2).sum()).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


# -- layers that run again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("own_layers", [0, 1, "all"])
@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_layers_that_run_again_give_the_same_gradient(request, model, own_layers, packs):
    policies = [fresh_policy(request.getfixturevalue(model), own_layers) for _ in range(2)]
    calls = []
    for policy, again in zip(policies, (False, True), strict=True):
        kind = PackedCausal if packs else PaddedCausal
        policy.reader, policy.recomputes_layers = kind(policy.lm), again
        decoder_layers(policy.lm)[0].register_forward_pre_hook(lambda *_: calls.append(None))
    torch.testing.assert_close(gradient(policies[1]), gradient(policies[0]))
    assert "forward" not in vars(decoder_layers(policies[1].lm)[0])


def test_layers_keep_their_input_alone(tiny_policy):
    """Autograd saves less."""
    kept = {}
    rollout = CachedEngine(1.0, 10).sample(tiny_policy, PROMPTS, 2, uniforms(0, TRAIN, 0, range(8), 10))
    for again in (False, True):
        tiny_policy.recomputes_layers = again
        kept[again] = 0

        def note(x, again=again):
            kept[again] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            tiny_policy.evaluate(rollout, 1.0, entropy_gradient=False, reference=None)
    assert kept[True] < 0.7 * kept[False]


@pytest.mark.slow
@pytest.mark.parametrize("algo", quick(["ppo", "trpo"], ["ppo"]))
def test_a_run_with_gradient_checkpointing_is_the_same_run(build_run, algo):
    plain = weights(build_run(f"algo={algo}"))
    again = weights(build_run(f"algo={algo}", "hardware.gradient_checkpointing=true"))
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


# -- layers that never train -------------------------------------------------------------------------------


def test_frozen_layers_stay_and_are_the_references_too(build_run):
    experiment = build_run("algo=ppo", "optim.frozen_layers=2", "optim.lr=1e-3")
    policy, reference = experiment.module.policy, experiment.module.reference
    layers, theirs = decoder_layers(policy.lm), decoder_layers(reference.lm)
    assert layers[1].mlp.c_fc.weight is theirs[1].mlp.c_fc.weight
    assert policy.lm.transformer.wte.weight is reference.lm.transformer.wte.weight
    assert layers[2].mlp.c_fc.weight is not theirs[2].mlp.c_fc.weight
    before = {name: p.detach().clone() for name, p in policy.lm.named_parameters()}
    weights(experiment)
    moved = {name for name, p in policy.lm.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        name for name in before if name.startswith(("transformer.h.2", "transformer.h.3", "transformer.ln_f"))
    }
    assert all(torch.equal(p, before[name]) for name, p in reference.lm.named_parameters())


def test_a_head_of_its_own_trains(llama_policy):
    assert llama_policy.lm.lm_head.weight is not llama_policy.lm.model.embed_tokens.weight
    freeze_below(llama_policy.lm, 1)
    trained = {name for name, p in llama_policy.lm.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trained
    assert "model.norm.weight" in trained
    assert not any(name.startswith(("model.layers.0", "model.embed")) for name in trained)


def test_not_every_layer_can_be_frozen(tiny_policy):
    with pytest.raises(
        UserError, match=r"optim.frozen_layers is 2, but the model has 2 layers; take at most 1"
    ):
        freeze_below(tiny_policy.lm, 2)


# -- compiled layers ---------------------------------------------------------------------------------------


COMPILED = """
import torch
from policylab.models.policy import Policy
from policylab.models.scratch import from_scratch
from policylab.models.readers.packed import trial_rollout

def gradient(compiled):
    policy = Policy(from_scratch(
        name="test", tokenizer="tiny", vocab_size=None, seed=0, dtype="float32", attn_implementation="sdpa",
        architecture=dict(model_type="gpt2", n_layer=2, n_embd=32, n_head=2, n_positions=64),
    ), critic=None).eval()
    assert not compiled or policy.compile_layers() is None
    rollout = trial_rollout(policy.lm)
    for rows in ([0], [0, 1], [1, 2, 0], [0, 1, 2, 0], [2, 2, 1, 0, 1]) * 2:  # shapes, and with and without gradient
        piece = rollout.select(torch.tensor(rows))
        policy.logprobs_of(piece, 1.0).sum().backward()
        with torch.no_grad():
            policy.logprobs_of(piece, 1.0)
    return torch.cat([p.grad.flatten() for p in policy.parameters()])

torch.testing.assert_close(gradient(True), gradient(False), atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradient():
    """In a process without the tests' type checks, because torch cannot compile these."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_cannot_be_compiled_says_why_and_runs(build_run, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand more lines")

    monkeypatch.setattr(torch.nn.Module, "compile", no_compiler)
    experiment = build_run("hardware.compile=true")
    with pytest.warns(
        UserWarning, match=r"hardware.compile: .* because RuntimeError: No working C\+\+ compiler"
    ):
        assert weights(experiment).isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware.compile=no"], "hardware.compile=no is neither true nor false"),
        (
            ["hardware.gradient_checkpointing=1"],
            "hardware.gradient_checkpointing=1 is neither true nor false",
        ),
        (
            ["hardware.compile=true", "hardware.gradient_checkpointing=true"],
            "compiled layers cannot be recomputed",
        ),
        (["optim.frozen_layers=-1"], "optim.frozen_layers is -1; it must be at least 0"),
        (["optim.frozen_layers=4"], "optim.frozen_layers is 4, but the model has 4 layers; take at most 3"),
        (["optim.micro_batch_tokens=0"], "optim.micro_batch_tokens is 0; it must be at least 1"),
        (["reward.workers=100000"], "reward.workers is 100000; it must be at least 0 and at most 1024"),
        (["reward.pool=fork"], "reward.pool=fork is not one of process, thread"),
        (["rollout.dtype=float8"], "rollout.dtype is float8"),
        (["rollout.max_rows=0"], "rollout.max_rows is 0; it must be at least 1"),
        (["rollout.max_rows=2.5"], "rollout.max_rows=2.5 is not a whole number"),
    ],
)
def test_bad_values_are_refused(compose, build_run, overrides, message):
    def start() -> None:
        settle(compose(overrides))
        build_run(*overrides)

    with pytest.raises(UserError, match=message):
        start()


# -- log-probs before the update ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (["algo=ppo", "hardware.precision=bf16-mixed"], 1),
        (["algo=reinforce", "algo/kl=none", "hardware.precision=bf16-mixed"], 0),
        *(
            pytest.param(overrides, passes, marks=pytest.mark.slow)
            for overrides, passes in [
                (["algo=ppo"], 0),
                (["algo=reinforce", "algo/kl=in_reward", "hardware.precision=bf16-mixed"], 1),
                (["algo=trpo", "hardware.precision=bf16-mixed"], 1),
            ]
        ),
    ],
)
def test_old_logprobs_are_computed_anew_where_sampling_drifts(build_run, overrides, passes):
    """In bf16, unless the update has only one pass, which computes them."""
    experiment = build_run(*overrides)
    module, calls = experiment.module, []
    recompute = module.sampler.recompute
    module.sampler.recompute = lambda rollout: calls.append(None) or recompute(rollout)
    module._checked = True  # the preflight always computes them
    weights(experiment)
    assert len(calls) == passes * module.iteration


def test_in_bf16_the_first_ratio_is_one(build_run):
    experiment = build_run("algo=reinforce", "algo/kl=none", "hardware.precision=bf16-mixed", "optim.lr=0.01")
    weights(experiment)
    assert experiment.module.metrics["train/ratio_max"] == 1
    assert experiment.module.metrics["train/kl_old"] == 0


# -- memory over a run -------------------------------------------------------------------------------------

#: Runs 30 iterations with different row lengths, and prints by how many MiB memory grows after the fifth.
GROWTH = """
import re, sys
from pathlib import Path
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback
root, folder, products = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
from policylab.cli.entry import prepare
prepare(str(root / "train.py"))
from policylab.config.build import build
with initialize_config_dir(str(root / "configs"), version_base="1.3"):
    config = compose("train", [
        "hardware=cpu", f"hardware.products={products}", "algo=grpo", "callbacks=none", "callbacks.checkpoint=null",
        "logger.csv=null", "iterations=30", "validation.every=1000", "validation.prompts=1", f"paths.run={folder}",
        "algo.update.epochs=1",
    ])
memory = []
class Look(Callback):
    def on_train_batch_end(self, *_):
        memory.append(int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10)
experiment = build(config, folder)
experiment.trainer.callbacks.append(Look())
experiment.trainer.fit(experiment.module, datamodule=experiment.data)
print("grows by", memory[-1] - memory[4])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(("products", "most"), [("pytorch", 60), ("onednn", 250)])
def test_memory_does_not_grow_with_the_iterations(tmp_path, products, most):
    """oneDNN keeps kernels for each number of rows; without common lengths, memory grew by 600 MiB here."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(Path(__file__).parents[1]), str(tmp_path), products],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("grows by")[-1]) < most
