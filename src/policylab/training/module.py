"""The base LightningModule: each Lightning hook calls the part responsible for it."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from lightning import LightningModule

from policylab.data.rollout import PromptBatch, Rollout, Sample
from policylab.errors import UserError
from policylab.rollouts.noise import TRAIN, VALIDATION, seed_libraries
from policylab.training.means import SAMPLED, TRAINED, Total
from policylab.training.metrics import Numbers, means_of, on_host
from policylab.training.parts import Parts
from policylab.training.passes import Passes
from policylab.training.preflight import PROMPTS, preflight
from policylab.training.recorder import Recorder
from policylab.training.run_state import Progress, RunState
from policylab.training.runtime import Runtime
from policylab.training.sampler import Sampler
from policylab.training.stepper import Stepper
from policylab.training.validator import Validator


class TrainingModule(LightningModule):
    """Base of the trainers. One Lightning batch is one iteration; optimization is manual.

    A trainer adds ``training_step``, which ends with `finish_iteration`.

    Attributes:
        reference: a copy of the policy that the KL is measured to; None if the method needs none.
        compiles_layers: whether torch compiles the policy's layers before the first pass.
        sharded: whether each process holds a shard of the weights; set by the strategy.
        reference_moves: whether the reference changes in training, so that checkpoints must hold it.
        expected_seconds: estimate for the rest of the run, by the preflight; None before it.
        metrics: metrics of the last iteration.
        val_metrics: metrics of the last validation.
        samples: completions of the last iteration or validation, for display.
        rollout: the last rollout trained on.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = parts.policy.eval()  # dropout is off in every forward pass
        self.reference = None if parts.needs.reference == "none" else parts.policy.frozen_copy()
        self.reference_moves = parts.needs.reference == "moving"
        self.parts = parts
        self.optim = parts.optim
        self.plan = parts.plan
        self.seed = parts.seed
        self.compiles_layers = self.sharded = False
        self.progress = Progress(parts.iterations, parts.max_tokens)
        self.runtime = Runtime(self)
        self.recorder = Recorder(self.runtime)
        passes = Passes(
            self.policy,
            parts.optim.micro_batch_tokens,
            self.recorder,
            whole_distributions=parts.needs.whole_distributions,
        )
        self.passes = passes
        self.stepper = Stepper(parts.optim, passes, self.progress)
        self.sampler = Sampler(parts, self.reference, passes, self.progress)
        self.validator = Validator(self.sampler, parts.task, parts.val)
        self.run_state = RunState(parts, [self.progress, self.stepper, passes, self.sampler])
        self.expected_seconds: float | None = None
        self.metrics: dict[str, float] = {}
        self.val_metrics: dict[str, float] = {}
        self.samples: list[Sample] = []
        self.rollout: Rollout | None = None
        self._checked = False

    @property
    def iteration(self) -> int:
        """Finished iterations."""
        return self.progress.iteration

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.policy)

    # -- training --------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """A resumed run may skip validation, or have no iterations left."""
        self.stepper.reapply_settings()
        self._prepare()
        self._stop_when_budget_is_spent()

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Seeds each iteration, because checkpoints hold no random state."""
        seed_libraries(self.seed, TRAIN, self.iteration, self.global_rank)

    def finish_iteration(self, metrics: Numbers, started: float) -> None:
        """Counts the iteration, records its metrics, and ends the run when its budget is spent.

        Args:
            metrics: those that are not means, and ``tokens`` for the speed.
            started: ``time.perf_counter()`` at the start of the iteration.
        """
        totals, seconds = self.recorder.finish()
        numbers = on_host(metrics)
        generated, elapsed = numbers.pop("tokens"), time.perf_counter() - started
        perf = {f"perf/{name}_s": value for name, value in seconds.items()}
        perf |= {"perf/tokens_per_s": generated / elapsed, "perf/iteration_s": elapsed}
        progress, none = self.progress, Total(0.0, 0.0)
        progress.iteration += 1
        progress.tokens_sampled += int(totals.pop(SAMPLED, none).sum)
        progress.tokens_trained += int(totals.pop(TRAINED, none).sum)
        skipped = self.stepper.take_skipped()
        counts = {"train/skipped_updates": skipped, "train/tokens": progress.tokens_sampled}
        counted = {name: float(count) for name, count in counts.items() if count}
        self.metrics = {**means_of(totals), **numbers, **counted, **perf}
        self.sampler.agree_on_cuts()
        self.record(self.metrics)
        self._stop_when_budget_is_spent()

    def record(self, metrics: dict[str, float]) -> None:
        """Sends metrics to every logger at the current iteration, and shows them to callbacks."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.iteration)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    # -- validation ------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._prepare()

    def on_validation_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Seeds every validation equally, like its sampling noise."""
        seed_libraries(self.seed, VALIDATION, batch_idx, self.global_rank)

    def on_validation_epoch_start(self) -> None:
        self.validator.begin()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.validator.add(batch.prompts)

    def on_validation_epoch_end(self) -> None:
        self.val_metrics, self.samples = self.validator.finish(), self.validator.samples
        self.record(self.val_metrics)

    # -- checkpoints -----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        given = self.given_weights()
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n not in given}
        checkpoint["policylab"] = self.run_state.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "policylab" not in checkpoint:
            raise UserError(
                "the checkpoint was not written by policylab; take one of a run's checkpoints/ folder"
            )
        self.run_state.load(checkpoint["policylab"])
        own, given = self.state_dict(), self.given_weights()
        checkpoint["state_dict"].update({n: v for n, v in own.items() if n in given})

    def given_weights(self) -> set[str]:
        """Names of weights that are loaded with the model and not saved again: a frozen reference's, and the base
        weights of adapters."""
        base = set(map(id, self.policy.base_parameters()))
        names = {n for n, p in self.named_parameters(remove_duplicate=False) if id(p) in base}
        if not self.reference_moves:
            names |= {n for n in self.state_dict() if n.startswith("reference.")}
        return names

    # -- before the first pass -------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Once per run: compiles, compares sampling with recomputation, and estimates the longest time of the run."""
        self.sampler.move_reward()
        if self._checked:
            return
        with self.trainer.precision_plugin.forward_context():
            if self.compiles_layers and (reason := self.policy.compile_layers()):
                warnings.warn(f"hardware.compile: this model runs uncompiled, because {reason}", stacklevel=2)
            pace = preflight(self.sampler, self.parts.train[:PROMPTS])
        self._checked = True
        self.progress.expected_tokens = pace.tokens * self.plan.sequences
        sequences = (
            (self.progress.last_iteration - self.iteration) * self.plan.sequences / self.plan.processes
        )
        cost = self.parts.cost(self.sampler.records_exactly)
        self.expected_seconds = sequences * pace.seconds(self.parts.needs, cost)

    def _stop_when_budget_is_spent(self) -> None:
        if self.progress.budget_is_spent:
            self.trainer.should_stop = True
