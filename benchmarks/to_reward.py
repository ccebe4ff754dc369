"""Seconds of training to a held-out reward, TRL's against ours: the shipped presets of the tiny model on reviews.

    python benchmarks/to_reward.py --algo grpo rloo --seeds 0 1 2 --out benchmarks/results/to_reward.csv

benchmarks/README.md says what is the same on both sides and what cannot be. The last line is JSON; its `ratio` is the
sum of TRL's seconds divided by that of ours, by algorithm; `cpu_ratio` is that of CPU seconds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policylab.config import resolvers
from policylab.config.build import instantiate, without
from policylab.tasks.base import examples, take_validation
from policylab.tasks.datamodule import IterationSampler
from race import figures, referee
from race.ours_to_reward import ROOT, preset
from race.recipe import Recipe
from race.referee import RaceError

#: The embedded model of `model=tiny`.
TINY = ROOT / "src" / "policylab" / "assets" / "tiny"


@dataclass
class Climb:
    """The results of one side."""

    seconds: list[float] = field(default_factory=list)  #: of each iteration
    cpu: list[float] = field(
        default_factory=list
    )  #: seconds of all its threads, which a busy machine changes less
    gib: list[float] = field(default_factory=list)  #: resident after each iteration
    rewards: dict[int, float] = field(default_factory=dict)  #: held out, after so many iterations

    def reached(self, target: float) -> int | None:
        """Iterations to the first evaluation after the start that is no lower than the target; None without one."""
        return next((n for n, reward in self.rewards.items() if n and reward >= target), None)


def recipe_of(config: DictConfig, trl_micro_batch: int | None, held_out: int) -> Recipe:
    """The preset's values, for TRL's side.

    Raises:
        ValueError: for a preset that TRL cannot reproduce.
    """
    algo, optim, rollout = config.algo, config.optim, config.rollout
    if optim.schedule != "constant" or optim.warmup or optim.weight_decay or algo.entropy_coef:
        raise ValueError("TRL's side has a constant rate, no weight decay and no entropy bonus")
    task = instantiate(without(config, "task"))
    texts = [example.text for example in examples(task, "train")]
    order = IterationSampler(len(texts), rollout.prompts, config.seed, config.iterations, 0, list)
    minibatches = algo["update"].get("minibatches", 1)
    return Recipe(
        algo=algo.name,
        seed=config.seed,
        model=str(TINY),
        iterations=config.iterations,
        prompts=rollout.prompts,
        group_size=rollout.group_size,
        new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        epochs=algo["update"].get("epochs", 1),
        minibatches=minibatches,
        learning_rate=optim.lr,
        betas=tuple(optim.betas),
        eps=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        kl_coef=algo.kl.controller.initial,
        clip=algo.surrogate.get("clip_low"),
        constant=algo.reduction.get("constant"),
        trl_micro_batch=trl_micro_batch or rollout.prompts * rollout.group_size // minibatches,
        train=[texts[row] for iteration in range(config.iterations) for row in order.batch(iteration)],
        held_out=[example.text for example in take_validation(task, held_out)],
    )


def climb(
    recipe: Recipe, target: float, every: int, folder: Path, trl_python: str, say: referee.Say
) -> dict[str, Any]:
    """Runs both sides in turn, one iteration each, until each has reached the target or done all iterations.

    Raises:
        RaceError: when a side fails, reads other prompts, or starts from other weights.
    """
    recipe.write(folder)
    modules = ("ours_to_reward", "theirs_to_reward")
    with referee.workers(modules, [str(folder)], folder, trl_python) as sides:
        facts = [side.answer() for side in sides]
        climbs = [Climb(), Climb()]
        prompts: dict[int, str] = {}

        def evaluate(side: int) -> None:
            done = climbs[side]
            done.rewards[len(done.seconds)] = sides[side].evaluate()

        def lap(side: int) -> None:
            answer, done = sides[side].run(), climbs[side]
            if prompts.setdefault(len(done.seconds), answer["prompts"]) != answer["prompts"]:
                raise RaceError(f"the sides read other prompts in iteration {len(done.seconds)}")
            done.seconds.append(answer["seconds"])
            done.cpu.append(answer["cpu_seconds"])
            done.gib.append(answer["gib"])

        for side in (0, 1):
            evaluate(side)
        if abs(climbs[0].rewards[0] - climbs[1].rewards[0]) > 1e-3:
            raise RaceError(
                f"the sides start from other weights: {climbs[0].rewards[0]}, {climbs[1].rewards[0]}"
            )
        for iteration in range(1, recipe.iterations):
            for side in (0, 1) if iteration % 2 else (1, 0):
                if climbs[side].reached(target) is None:
                    lap(side)
                    if iteration % every == 0:
                        evaluate(side)
            if iteration % every == 0:
                say(f"iteration {iteration}: " + ", ".join(map(shown, ("ours", "TRL"), climbs)))
            if all(done.reached(target) is not None for done in climbs):
                break
        last = [side.stop() for side in sides]
    return record(recipe, target, every, climbs, [fact | end for fact, end in zip(facts, last, strict=True)])


def shown(name: str, done: Climb) -> str:
    """The progress of a side."""
    return f"{name} {done.rewards[max(done.rewards)]:+.3f} after {sum(done.seconds):.1f} s"


def record(
    recipe: Recipe, target: float, every: int, climbs: Sequence[Climb], facts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """One flat row."""
    row: dict[str, Any] = {
        "algo": recipe.algo, "seed": recipe.seed, "target": target, "every": every, "held_out": len(recipe.held_out),
        "trl_micro_batch": recipe.trl_micro_batch,
    }  # fmt: skip
    for name, done, about in zip(("ours", "trl"), climbs, facts, strict=True):
        n = done.reached(target)
        row |= {
            f"{name}_seconds": None if n is None else round(sum(done.seconds[:n]), 3),
            f"{name}_cpu_seconds": None if n is None else round(sum(done.cpu[:n]), 3),
            f"{name}_iterations": n,
            f"{name}_iteration_s": round(statistics.median(done.seconds), 4),
            f"{name}_iteration_cpu_s": round(statistics.median(done.cpu), 4),
            f"{name}_start_gib": round(about["rest_gib"], 3),
            f"{name}_end_gib": round(done.gib[-1], 3),
            f"{name}_rewards": " ".join(f"{k}:{reward:.3f}" for k, reward in done.rewards.items()),
        }
    mine, other = facts[0]["versions"], facts[1]["versions"]
    return row | {
        "commit": (facts[0]["commit"] or "")[:10] + ("+" if facts[0]["dirty"] else ""),
        "trl": other["trl"],
        "torch": f"{mine['torch']} / {other['torch']}",
        "cpu": facts[0]["cpu"],
        "threads": facts[0]["threads"],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def ratio(rows: Sequence[dict[str, Any]], column: str) -> float | None:
    """TRL's sum of a column over the seeds, divided by ours; None if a side missed the target with one of them."""
    sums = [[row[f"{name}_{column}"] for row in rows] for name in ("trl", "ours")]
    return None if not rows or None in sums[0] + sums[1] else round(sum(sums[0]) / sum(sums[1]), 3)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", choices=("grpo", "rloo"), nargs="+", default=["grpo", "rloo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.5, help="mean held-out reward")
    parser.add_argument("--iterations", type=int, default=40, help="at most")
    parser.add_argument("--every", type=int, default=2, help="iterations between two evaluations")
    parser.add_argument("--held-out", type=int, default=256, help="prompts of an evaluation")
    parser.add_argument(
        "--trl-micro-batch", type=int, help="sequences in a micro-batch of TRL's update (default: all)"
    )
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--out", type=Path, help="a CSV to add a row to for each seed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    resolvers.register(ROOT)
    started, rows, failed = time.perf_counter(), list[dict[str, Any]](), 0

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", flush=True)

    for algo, seed in itertools.product(chosen.algo, chosen.seeds):
        say(f"{algo}, seed {seed}")
        # one iteration more than are raced, because a side reports an iteration's end when the next one begins
        recipe = recipe_of(preset(algo, seed, chosen.iterations + 1), chosen.trl_micro_batch, chosen.held_out)
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = climb(recipe, chosen.target, chosen.every, Path(folder), chosen.trl_python, say)
            except RaceError as error:
                failed += 1
                print(f"{algo}, seed {seed}: {error}", file=sys.stderr)
                continue
        rows.append(row)
        if chosen.out is not None:
            figures.append(chosen.out, row)
    found: dict[str, Any] = {"target": chosen.target, "rows": rows}
    of = {algo: [row for row in rows if row["algo"] == algo] for algo in chosen.algo}
    for name, column in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        found[name] = {algo: ratio(some, column) for algo, some in of.items()}
    print(json.dumps(found))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
