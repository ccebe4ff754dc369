"""Our iteration against TRL's, on the same work, on this machine; benchmarks/README.md explains how it is kept fair.

    python benchmarks/vs_trl.py --model tiny --algo grpo --lengths fixed --precision fp32
    python benchmarks/vs_trl.py --model tiny --algo grpo --check     whether both make the same update, no timing
    python benchmarks/vs_trl.py --all --out benchmarks/results/vs_trl.csv

The last line is JSON; its `ratio` is TRL's seconds over ours.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from race import figures, referee
from race.figures import Ratio, median_lap
from race.referee import RaceError, Result
from race.work import Work

NEW_TOKENS = {"tiny": 64, "gpt2": 32, "smollm2": 32, "llama": 64}
#: Models of ``--all``; llama, with 0.5 B, is for a GPU.
ALL = ("tiny", "gpt2", "smollm2")
PRECISIONS = ("fp32", "bf16")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(NEW_TOKENS), default="tiny")
    parser.add_argument("--algo", choices=("ppo", "grpo", "rloo"), default="grpo")
    parser.add_argument("--lengths", choices=("fixed", "varied"), default="fixed")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--critic", choices=("separate", "shared"), default="separate", help="ours, in PPO")
    parser.add_argument("--runs", type=int, default=5, help="pairs of iterations that are timed")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, help="a completion's; 64 for tiny, else 32")
    parser.add_argument(
        "--trl-micro-batch", type=int, help="sequences in a micro-batch of TRL's update (default: all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--check", action="store_true", help="compare the first update and end")
    parser.add_argument("--all", action="store_true", help="every model, algorithm and kind of lengths")
    parser.add_argument("--out", type=Path, help="a CSV to add a row to")
    chosen = parser.parse_args(argv)
    for name in ("runs", "prompts", "group_size", "new_tokens", "trl_micro_batch"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value}: at least 1")
    if chosen.group_size < 2 and chosen.algo != "ppo":
        parser.error(
            f"--group-size={chosen.group_size}: {chosen.algo} compares completions of a prompt; at least 2"
        )
    sequences = chosen.prompts * chosen.group_size
    chosen.trl_micro_batch = chosen.trl_micro_batch or sequences
    if sequences % chosen.trl_micro_batch:
        parser.error(f"--trl-micro-batch={chosen.trl_micro_batch}: a divisor of the {sequences} sequences")
    return chosen


def races(chosen: argparse.Namespace) -> list[Work]:
    """The races of the command line."""
    sizes = {name: getattr(chosen, name) for name in ("prompts", "group_size", "trl_micro_batch")}
    if not chosen.all:
        kinds = [(chosen.model, chosen.algo, chosen.critic, chosen.lengths, chosen.precision)]
    else:
        algos = (("grpo", "separate"), ("rloo", "separate"), ("ppo", "separate"), ("ppo", "shared"))
        grid = itertools.product(ALL, algos, ("fixed", "varied"), PRECISIONS)
        kinds = [(model, *algo, lengths, precision) for model, algo, lengths, precision in grid]
        # Autocast gains nothing if the overhead of calls dominates.
        kinds = [kind for kind in kinds if kind[0] != "tiny" or kind[-1] == "fp32"]
    return [
        Work(
            model,
            algo,
            lengths,
            precision,
            critic,
            **sizes,
            new_tokens=chosen.new_tokens or NEW_TOKENS[model],
            device=chosen.device,
        )
        for model, algo, critic, lengths, precision in kinds
    ]


def record(result: Result) -> dict[str, Any]:
    """One flat row: the race, its results, and the machine."""
    race, ratio = result.race, Ratio.of(result.laps)
    row: dict[str, Any] = asdict(race) | {
        "runs": len(result.laps),
        "ratio": round(ratio.median, 3),
        "ratio_lowest": round(ratio.lowest, 3),
        "ratio_highest": round(ratio.highest, 3),
    }
    tokens = sum(race.schedule())
    for name, laps, facts in zip(
        ("ours", "trl"), zip(*result.laps, strict=True), (result.ours, result.theirs), strict=True
    ):
        lap = median_lap(laps)
        row |= {f"{name}_{column}_s": round(value, 4) for column, value in asdict(lap).items()}
        row |= {
            f"{name}_samples_per_s": round(race.sequences / lap.seconds, 2),
            f"{name}_tokens_per_s": round(tokens / lap.seconds, 1),
            f"{name}_rest_gib": round(facts["rest_gib"], 3) if facts["rest_gib"] is not None else None,
            f"{name}_peak_gib": round(facts["peak_gib"], 3),
        }
    agreement, mine, other = result.agreement, result.ours["versions"], result.theirs["versions"]
    return row | {
        "gradient_cosine": None if agreement is None else round(agreement.cosine, 9),
        "gradient_length_error": None if agreement is None else round(agreement.length, 9),
        "policylab": mine["policylab"],
        "commit": (result.ours["commit"] or "")[:10] + ("+" if result.ours["dirty"] else ""),
        "trl": other["trl"],
        "torch": f"{mine['torch']} / {other['torch']}",
        "transformers": f"{mine['transformers']} / {other['transformers']}",
        "python": f"{result.ours['python']} / {result.theirs['python']}",
        "cpu": result.ours["cpu"],
        "gpu": result.ours["gpu"],
        "cores": result.ours["cores"],
        "threads": result.ours["threads"],
        "system": platform.system(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line a race."""
    header = ["race", "ours s", "TRL s", "ratio", "spread", "ours GiB", "TRL GiB"]
    lines = []
    for row in rows:
        race = Work(**{name: row[name] for name in Work.__dataclass_fields__})
        lines.append(
            [
                race.name, f"{row['ours_seconds_s']:.2f}", f"{row['trl_seconds_s']:.2f}", f"{row['ratio']:.2f}",
                f"{row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f}", f"{row['ours_peak_gib']:.2f}",
                f"{row['trl_peak_gib']:.2f}",
            ]
        )  # fmt: skip
    return figures.table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    todo, rows, failed = races(chosen), list[dict[str, Any]](), 0
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", flush=True)

    for number, race in enumerate(todo):
        spent = time.perf_counter() - started
        left = f", about {spent / number * (len(todo) - number) / 60:.0f} min left" if number else ""
        say(
            f"race {number + 1}/{len(todo)}{left}: {race.name}, {race.prompts} x {race.group_size} completions"
        )
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = referee.run(
                    race, 0 if chosen.check else chosen.runs, Path(folder), chosen.trl_python, say
                )
            except RaceError as error:
                failed += 1
                print(f"{race.name}: {error}", file=sys.stderr)
                continue
        if chosen.check:
            continue
        print(figures.side_by_side(result.laps))
        rows.append(record(result))
        if chosen.out is not None:
            figures.append(chosen.out, rows[-1])
    if rows:
        print(summary(rows))
        print(json.dumps(rows[-1] if len(rows) == 1 else rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
