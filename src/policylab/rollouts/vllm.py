"""vLLM in the training process (extra ``[vllm]``), if the GPU has room for a second copy of the weights.

vLLM has its own kernels and noise. Its tokens differ from those of our engines, but a run is repeatable on the same
machine. Its log-probs are close to the policy's but not equal (``exact`` is False), so training corrects for them.

Written for vLLM 0.30 to 0.33. It is tested only with a small stub of vLLM, and has not run on a GPU.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError, check_range
from policylab.functional.behaviour import Behaviour, greedy
from policylab.models.adapted import whole_weights
from policylab.models.policy import Policy
from policylab.models.size import Size
from policylab.rollouts.engine import assemble, check_context, check_settings
from policylab.rollouts.memory import Piece


@dataclass
class VllmEngine:
    """Samples completions (see `policylab.rollouts.engine.Engine`).

    vLLM starts at the first rollout, with the policy's architecture and dummy weights. Before each rollout its weights
    are overwritten in place with the policy's, by a copy within the GPU.

    Args:
        temperature: divides the logits, above 0; the same in training.
        max_new_tokens: length limit of completions.
        gpu_memory: fraction of the GPU's memory for vLLM's weights and KV cache, above 0 and at most 1.
        dtype: dtype of vLLM's weights, such as ``bfloat16``; None: the policy's.
        context: positions of the longest sequence that vLLM reserves memory for; None: the model's limit.
        sleep: whether vLLM releases most of that memory while the policy trains.

    Raises:
        UserError: when vLLM is not installed, or a setting is out of its bounds.
    """

    temperature: float
    max_new_tokens: int
    gpu_memory: float
    dtype: str | None
    context: int | None
    sleep: bool

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.max_new_tokens)
        check_range("rollout.gpu_memory", self.gpu_memory, 0, 1, above=True)
        check_range("rollout.context", self.context, 2)
        self.vllm = import_vllm()
        self.llm: Any = None  #: the running vLLM; None before the first rollout

    @staticmethod
    def check_processes(processes: int) -> None:
        """Refuses several processes, because vLLM takes the first GPU in every process.

        Raises:
            UserError: saying what to take instead.
        """
        if processes > 1:
            raise UserError(
                f"rollout=vllm runs in one process, on its first GPU, and hardware sets {processes} processes; take "
                "hardware.devices=1, or rollout=cached"
            )

    def memory(self, size: Size, piece: Piece) -> dict[str, float]:
        """For plans: nothing, as vLLM works in what it has reserved."""
        return {}

    def reserved(self, size: Size, piece: Piece, device_memory: float) -> dict[str, float]:
        """For plans: the share of the GPU, which holds vLLM's own whole copy of the weights and its cache."""
        return {"vLLM": max(self.gpu_memory * device_memory, size.parameters * piece.number)}

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """As `policylab.rollouts.engine.Engine.sample`. Values are computed afterwards.

        Each row's noise seeds vLLM's own generator, so the same noise gives the same row.

        Raises:
            UserError: when the sequences do not fit the context, or the behaviour is neither the policy's own nor
                greedy (vLLM supports no other).
        """
        if behaviour not in (None, greedy):
            raise UserError(
                "rollout=vllm samples from the policy itself or greedily, and this algorithm explores differently; "
                "take rollout=cached"
            )
        longest = max(len(prompt.tokens) for prompt in prompts) + self.max_new_tokens
        check_context(policy, longest)
        if self.context is not None and longest > self.context:
            raise UserError(
                f"prompt and completion need {longest} positions, but rollout.context={self.context}; raise it"
            )
        with torch.autocast(policy.device.type, enabled=False):  # vLLM has its own precision
            llm = self.awake(policy)
            outputs = llm.generate(
                [{"prompt_token_ids": list(p.tokens)} for p in prompts for _ in range(group_size)],
                [self.request(policy, row, behaviour) for row in noise],
                use_tqdm=False,
            )
            if self.sleep:
                llm.sleep(level=1)
        return self.rollout(policy, prompts, group_size, outputs, behaviour)

    def awake(self, policy: Policy) -> Any:
        """vLLM with the policy's current weights, and an empty cache."""
        if self.llm is None:
            self.llm = self.start(policy)
        elif self.sleep:
            self.llm.wake_up()
        self.llm.apply_model(lambda model: hand_over(policy, model))
        self.llm.reset_prefix_cache()
        return self.llm

    def start(self, policy: Policy) -> Any:
        """vLLM for the policy's architecture, with dummy weights."""
        with tempfile.TemporaryDirectory() as folder:
            policy.lm.config.save_pretrained(folder)
            return self.vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,  # token ids in, token ids out
                generation_config="vllm",  # ignores the checkpoint's sampling defaults
                logprobs_mode="processed_logprobs",  # after the temperature, as tokens are drawn
                dtype=self.dtype or str(policy.dtype).removeprefix("torch."),
                max_model_len=self.context,
                gpu_memory_utilization=self.gpu_memory,
                enable_sleep_mode=self.sleep,
            )

    def request(self, policy: Policy, noise: Float[Tensor, " T"], behaviour: Behaviour | None) -> Any:
        """Sampling parameters of one completion."""
        return self.vllm.SamplingParams(
            temperature=0.0 if behaviour is greedy else self.temperature,
            top_p=1.0,
            top_k=0,
            seed=int(float(noise[0]) * 2**53),
            max_tokens=self.max_new_tokens,
            logprobs=0,  # of the drawn token only
            detokenize=False,
            ignore_eos=True,  # without a tokenizer vLLM has no EOS; the policy's are below
            stop_token_ids=list(policy.eos_ids),
        )

    def rollout(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        outputs: Sequence[Any],
        behaviour: Behaviour | None,
    ) -> Rollout:
        """vLLM's completions as a rollout."""
        answers = [output.outputs[0] for output in outputs]
        lengths = torch.tensor([len(answer.token_ids) for answer in answers])
        tokens = torch.zeros(len(answers), int(lengths.max()), dtype=torch.long)
        logprobs = torch.zeros(tokens.shape)
        for row, answer in enumerate(answers):
            drawn = list(answer.token_ids)
            tokens[row, : len(drawn)] = torch.tensor(drawn)
            if behaviour is None:  # a greedy token is certain: its log-prob is zero
                logprobs[row, : len(drawn)] = torch.tensor(
                    [seen[token].logprob for token, seen in zip(drawn, answer.logprobs, strict=True)]
                )
        ended = policy.ends(tokens.gather(1, lengths[:, None] - 1).squeeze(1))
        return assemble(prompts, group_size, tokens, lengths, ended, logprobs).to(policy.device)


def hand_over(policy: Policy, model: Any) -> None:
    """Overwrites the weights of vLLM's model with the policy's.

    Raises:
        UserError: when vLLM's model has weights that the policy lacks, because they would stay dummies.
    """
    own = {name: weight.detach() for name, weight in policy.lm.named_parameters()}
    taken = model.load_weights(whole_weights(policy.lm, own))
    missing = sorted({name for name, _ in model.named_parameters()} - set(taken))
    if missing:
        raise UserError(
            f"rollout=vllm: vLLM's {type(model).__name__} found no weights for {missing[0]} ({len(missing)} in all) in "
            f"the policy's {type(policy.lm).__name__}; take rollout=cached"
        )


def import_vllm() -> Any:
    """Imports vLLM, set up to run in this process, so that weights can be copied to it.

    Raises:
        UserError: when it cannot be imported.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"rollout=vllm cannot import vLLM ({error}); pip install 'policylab[vllm]' on a machine with a GPU, or "
            "take rollout=cached"
        ) from error
