"""TRL's side, at its fastest fair settings, with the TRL of its own environment. Imports nothing of ours but race/."""

from __future__ import annotations

import platform
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    TrainerCallback,
)

from race import work
from race.lane import Lane
from race.work import EOS, PAD, PROMPT_TOKENS, Work

ENDLESS = 10**6
#: Iterations before the data are read again.
REPEATS = 100
PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "numpy")


class Schedule(LogitsProcessor):
    """Forbids EOS and PAD, and forces EOS where the schedule says."""

    def __init__(self, lengths: Sequence[int], new_tokens: int) -> None:
        ends = defaultdict(list)
        for row, length in enumerate(lengths):
            if length < new_tokens:
                ends[length - 1].append(row)
        self._ends = {position: torch.tensor(rows) for position, rows in ends.items()}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : PAD + 1] = -torch.inf
        rows = self._ends.get(input_ids.shape[1] - PROMPT_TOKENS)
        if rows is not None:
            scores[rows] = -torch.inf
            scores[rows, EOS] = 0.0
        return scores


class Generation:
    """Wraps ``model.generate``: adds its clock, its schedule and, to compare updates, its tokens."""

    def __init__(self, lane: Lane, model: Any, race: Work) -> None:
        self._lane, self._model, self._generate = lane, model, model.generate
        self._schedule = Schedule(race.schedule(), race.new_tokens)
        self.facts: dict[str, Any] = {}

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        with self._lane.clock("rollout"):
            if "sequences" in self._lane.command:
                given = self._given(input_ids, bool(kwargs.get("return_dict_in_generate")))
            else:
                given = self._generate(input_ids=input_ids, logits_processor=[self._schedule], **kwargs)
        tokens = given if isinstance(given, Tensor) else given.sequences
        completions = tokens[:, PROMPT_TOKENS:]
        ended = completions == EOS
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, completions.shape[1])
        self.facts = {
            "prompts": work.digest(row.tolist() for row in input_ids),
            "lengths": lengths.tolist(),
        }
        return given

    def _given(self, input_ids: Tensor, with_scores: bool) -> Any:
        """The tokens that our side sampled for these prompts, with the logits that `generate` would give."""
        waiting = defaultdict(list)
        for prompt, completion in self._lane.command["sequences"]:
            waiting[tuple(prompt)].append(completion)
        rows = [waiting[tuple(row.tolist())].pop(0) for row in input_ids]
        width = max(map(len, rows))
        padded = [row + [PAD] * (width - len(row)) for row in rows]
        completions = torch.tensor(padded, device=input_ids.device)
        tokens = torch.cat([input_ids, completions], 1)
        if not with_scores:
            return tokens
        with torch.no_grad():
            mask = (tokens != PAD).long()
            logits = self._model(input_ids=tokens, attention_mask=mask, logits_to_keep=width + 1).logits
        return SimpleNamespace(sequences=tokens, scores=logits[:, :-1].float().unbind(1))


class TokenReward(nn.Module):
    """The work's reward, as the reward model that TRL's PPO requires."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = lambda input_ids, attention_mask, **_: SimpleNamespace(
            hidden_states=[torch.where(attention_mask, input_ids, PAD)]
        )

    def score(self, tokens: Tensor) -> Tensor:
        given = [work.reward(row) for row in tokens[:, PROMPT_TOKENS:].tolist()]
        rewards = torch.tensor(given, device=tokens.device)
        return rewards[:, None, None].expand(-1, tokens.shape[1], 1)


class Racer(TrainerCallback):
    """Waits for the referee between iterations."""

    def __init__(self, lane: Lane, generation: Generation) -> None:
        self._lane, self._generation = lane, generation

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        versions = {package: metadata.version(package) for package in PACKAGES}
        self._lane.ready({"versions": versions, "python": platform.python_version()})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._lane.done(self._generation.facts)


def settings(race: Work, folder: Path) -> dict[str, Any]:
    """Settings of all TRL configs."""
    return {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": race.trl_micro_batch,
        "gradient_accumulation_steps": race.sequences // race.trl_micro_batch,
        "gradient_checkpointing": False, "bf16": race.precision == "bf16", "use_cpu": race.device == "cpu",
       
        "learning_rate": work.LEARNING_RATE, "lr_scheduler_type": "constant",
        "adam_beta1": work.BETAS[0], "adam_beta2": work.BETAS[1], "adam_epsilon": work.EPS, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "optim": "adamw_torch_fused", "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0,
        "dataloader_pin_memory": False, "temperature": 1.0,
    }  # fmt: skip


def group_trainer(
    race: Work, folder: Path, model: Any, prompts: Sequence[Sequence[int]], racer: Racer
) -> Any:
    """GRPO or RLOO."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    common = settings(race, folder) | {
        "num_generations": race.group_size, "max_completion_length": race.new_tokens, "disable_dropout": True,
        "shuffle_dataset": False, "max_steps": ENDLESS, "epsilon": work.CLIP, "num_iterations": 1,
    }  # fmt: skip
    if race.device == "cuda":
        common["cache_implementation"] = "static"  # faster there than a cache that grows
    if race.algo == "grpo":
        trainer: Any = GRPOTrainer
        args: Any = GRPOConfig(**common, beta=0.0, loss_type="grpo", scale_rewards="group")
    else:
        trainer, args = RLOOTrainer, RLOOConfig(**common, beta=work.KL_COEF)
    return trainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [work.reward(ids) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [work.as_text(ids) for ids in prompts] * REPEATS}),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[racer],
    )


def ppo_trainer(race: Work, folder: Path, model: Any, prompts: Sequence[Sequence[int]], racer: Racer) -> Any:
    """PPO; each prompt is repeated as often as our side samples it."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = [{"input_ids": list(ids)} for ids in prompts for _ in range(race.group_size)]
    trainer: Any = PPOTrainer(
        args=PPOConfig(
            **settings(race, folder), response_length=race.new_tokens, stop_token="eos", num_ppo_epochs=1,
            num_mini_batches=1, local_rollout_forward_batch_size=race.sequences, num_sample_generations=0,
            total_episodes=ENDLESS * race.sequences, kl_coef=work.KL_COEF, kl_estimator="k1", gamma=1.0,
            lam=work.LAMBDA, cliprange=work.CLIP, cliprange_value=work.CLIP, vf_coef=work.VALUE_COEF,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        model=model,
        ref_model=load(folder),
        reward_model=TokenReward(),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            folder / "critic", num_labels=1, dtype=torch.float32
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]),
        callbacks=[racer],
    )  # fmt: skip
    # TRL's own loader shuffles, and accelerate makes a step at the end of a loader's data, even while accumulating.
    in_order = DataLoader(Dataset.from_list(rows * REPEATS), race.sequences, collate_fn=trainer.data_collator)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)


def gradients(model: nn.Module, critic: Any) -> Mapping[str, Tensor]:
    """Gradients by parameter name in Hugging Face's classes."""
    found = {f"policy.{name}": p.grad for name, p in model.named_parameters()}
    if critic is not None:
        for name, p in critic.named_parameters():
            found[f"critic.{name.removeprefix(critic.base_model_prefix + '.')}"] = p.grad
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def main(race: Work, folder: Path) -> None:
    lane = Lane()
    model = load(folder)
    generation = Generation(lane, model, race)
    model.generate = generation
    model.register_forward_pre_hook(lambda *_: lane.loss_begins() if torch.is_grad_enabled() else None)
    prompts = race.prompt_ids(work.vocabulary_of(folder / "policy"))
    make = ppo_trainer if race.algo == "ppo" else group_trainer
    trainer = make(race, folder, model, prompts, Racer(lane, generation))
    critic = trainer.value_model if race.algo == "ppo" else None
    lane.gradients = lambda: gradients(model, critic)
    # PPO's generation bypasses accelerate's autocast; running all of it under autocast is fastest.
    with torch.autocast(race.device, torch.bfloat16, enabled=race.algo == "ppo" and race.precision == "bf16"):
        trainer.train()


if __name__ == "__main__":
    main(Work.from_json(sys.argv[1]), Path(sys.argv[2]))
