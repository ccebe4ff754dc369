"""Readers of rollouts: the choice of a reader, the sizes in configs, and the weights of frozen copies."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import policylab
from conftest import fresh_policy, scratch_model
from policylab.models.decoders import Decoder
from policylab.models.policy import Policy
from policylab.models.readers import PackedCausal, PaddedCausal, Reader
from policylab.models.readers.packed import trial_rollout
from policylab.models.shape import Shape, shape_of

PACKAGE = Path(policylab.__file__).parent
SIZES = re.compile(
    r"_attn_implementation|num_hidden_layers|num_attention_heads|max_position_embeddings|get_text_config"
)


@pytest.mark.parametrize("room", ["models/policy.py", "models/critic.py", "training", "rollouts", "planning"])
def test_no_size_is_read_from_a_config(room):
    paths = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    assert paths
    for path in paths:
        assert not (found := SIZES.search(path.read_text())), (
            f"{path.name}: {found and found[0]}; ask the reader"
        )


@pytest.mark.parametrize("protocol", [Reader, Decoder])
def test_the_page_on_models_names_every_member(protocol):
    page = (PACKAGE.parents[1] / "docs" / "models.md").read_text()
    named = re.findall(r"`(\w+)", " ".join(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)))
    members = [name for name in vars(protocol) if not name.startswith("_")]
    assert [name for name in members if name not in named] == []


def test_shapes():
    llama = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    lm = scratch_model(**llama).lm
    assert shape_of(lm) == Shape(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, vocab=2048)
    gpt2 = scratch_model(model_type="gpt2", n_layer=1, n_embd=16, n_head=2).lm
    assert shape_of(gpt2) == Shape(layers=1, hidden=16, ffn=64, heads=2, kv_heads=2, head_dim=8, vocab=2048)


def test_a_model_may_bring_its_own(tiny):
    assert isinstance(Policy(tiny, None).reader, PackedCausal)
    policy = Policy(replace(tiny, reader=PaddedCausal), None)
    assert isinstance(policy.reader, PaddedCausal)
    rollout = trial_rollout(policy.lm)
    expected = Policy(tiny, None).logprobs_of(rollout, 1.0)
    torch.testing.assert_close(policy.logprobs_of(rollout, 1.0), expected, atol=1e-5, rtol=0)


def test_a_frozen_copy_reads_its_own_weights(tiny):
    policy = fresh_policy(tiny)
    reference, rollout = policy.frozen_copy(), trial_rollout(policy.lm)
    before = reference.logprobs_of(rollout, 1.0)
    with torch.no_grad():
        policy.lm.lm_head.weight.mul_(2)
    assert reference.reader.lm is reference.lm is not policy.lm
    assert torch.equal(reference.logprobs_of(rollout, 1.0), before)
    assert not torch.allclose(policy.logprobs_of(rollout, 1.0), before)
