"""rollout=vllm with a stub of vLLM, which computes the few calls of the engine with plain forward passes.

The real vLLM needs a GPU and is not tested here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.functional.behaviour import greedy
from policylab.functional.logprobs import log_distribution
from policylab.models.size import size_of
from policylab.rollouts.memory import Piece
from policylab.rollouts.noise import TRAIN, uniforms
from policylab.rollouts.vllm import VllmEngine
from test_episodes import mirrored

PROMPTS = [Prompt(i + 5, "", tuple(range(1, 3 + 2 * i)), None, ()) for i in range(3)]
GROUP, WIDTH = 2, 8
NOISE = uniforms(0, TRAIN, 0, range(len(PROMPTS) * GROUP), WIDTH)


@dataclass
class SamplingParams:
    """The arguments of vLLM's that are used; any other is an error."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    logprobs: int
    detokenize: bool
    ignore_eos: bool
    stop_token_ids: list[int]


class Model(torch.nn.Module):
    """A model that loads weights by name, in place."""

    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)  # dummy weights, not the policy's
            lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        self.lm = lm.to(getattr(torch, dtype)).eval()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.lm.named_parameters()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own = dict(self.lm.named_parameters())
        given = dict(weights)
        for name, weight in given.items():
            own[name].copy_(weight)
        return set(given)


@dataclass
class LLM:
    """The engine, with a record of its calls."""

    model: str
    load_format: str
    skip_tokenizer_init: bool
    generation_config: str
    logprobs_mode: str
    dtype: str
    max_model_len: int | None
    gpu_memory_utilization: float
    enable_sleep_mode: bool
    asleep: bool = False
    stale: bool = True  #: prefixes of other weights may be cached
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert [path.name for path in Path(self.model).iterdir()] == ["config.json"]
        assert self.load_format == "dummy"
        assert self.skip_tokenizer_init
        self.network = Model(self.model, self.dtype)

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        assert not self.asleep
        self.stale = True
        self.calls.append("load")
        return [function(self.network)]

    def reset_prefix_cache(self) -> None:
        self.stale = False

    def sleep(self, level: int) -> None:
        assert self.enable_sleep_mode
        self.asleep = True
        self.calls.append("sleep")

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False
        self.calls.append("wake")

    def generate(self, prompts: list[dict], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert not self.asleep
        assert not self.stale
        self.calls.append("generate")
        return [
            self.complete(prompt["prompt_token_ids"], settings)
            for prompt, settings in zip(prompts, params, strict=True)
        ]

    def complete(self, tokens: list[int], settings: SamplingParams) -> Any:
        generator = torch.Generator().manual_seed(settings.seed)
        written: list[int] = []
        logprobs: list[dict[int, Any]] = []
        while len(written) < settings.max_tokens and not set(written) & set(settings.stop_token_ids):
            logits = self.network.lm(input_ids=torch.tensor([tokens + written])).logits[0, -1]
            logp = log_distribution(logits, settings.temperature or 1.0)
            token = (
                int(torch.multinomial(logp.exp(), 1, generator=generator))
                if settings.temperature
                else int(logp.argmax())
            )
            written.append(token)
            # Besides the drawn token's log-prob, vLLM may return those of likelier ones.
            logprobs.append({i: SimpleNamespace(logprob=float(logp[i])) for i in {token, int(logp.argmax())}})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(written), logprobs=logprobs)])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture(params=["tiny_policy", "llama_policy"])
def policy(request: pytest.FixtureRequest):
    """A policy that often samples EOS, so that rows end at different lengths."""
    policy = request.getfixturevalue(request.param)
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[policy.eos_id] *= 50
    return policy


def engine(**changes: Any) -> VllmEngine:
    settings = {"gpu_memory": 0.3, "dtype": None, "context": None, "sleep": False}
    return VllmEngine(1.3, WIDTH, **(settings | changes))


@pytest.mark.usefixtures("vllm")
class TestSampling:
    def test_log_probs_are_those_of_the_policy(self, policy):
        rollout = engine().sample(policy, PROMPTS, GROUP, NOISE)
        recomputed = policy.logprobs_of(rollout, 1.3).detach()
        torch.testing.assert_close(rollout.logprobs, recomputed, atol=1e-5, rtol=0)
        assert rollout.values is None
        assert 0 < rollout.ended.sum() < len(rollout)
        for row, length in enumerate(rollout.lengths.tolist()):
            ends = (rollout.tokens[row, :length] == policy.eos_id).nonzero().flatten().tolist()
            assert ends == ([length - 1] if rollout.ended[row] else [])
            assert rollout.ended[row] or length == WIDTH
        assert rollout.prompt_lengths.tolist() == [2, 2, 4, 4, 6, 6]
        assert rollout.prompt_ids.tolist() == [5, 5, 6, 6, 7, 7]

    def test_the_same_noise_gives_the_same_rows_in_any_batch(self, policy):
        whole = engine().sample(policy, PROMPTS, GROUP, NOISE)
        alone = engine().sample(policy, PROMPTS[1:2], GROUP, NOISE[2:4])
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens, whole.tokens[2:4, :width])
        assert not torch.equal(whole.tokens[2], whole.tokens[3])

    def test_weights_are_handed_over_before_each_rollout(self, tiny_policy):
        vllm = engine()
        before = vllm.sample(tiny_policy, PROMPTS, GROUP, NOISE)
        with torch.no_grad():
            for parameter in tiny_policy.lm.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        after = vllm.sample(tiny_policy, PROMPTS, GROUP, NOISE)
        assert not torch.equal(before.logprobs, after.logprobs)
        recomputed = tiny_policy.logprobs_of(after, 1.3).detach()
        torch.testing.assert_close(after.logprobs, recomputed, atol=1e-5, rtol=0)
        assert vllm.llm.calls == ["load", "generate"] * 2

    def test_sleeps_while_the_policy_trains(self, tiny_policy):
        vllm = engine(sleep=True)
        for _ in range(2):
            vllm.sample(tiny_policy, PROMPTS, GROUP, NOISE)
        assert vllm.llm.calls == ["load", "generate", "sleep", "wake", "load", "generate", "sleep"]

    def test_plays_episodes(self, tiny_policy):
        vllm = engine()
        rollout = mirrored(tiny_policy, vllm)
        recomputed = tiny_policy.logprobs_of(rollout, 1.3).detach()
        torch.testing.assert_close(rollout.logprobs, recomputed, atol=1e-4, rtol=0)
        assert vllm.llm.calls == ["load", "generate"] * int(rollout.turn_ends.sum(-1).max())
        alone = mirrored(tiny_policy, vllm, [2])
        assert alone.episodes == (rollout.episodes[2],)

    def test_greedy(self, policy):
        rollout = engine().sample(policy, PROMPTS, 1, NOISE[:3], greedy)
        assert not rollout.logprobs.any()
        logp = policy.log_distributions(rollout, 1.3)
        assert torch.equal(logp.argmax(-1), rollout.tokens[rollout.action_mask])

    def test_another_behaviour_is_refused(self, tiny_policy):
        with pytest.raises(UserError, match="this algorithm explores differently; take rollout=cached"):
            engine().sample(tiny_policy, PROMPTS, 1, NOISE[:3], lambda logp: logp)

    def test_a_context_that_is_too_short_is_refused(self, tiny_policy):
        with pytest.raises(UserError, match=r"need 14 positions, but rollout.context=13"):
            engine(context=13).sample(tiny_policy, PROMPTS, 1, NOISE[:3])

    def test_weights_that_only_vllm_has_are_refused(self, tiny_policy, monkeypatch):
        monkeypatch.setattr(
            Model, "load_weights", lambda self, weights: {name for name, _ in weights} - {"x"}
        )
        monkeypatch.setattr(
            Model, "named_parameters", lambda self: [*self.lm.named_parameters(), ("extra.weight", None)]
        )
        with pytest.raises(UserError, match=r"found no weights for extra.weight \(1 in all\)"):
            engine().sample(tiny_policy, PROMPTS, 1, NOISE[:3])

    @pytest.mark.parametrize("change", [{"gpu_memory": 0.0}, {"gpu_memory": 1.5}, {"context": 1}])
    def test_senseless_settings_are_refused(self, change):
        with pytest.raises(UserError, match="it must be"):
            engine(**change)

    def test_dtype_and_memory_reach_vllm(self, tiny_policy):
        vllm = engine(dtype="bfloat16", gpu_memory=0.2, context=20)
        vllm.sample(tiny_policy, PROMPTS, 1, NOISE[:3])
        llm = vllm.llm
        assert (llm.dtype, llm.gpu_memory_utilization, llm.max_model_len) == ("bfloat16", 0.2, 20)

    def test_it_states_its_memory(self, tiny_policy):
        """Its share of the GPU, and the weights at least."""
        size, piece = size_of(tiny_policy.lm), Piece(2, 4, 3.0, 3, 5, number=2, compute=4, gpu=True)
        assert engine().memory(size, piece) == {}
        assert engine(gpu_memory=0.25).reserved(size, piece, 8e9) == {"vLLM": 2e9}
        assert engine(gpu_memory=0.25).reserved(size, piece, 1.0) == {"vLLM": 2 * size.parameters}

    @pytest.mark.slow
    def test_a_training_run(self, train_briefly):
        folder = train_briefly(["rollout=vllm", "model=tiny_scratch", "algo=grpo", "callbacks=none"])
        assert (folder / "metrics.csv").read_text().count("\n") > 2


def test_without_vllm_one_line_says_what_to_install(monkeypatch, compose, tmp_path):
    """Before a model is loaded."""
    from policylab.config.build import build

    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    config = compose(
        ["rollout=vllm", "model._target_=policylab.errors.check_range"]
    )  # would fail if it were built
    monkeypatch.setattr("policylab.config.build.check_parts", lambda config: None)
    with pytest.raises(UserError, match=r"pip install 'policylab\[vllm\]' on a machine with a GPU, or take"):
        build(config, tmp_path)


def test_several_processes_would_share_one_gpu(compose, tmp_path):
    """Before vLLM is looked for or a model is loaded."""
    from policylab.config.build import build

    config = compose(["rollout=vllm", "hardware=ddp_cpu"])
    with pytest.raises(
        UserError, match=r"on its first GPU, and hardware sets 2 processes; take hardware\.devices=1"
    ):
        build(config, tmp_path)
