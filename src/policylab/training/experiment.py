"""What every kind of training shares: sampling, scoring, validation, records."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policylab.data.plan import BatchPlan
from policylab.data.rollout import Completion, Prompt, PromptBatch, Rollout, Sample
from policylab.distributed.sharding import gathered
from policylab.errors import RunError, UserError
from policylab.functional import products
from policylab.functional.masks import masked_sum
from policylab.models.fingerprint import fingerprint
from policylab.models.policy import Policy
from policylab.rewards.base import Reward, Scores
from policylab.rewards.memory import load_state, state_of
from policylab.rewards.networks import move
from policylab.rewards.pool import ScoreFuture, begin, in_this_process
from policylab.rollouts.behaviour import Behaviour
from policylab.rollouts.engine import Engine
from policylab.rollouts.noise import PREFLIGHT, TRAIN, VALIDATION, seed_libraries, uniforms
from policylab.rollouts.row_limit import EVERY_ROW, RowLimit
from policylab.tasks.base import Task, measured
from policylab.training.average import Average
from policylab.training.means import SAMPLED, TRAINED, Means, Total
from policylab.training.optimization import ManualOptimization
from policylab.training.optimizer import AdamW
from policylab.training.preflight import PROMPTS, Pace, preflight


@dataclass(frozen=True)
class Parts:
    """What every module is made of, whatever its algorithm."""

    policy: Policy
    engine: Engine
    reward: Reward
    task: Task
    optim: AdamW
    plan: BatchPlan
    max_rows: (
        int | None
    )  #: completions sampled at once on each process; None: as many as should fit in memory
    seed: int  #: of the sampling noise and the order of minibatches
    iterations: int  #: of the whole run
    max_tokens: int | None  #: sampled in training, after which the run ends before its last iteration
    resolved_config: str  #: YAML; makes a checkpoint loadable without its folder
    data: str  #: fingerprint of the task's examples


class ExperimentModule(ManualOptimization):
    """Base of the modules. One Lightning batch is one iteration; optimization is manual.

    Attributes:
        iteration: finished iterations.
        tokens_sampled: in training, over all processes; what validation and preflight sample does not count.
        origin: fingerprints of the weights and the data that the run starts from.
        expected_tokens: an iteration, as far as the preflight can tell.
        metrics: of the last iteration; ``val_metrics``: of the last validation.
        samples: completions of the last iteration or validation, for people.
        rollout: the last one that was trained on.
        reward: a network among them is neither trained nor saved.
    """

    reward: Reward

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.policy, parts.optim, parts.plan, parts.iterations)
        self.reference: Policy | None = None
        self.average: Average | None = (
            None  #: by which the reference or the target network follows the policy
        )
        self.compiles_layers = False  #: whether torch is to compile the policy's layers before the first pass
        self.engine = parts.engine
        self.row_limit = RowLimit(parts.max_rows)
        # not by assignment, which would take a reward that is a network for a part of this module
        object.__setattr__(self, "reward", parts.reward)
        self.task = parts.task
        self.seed = parts.seed
        self.resolved_config = parts.resolved_config
        self.origin = {"weights": fingerprint(parts.policy.loaded_parameters()), "data": parts.data}
        self.max_tokens = parts.max_tokens
        self.tokens_sampled = 0
        self.tokens_trained = 0
        self.kl_coef = 0.0
        self.expected_tokens = 0.0
        self.expected_seconds: float | None = None
        self.metrics: dict[str, float] = {}
        self.val_metrics: dict[str, float] = {}
        self.samples: list[Sample] = []
        self.rollout: Rollout | None = None
        self._val_means = Means()
        self._val_prompts = 0  # counted so far by the validation under way, on this process
        self._seconds: dict[str, float] = {}
        self._checked = False
        self._reminded = False
        self._memory_before: tuple[int, Any] | None = None  # a validation's iteration, the reward's memory

    # -- one iteration, in pieces --------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        stream: int,
        samples: Sequence[int],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """Samples completions with the noise that belongs to these samples of this iteration."""
        iteration = self.iteration if stream != VALIDATION else 0
        noise = uniforms(self.seed, stream, iteration, samples, self.engine.max_new_tokens)
        with gathered(self.policy) as policy:
            rollout = self.row_limit.sample(self.engine, policy, prompts, group_size, noise, behaviour)
        if stream not in (VALIDATION, PREFLIGHT):
            self._means.add(SAMPLED, rollout.action_mask.sum())
        return rollout

    def estimate_values(self, rollout: Rollout) -> Rollout:
        """The rollout with the critic's values, where they did not come with sampling."""
        if self.policy.critic is None or rollout.values is not None:
            return rollout
        return rollout.replace(values=self.per_token(rollout, self.policy.values))

    @property
    def reference_moves(self) -> bool:
        """Whether the reference changes in training, and so belongs to the state."""
        return False

    @property
    def in_full_precision(self) -> bool:
        """Whether the forward passes of training are in fp32 throughout."""
        return self.trainer.precision == "32-true" and self.policy.dtype == torch.float32

    def refer(self, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probs."""
        reference = self.reference
        if reference is None:
            return rollout
        temperature = self.engine.temperature
        return rollout.replace(
            ref_logprobs=self.per_token(rollout, lambda piece: reference.logprobs_of(piece, temperature))
        )

    @torch.no_grad()
    def per_token(self, rollout: Rollout, evaluate: Callable[[Rollout], Tensor]) -> Tensor:
        """``evaluate`` over micro-batches, put together again on the rollout's grid, ``[..., B, T]``."""
        rows = torch.arange(len(rollout), device=rollout.tokens.device)

        def attempt() -> Tensor:
            parts = self.passes(rollout, rows)
            figures = [evaluate(rollout.select(part if len(part) else rows[:1])) for part in parts]
            whole = figures[0].new_zeros(*figures[0].shape[:-2], *rollout.tokens.shape)
            for part, values in zip(parts, figures, strict=True):
                if len(part):
                    whole[..., part, : values.shape[-1]] = values
            return whole

        return self.within_memory(attempt)

    def recompute(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the actions under the present policy and, with a critic, values; ``[B, T]`` each."""

        def evaluate(piece: Rollout) -> Tensor:
            now = self.policy.evaluate(piece, self.engine.temperature, entropy_gradient=False, reference=None)
            return torch.stack([x for x in (now.logprobs, now.values) if x is not None])

        logprobs, *values = self.per_token(rollout, evaluate)
        return logprobs, values[0] if values else None

    def begin_scoring(
        self, rollout: Rollout, prompts: Sequence[Prompt]
    ) -> tuple[list[Completion], ScoreFuture]:
        """The rollout's completions as text, and their scores to come. ``prompts``: one for each row."""
        completions = self.completions(rollout, prompts)
        # in the reward's own precision, as in a worker
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return completions, begin(self.reward, completions)

    def move_reward(self) -> None:
        """A reward that is a network comes to where the policy is, unless processes of its own have it."""
        move(in_this_process(self.reward), self.device)

    def judge(self, rollout: Rollout, prompts: Sequence[Prompt]) -> tuple[Rollout, list[Completion]]:
        """The rollout with rewards, and its completions as text. ``prompts``: one for each row."""
        completions, scores = self.begin_scoring(rollout, prompts)
        return rewarded(rollout, scores()), completions

    def finish_iteration(self, metrics: dict[str, Tensor | float], started: float) -> None:
        """Counts the iteration, records its metrics, and ends the run when its budget is spent.

        Args:
            metrics: those that are no means, and ``tokens`` for the speed.
        """
        totals = self.totals(self._means)
        numbers = on_host(metrics)
        generated = numbers.pop("tokens")
        elapsed = time.perf_counter() - started
        perf = {f"perf/{name}_s": seconds for name, seconds in self._seconds.items()}
        perf["perf/tokens_per_s"] = generated / elapsed
        perf["perf/iteration_s"] = elapsed
        self.iteration += 1
        none = Total(0.0, 0.0)
        self.tokens_sampled += int(totals.pop(SAMPLED, none).sum)
        self.tokens_trained += int(totals.pop(TRAINED, none).sum)
        skipped = {"train/skipped_updates": float(self.skipped)} if self.skipped else {}
        self.skipped = 0
        account = {"train/tokens": float(self.tokens_sampled)} if self.tokens_sampled else {}
        self.metrics = {**means_of(totals), **numbers, **skipped, **account, **perf}
        self._means = Means()
        self.agree_on_cuts()
        self._seconds = {}
        self.record(self.metrics)
        self.end_with_budget()

    def agree_on_cuts(self) -> None:
        """From here on no process takes more at a time than has been found to fit on each; a checkpoint holds that."""
        rows = self.row_limit.rows or EVERY_ROW
        tokens, rows = (-self.all_max(-torch.tensor([self.micro_batch_tokens, rows]))).tolist()
        self._micro_batch_tokens = tokens
        self.row_limit.rows = None if rows == EVERY_ROW else rows

    def end_with_budget(self) -> None:
        """Ends training when ``max_tokens`` are spent."""
        if self.max_tokens is not None and self.tokens_sampled >= self.max_tokens:
            self.trainer.should_stop = True

    @property
    def last_iteration(self) -> int:
        """The iteration after which the run ends: where a budget decides, an estimate from the tokens so far."""
        if self.max_tokens is None:
            return self.iterations
        tokens = self.tokens_sampled / self.iteration if self.iteration else self.expected_tokens
        left = math.ceil((self.max_tokens - self.tokens_sampled) / max(tokens, 1.0))
        return min(self.iterations, self.iteration + max(left, 0))

    # -- validation ------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """The first validation of a run is preceded by its preflight."""
        self.move_reward()
        if not self._checked:
            self.check()

    def on_train_start(self) -> None:
        """A resumed run may have no validation before it trains, or nothing to train; its optimizer obeys the present
        config."""
        self.reapply_optimizer_settings()
        self.move_reward()
        self.end_with_budget()
        if not self._checked:
            self.check()

    def check(self) -> None:
        """Holds sampling against recomputation, and tells how long the run may take at most."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        with self.trainer.precision_plugin.forward_context():
            if self.compiles_layers and (reason := self.policy.compile_layers()):
                warnings.warn(f"hardware.compile: this model runs as it is, because {reason}", stacklevel=2)
            pace = preflight(self, list(data.train[:PROMPTS]))
        self._checked = True
        self.expected_tokens = pace.tokens * self.plan.sequences
        self.expected_seconds = (self.last_iteration - self.iteration) * self.seconds_per_iteration(pace)

    def seconds_per_iteration(self, pace: Pace) -> float:
        """Upper bound; a backward pass costs about two forward passes."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Nothing is carried from one iteration to the next but what checkpoints hold."""
        seed_libraries(self.seed, TRAIN, self.iteration, self.global_rank)

    def on_validation_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As with the noise of sampling: the same at every validation."""
        seed_libraries(self.seed, VALIDATION, batch_idx, self.global_rank)

    def on_validation_epoch_start(self) -> None:
        self._memory_before = (self.iteration, state_of(self.reward))
        self._val_means = Means()
        self._val_prompts = 0
        self.samples = []

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Samples one completion a prompt, with noise that is the same at every validation."""
        rollout = self.generate(batch.prompts, 1, VALIDATION, [p.id for p in batch.prompts])
        completions, scores = self.begin_scoring(rollout, batch.prompts)
        rollout = rewarded(self.refer(rollout), scores())
        self.measure(rollout, self._val_means, "val")
        for name, values in measured(self.task, completions).items():
            self._val_means.add(f"val/{name}", torch.tensor(values, dtype=torch.double, device=self.device))
        self.samples += self.describe(rollout, completions, "val")
        self._val_prompts += len(batch.prompts)

    def on_validation_epoch_end(self) -> None:
        """Records the validation, unless some of its prompts are missing.

        Raises:
            RunError: when Lightning has ended it early, as it does when anything raises StopIteration.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        counted = int(self.all_sum(torch.tensor(self._val_prompts)))
        if counted != len(data.val):
            raise RunError(
                f"the validation of iteration {self.iteration} ended after {counted} of {len(data.val)} prompts and is "
                "not recorded; something raised StopIteration, which ends Lightning's loops: look at your callbacks"
            )
        self.val_metrics = {**means_of(self.totals(self._val_means)), "val/prompts": float(counted)}
        self.record(self.val_metrics)

    # -- records ---------------------------------------------------------------------------------------

    def totals(self, means: Means) -> dict[str, Total]:
        """Over all processes, also of what some of them have not counted."""
        return means.reduce(self.all_sum, set().union(*self.from_all(set(means.names))))

    def measure(self, rollout: Rollout, means: Means, split: str) -> None:
        """Metrics of a rollout that training and validation share."""
        assert rollout.rewards is not None
        mask = rollout.action_mask
        means.add(f"{split}/reward", rollout.rewards)
        if rollout.reward_parts is not None:
            for k, name in enumerate(rollout.part_names):
                means.add(f"{split}/reward/{name}", rollout.reward_parts[:, k])
        means.add(f"{split}/length", mask.sum(-1))
        means.add(f"{split}/ended", rollout.ended)
        if rollout.ref_logprobs is not None:
            log_ratio = rollout.old_logprobs - rollout.ref_logprobs
            means.add(f"{split}/kl", masked_sum(log_ratio, mask))
            means.add(f"{split}/kl_token", log_ratio, mask)

    def describe(self, rollout: Rollout, completions: Sequence[Completion], split: str) -> list[Sample]:
        """Completions with their figures, for people."""
        assert rollout.rewards is not None
        assert rollout.reward_parts is not None
        columns = [rollout.action_mask.sum(-1)[:, None], rollout.rewards[:, None], rollout.reward_parts]
        if rollout.ref_logprobs is not None:
            log_ratio = rollout.logprobs - rollout.ref_logprobs
            columns.append(masked_sum(log_ratio, rollout.action_mask)[:, None])
        parts = slice(2, 2 + len(rollout.part_names))
        figures = torch.cat(columns, dim=1).tolist()  # one copy for all
        return [
            Sample(
                iteration=self.iteration if split == "val" else self.iteration + 1,
                split=split,
                prompt=completion.prompt,
                completion=completion.text,
                reward=row[1],
                parts=dict(zip(rollout.part_names, row[parts], strict=True)),
                kl=None if rollout.ref_logprobs is None else row[-1],
                length=int(row[0]),  # without an environment's words
                ended=completion.ended,
                tokens=completion.tokens,
            )
            for row, completion in zip(figures, completions, strict=True)
        ]

    def record(self, metrics: dict[str, float]) -> None:
        """Sends metrics to every logger at the current iteration, and shows them to callbacks."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.iteration)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``perf/<name>_s``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    # -- state -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        given = self.given_weights()
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n not in given}
        checkpoint["policylab"] = {
            "iteration": self.iteration,
            "kl_coef": self.kl_coef,
            "tokens_sampled": self.tokens_sampled,
            "tokens_trained": self.tokens_trained,
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "reward": self.from_all(self.memory_to_keep()),
            "micro_batch_tokens": (self.optim.micro_batch_tokens, self.micro_batch_tokens),
            "max_rows": (self.row_limit.asked, self.row_limit.rows),
            "config": self.resolved_config,
            "origin": self.origin,
            "products": products.chosen().plain(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "policylab" not in checkpoint:
            raise UserError(
                "the checkpoint was not written by policylab; take one of a run's checkpoints/ folder"
            )
        state = checkpoint["policylab"]
        self.iteration = state["iteration"]
        self.kl_coef = state["kl_coef"]
        self.tokens_sampled = state["tokens_sampled"]
        self.tokens_trained = state["tokens_trained"]
        self.skipped_in_a_row = dict(state.get("skipped_in_a_row", {}))
        self.remind_reward(state.get("reward", [None]))
        asked, found = state.get("micro_batch_tokens", (None, None))
        if asked == self.optim.micro_batch_tokens:  # what was found then cuts the work as it was cut then
            self._micro_batch_tokens = found
        asked, found = state.get("max_rows", (None, None))
        if asked == self.row_limit.asked:
            self.row_limit.rows = found
        self.demand_origin(state)
        if "products" in state:
            products.go_on(state["products"])
        own, given = self.state_dict(), self.given_weights()
        checkpoint["state_dict"].update({n: v for n, v in own.items() if n in given})

    def demand_origin(self, state: dict[str, Any]) -> None:
        """Refuses a state that started from other weights, which are its reference and what adapters add to, or from
        other data.

        Raises:
            UserError: naming those of this command.
        """
        origin = state.get("origin")
        if origin is None:
            warnings.warn(
                "the checkpoint is of an older version, and does not say from which weights and data its run started",
                stacklevel=2,
            )
            return
        if origin["weights"] != self.origin["weights"]:
            raise UserError(
                f"the checkpoint belongs to a run that started from other weights than these ({self.policy.source}); "
                "put the weights back that it started from, or give their place: model.path=..."
            )
        if origin["data"] != self.origin["data"]:
            raise UserError(
                f"the checkpoint belongs to a run on other data than task {self.task.name} has now; put the data back "
                "that it started with, or give its place: task.source=..."
            )

    def memory_to_keep(self) -> Any:
        """What the reward remembers; after this iteration's validation what it did before, for a run that goes on from
        here validates again."""
        if self._memory_before is not None and self._memory_before[0] == self.iteration:
            return self._memory_before[1]
        return state_of(self.reward)

    def remind_reward(self, states: Sequence[Any]) -> None:
        """Has the reward go on from what it remembered, on each process; with another number of them, on the first.

        Once only: Lightning loads a checkpoint before the first validation and again before training, and the reward
        has scored in between.
        """
        if not self._reminded:
            load_state(self.reward, states[self.global_rank if len(states) == self.trainer.world_size else 0])
        self._reminded = True

    def given_weights(self) -> set[str]:
        """Names of weights that come from where the policy came from, and are not saved again: a frozen reference's,
        and those beside adapters."""
        base = set(map(id, self.policy.base_parameters()))
        names = {n for n, p in self.named_parameters(remove_duplicate=False) if id(p) in base}
        if not self.reference_moves:
            names |= {n for n in self.state_dict() if n.startswith("reference.")}
        return names

    def completions(self, rollout: Rollout, prompts: Sequence[Prompt]) -> list[Completion]:
        """As text; one copy to the CPU for all. ``prompts``: one for each row."""
        table = torch.cat([rollout.lengths[:, None], rollout.ended[:, None], rollout.tokens], dim=1).tolist()
        return [
            Completion(
                prompt.text,
                self.policy.decode(row[:length]),
                prompt.reference,
                tuple(row[:length]),
                bool(ended),
            )
            for prompt, (length, ended, *row) in zip(prompts, table, strict=True)
        ]


def means_of(totals: Mapping[str, Total]) -> dict[str, float]:
    """By name."""
    return {name: total.sum / total.values for name, total in totals.items()}


def on_host(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All as plain numbers, in one copy."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    numbers = torch.stack([value.double() for value in tensors.values()]).tolist() if tensors else []
    return {**metrics, **dict(zip(tensors, numbers, strict=True))}


def rewarded(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout with the scores of its rows."""
    device = rollout.tokens.device
    table = torch.tensor([scores.total, *scores.parts.values()], dtype=torch.float32, device=device)
    return rollout.replace(
        rewards=table[0],
        reward_parts=table[1:].T,
        part_names=tuple(scores.parts),
    )
