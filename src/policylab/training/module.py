"""The base LightningModule: each Lightning hook calls the part responsible for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning import LightningModule

from policylab.data.rollout import PromptBatch, Rollout, Sample
from policylab.rollouts.noise import TRAIN, VALIDATION, seed_libraries
from policylab.training.metrics import Numbers, check_numbers
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
        self.plan = parts.plan
        self.compiles_layers = self.sharded = False
        self.progress = Progress(parts.iterations, parts.max_tokens)
        self.runtime = Runtime(self)
        self.recorder = Recorder(self.runtime)
        self.passes = passes = Passes(
            self.policy,
            parts.optim.micro_batch_tokens,
            self.recorder,
            whole_distributions=parts.needs.whole_distributions,
        )
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
        return self.parts.optim.build(self.policy)

    # -- training --------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """A resumed run may skip validation, or have no iterations left."""
        self.stepper.reapply_settings()
        self._prepare()
        self._stop_when_budget_is_spent()

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Seeds each iteration, because checkpoints hold no random state."""
        seed_libraries(self.parts.seed, TRAIN, self.iteration, self.global_rank)

    def finish_iteration(self, metrics: Numbers, started: float) -> None:
        """Counts the iteration, records its metrics, and ends the run when its budget is spent.

        Args:
            metrics: those that are not means, and ``tokens`` for the speed.
            started: ``time.perf_counter()`` at the start of the iteration.

        Raises:
            UserError: when a metric is no single number, or ``tokens`` is missing.
        """
        check_numbers(type(self).__name__, metrics)
        skipped = self.stepper.take_skipped()
        self.metrics = self.recorder.finish(metrics, started, self.progress, skipped)
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
        seed_libraries(self.parts.seed, VALIDATION, batch_idx, self.global_rank)

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
        self.run_state.load(checkpoint.get("policylab"))
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
        self.sampler.scorer.move(self.runtime.device)
        if self._checked:
            return
        with self.trainer.precision_plugin.forward_context():
            if self.compiles_layers and (reason := self.policy.compile_layers()):
                warnings.warn(f"hardware.compile: this model runs uncompiled, because {reason}", stacklevel=2)
            pace = preflight(self.sampler, self.parts.train[:PROMPTS])
        self._checked = True
        self.progress.expected_tokens = pace.tokens * self.plan.sequences
        cost = self.parts.cost(self.sampler.records_exactly)
        iterations = self.progress.last_iteration - self.iteration
        self.expected_seconds = iterations * pace.seconds(self.parts.needs, cost, self.plan)

    def _stop_when_budget_is_spent(self) -> None:
        if self.progress.budget_is_spent:
            self.trainer.should_stop = True
