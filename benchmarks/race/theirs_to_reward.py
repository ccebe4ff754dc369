"""TRL's side of `benchmarks/to_reward.py`, its trainers configured to the recipe. Imports nothing of ours but race/."""

from __future__ import annotations

import functools
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from race import work
from race.lane import Lane
from race.recipe import Recipe, held_out_reward, reward
from race.theirs import PACKAGES


class Generation:
    """Wraps ``model.generate`` and records its prompts."""

    def __init__(self, lane: Lane, generate: Any) -> None:
        self._lane, self.generate = lane, generate
        self.facts: dict[str, Any] = {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        lengths = attention_mask.sum(1).tolist()
        rows = zip(input_ids.tolist(), lengths, strict=True)
        self.facts = {"prompts": work.digest(row[len(row) - n :] for row, n in rows)}
        with self._lane.clock("rollout"):
            return self.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Positions:
    """Wraps ``model.forward`` and counts positions from each row's first token, as ``generate`` does.

    TRL's training passes give no positions. A model with absolute positions then reads left padding as if it were
    tokens, so its log-probs differ from the sampled ones, and its update from ours.
    """

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        functools.update_wrapper(self, forward)  # the Trainer reads its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None:
            kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return self._forward(*args, **kwargs)


class Racer(TrainerCallback):
    """Waits for the referee between iterations, each of some optimizer steps."""

    def __init__(self, lane: Lane, generation: Generation, updates: int) -> None:
        self._lane, self._generation, self._updates = lane, generation, updates

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        versions = {package: metadata.version(package) for package in PACKAGES}
        self._lane.ready({"versions": versions, "python": platform.python_version()})

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % self._updates == 0:
            self._lane.done(self._generation.facts)


def trainer_for(recipe: Recipe, folder: Path, model: Any, racer: Racer) -> Any:
    """The preset as TRL's config."""
    # A constant divides our loss. With a limit and epsilon larger by it, the undivided loss makes the same steps.
    scale = recipe.constant or 1.0
    minibatch = recipe.sequences // recipe.minibatches
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "seed": recipe.seed, "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": recipe.trl_micro_batch,
        "gradient_accumulation_steps": minibatch // recipe.trl_micro_batch,
        "steps_per_generation": recipe.sequences // recipe.trl_micro_batch,
        "num_iterations": recipe.epochs, "num_generations": recipe.group_size,
        "max_completion_length": recipe.new_tokens, "temperature": recipe.temperature, "beta": recipe.kl_coef,
        "max_steps": recipe.iterations * recipe.updates, "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant", "adam_beta1": recipe.betas[0], "adam_beta2": recipe.betas[1],
        "adam_epsilon": recipe.eps * scale, "max_grad_norm": recipe.max_grad_norm * scale, "weight_decay": 0.0,
        "optim": "adamw_torch_fused", "disable_dropout": True, "shuffle_dataset": False,
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    if recipe.clip is not None:
        common["epsilon"] = recipe.clip
    if recipe.algo == "grpo":
        kind, args = GRPOTrainer, GRPOConfig(**common, loss_type="grpo", scale_rewards="group")
    else:
        kind, args = RLOOTrainer, RLOOConfig(**common)
    return kind(
        model=model,
        reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": recipe.train}),
        processing_class=AutoTokenizer.from_pretrained(recipe.model),
        callbacks=[racer],
    )


def main(folder: Path) -> None:
    lane, recipe = Lane(), Recipe.read(folder)
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    generation = Generation(lane, model.generate)
    model.generate = generation
    trainer = trainer_for(recipe, folder, model, Racer(lane, generation, recipe.updates))
    for network in (model, trainer.ref_model):
        network.forward = Positions(network.forward)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    lane.evaluate = lambda: held_out_reward(generation.generate, tokenizer, recipe)
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
