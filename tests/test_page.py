"""``report.html``: each part on small run folders, and the page in headless Chromium where there is one."""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from policylab.errors import UserError
from policylab.report import page
from policylab.report.charts import Chart, charts, short, thinned, ticks
from policylab.report.completions import is_flat, spaced
from policylab.report.evidence import report_job
from policylab.report.html import tag
from policylab.report.page import PAGE, try_to_write_page, write_page
from policylab.report.tokens import TOKENS, token_records
from policylab.runs.token_records import write_records

ATTACK = '</script><script>document.title = "run"</script><img src=x onerror="alert(1)"> {{data}} & "quoted"'

WORDS = ["algo=ppo", "optim.lr=0.01", "+optim.betas=[0.9,0.95]"]


def sample(iteration: int, split: str, prompt: str, reward: float, text: str = "good") -> dict[str, Any]:
    return {
        "iteration": iteration,
        "split": split,
        "prompt": prompt,
        "completion": text,
        "reward": reward,
        "parts": {"positive": reward},
        "kl": 0.5,
        "length": 3,
        "ended": iteration > 0,
        "tokens": [1, 2, 0],
    }


def make_run(folder: Path, samples: list[dict[str, Any]] | None = None) -> Path:
    """A run folder as `train.py` writes it."""
    folder.mkdir(parents=True)
    config = {
        "seed": 3,
        "iterations": 4,
        "algo": {"name": "ppo", "gamma": 1.0},
        "model": {"name": "tiny"},
        "task": {"name": "reviews"},
        "optim": {"lr": 0.01, "betas": [0.9, 0.95]},
        "tags": ["<b>bold</b>"],
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    status = {"status": "done", "iteration": 4, "iterations": 4, "exception": None, "wall_seconds": 75.0}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.csv").write_text(
        "iteration,val/reward,val/kl,train/reward,train/reward/positive,perf/update_s,perf/tokens_per_s,train/own\n"
        "0,0.1,0,,,,,\n1,,,0.2,0.3,1,9,nan\n2,0.9,4,0.4,0.3,1,9,7\n3,,,0.6,0.3,1,9,inf\n4,0.8,5,0.5,0.3,1,9,7\n"
    )
    (folder / "summary.json").write_text(
        json.dumps({"best": {"metric": "val/reward", "value": 0.9, "iteration": 2}, "wall_seconds": 75.0})
    )
    parents = [
        {"run": "/logs/sft/a_s0", "name": "sft-tiny", "policy": "best", "iteration": 20, "weights": "ab" * 32}
    ]
    recorded = {
        "python": "3.11.7",
        "git": {"commit": "f00"},
        "parents": parents,
        "command": "python train.py algo=ppo",
    }
    (folder / "env.json").write_text(json.dumps(recorded | {"overrides": WORDS}))
    (folder / "train.log").write_text(
        "[2026-11-28 08:32:52,106 INFO policylab.cli] started\n"
        "[2026-11-28 08:33:00,001 WARNING policylab.callbacks.health] iteration 2: KL <is> 60\nsecond line\n"
        "[2026-11-28 08:33:01,000 INFO policylab.cli] done\n"
        "[2026-11-28 08:33:02,000 ERROR policylab.launch] the run failed\n"
    )
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


SAMPLES = [
    sample(0, "val", "the film", 0.1, ATTACK),
    sample(2, "val", "the film", 0.5, "in between"),
    sample(4, "val", "the film", 0.8, "at the end"),
    *(sample(2, "train", "flat prompt", 0.5) for _ in range(3)),
    *(sample(2, "train", "spread prompt", reward) for reward in (0.1, 0.7)),
]


def record(**columns: list[float | None]) -> dict[str, Any]:
    return {
        **sample(1, "train", "the film", 0.5, ATTACK),
        "text": [" a", ATTACK, "\n"],
        "chosen": [True, False, True],
        "kept": True,
        **columns,
    }


class Page(HTMLParser):
    """Texts by element, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self.starts: list[str] = []
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.starts.append(name)
        self.loads += [str(value) for key, value in attributes if key in ("src", "href", "action", "srcset")]
        assert not [key for key, _ in attributes if key == "style" or key.startswith("on")], (
            "the policy forbids them"
        )
        if name not in ("meta", "link"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name, f"{name} closes no open element"

    def handle_data(self, text: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", text))

    @property
    def text(self) -> str:
        return "".join(text for name, text in self.texts if name not in ("script", "style"))


def written(run: Path) -> Page:
    write_page(run, run / PAGE)
    return Page((run / PAGE).read_text())


def test_page_of_a_run(tmp_path: Path) -> None:
    found = written(make_run(tmp_path / "run", SAMPLES))
    assert not found.open
    for expected in (
        *("Summary", "Curves", "Warnings", "Samples", "Config", "Environment"),
        *("done", "ppo", "tiny", "reviews", "1 min 15 s", "python train.py algo=ppo"),
        *("best (iteration 2)", "after (iteration 4)", "+0.7", "sft-tiny", "best policy, of iteration 20"),
        *(
            "KL to the reference",
            "Parts of the reward",
            "Time of an iteration",
            "2 other metrics",
            "2 values are not finite",
        ),
        *(
            "KL <is> 60\nsecond line",
            "the run failed",
            "before training",
            "at the end",
            "1 validation between",
        ),
        *("Iteration 2: 2 prompts, 1 of 2 groups flat", "f00", "<b>bold</b>"),
    ):
        assert expected in found.text, expected
    assert "started" not in "".join(text for name, text in found.texts if name == "pre"), (
        "only warnings and errors"
    )
    bold = {text for name, text in found.texts if name == "b"}
    assert {"optim.lr", "optim.betas[0]"} <= bold, "what the command has set"
    assert "algo.gamma" not in bold
    assert found.text.count("flat: all rewards are equal") == 1


def test_page_loads_nothing_and_runs_no_script_of_a_completion(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SAMPLES)
    found = written(run)
    assert all(place.startswith("#") or place == "data:," for place in found.loads), found.loads
    assert found.starts.count("script") == 2
    assert "img" not in found.starts
    assert ATTACK in found.text
    text = (run / PAGE).read_text()
    assert not re.search(r"https?://|@import|url\(|<link (?!rel=\"icon\")", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert [page.sha256(script) in policy for script in scripts] == [True]


def test_data_of_the_page_is_json(tmp_path: Path) -> None:
    found = written(make_run(tmp_path / "run", SAMPLES))
    data = json.loads(next(text for name, text in found.texts if name == "script"))
    reward = data["charts"][0]
    assert reward["box"][2:] == [0, 4]
    assert reward["curves"][1] == ["val", [[0, 0.1], [2, 0.9], [4, 0.8]]]
    assert json.loads(page.embedded({"text": ATTACK}).replace("\n", "")) == {"text": ATTACK}
    assert "<" not in page.embedded({"text": ATTACK})


def test_token_view(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SAMPLES)
    assert "Tokens" not in written(run).text
    write_records(
        run, 1, [record(logprobs=[-1.0, 0.0, -2.0], ref_logprobs=[-1.5, 0.0, -1.0], values=[0.1, None, 0.3])]
    )
    write_records(run, 10, [record(advantages=[0.5, 0.0, -0.5])])
    found = written(run)
    assert "Tokens" in found.text
    assert "img" not in found.starts
    first, last = json.loads(next(text for name, text in found.texts if name == "script"))["tokens"]
    assert (first["iteration"], last["iteration"]) == (1, 10)
    assert first["samples"][0]["text"][1] == ATTACK
    assert first["samples"][0]["measures"] == {
        "KL to the reference": [0.5, 0.0, -1.0],
        "value": [0.1, None, 0.3],
        "log-prob": [-1.0, 0.0, -2.0],
    }
    assert last["samples"][0]["measures"] == {"advantage": [0.5, 0.0, -0.5]}
    for iteration in range(20, 60, 10):  # more than the page holds: the first and the last stay
        write_records(run, iteration, [{**record(), "tokens": [0] * (TOKENS // 3)}])
    assert [part["iteration"] for part in token_records(run)] == [1, 20, 50]


def test_older_and_unfinished_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("env.json", "summary.json", "train.log"):
        (run / name).unlink()
    (run / "status.json").write_text(json.dumps({"status": "failed", "exception": "RunError: <lost>"}))
    found = written(run)
    for expected in ("failed", "RunError: <lost>", "no samples.jsonl", "no train.log", "after (iteration 4)"):
        assert expected in found.text, expected
    (run / "status.json").write_text(
        json.dumps(
            {
                "status": "running",
                "process": 2**22 + 1,
                "host": platform.node(),
                "iteration": 2,
                "iterations": 4,
            }
        )
    )
    (run / "metrics.csv").write_text("iteration,train/reward\n1,0.2\n")
    old = {"iteration": 1, "split": "train", "prompt": "p", "completion": "c", "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(old) + '\n{"iteration": 2, "spl')
    found = written(run)
    for expected in (
        "killed",
        "2 of 4",
        "No validation is on record",
        "Iteration 1: 1 prompt",
    ):
        assert expected in found.text, expected


def test_a_page_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = make_run(tmp_path / "run")
    assert try_to_write_page(run, "done")
    (run / "env.json").write_text("{")
    assert not try_to_write_page(run, "done")
    (message,) = caplog.messages
    assert message.startswith("could not write report.html: JSONDecodeError")


def test_report_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    report_job(OmegaConf.create({"run": str(run), "runs": None, "out": None}))
    assert capsys.readouterr().out == f"written to {run / PAGE}\n"
    report_job(OmegaConf.create({"run": str(run), "runs": None, "out": str(tmp_path / "a.html")}))
    assert (tmp_path / "a.html").read_text() == (run / PAGE).read_text()
    for run_name, runs, message in (
        (None, None, "give run=RUN"),
        (str(run), str(run), "give run=RUN"),
        (None, str(run), "out=FOLDER"),
        (str(tmp_path / "none"), None, "no run at"),
    ):
        with pytest.raises(UserError, match=message):
            report_job(OmegaConf.create({"run": run_name, "runs": runs, "out": None}))


def test_html_is_escaped() -> None:
    assert tag("p", "a<b", tag("i", "&"), class_='x"y', hidden=True, id=None) == (
        '<p class="x&quot;y" hidden>a&lt;b<i>&amp;</i></p>'
    )


def test_axes_and_long_curves() -> None:
    assert ticks(0.13, 0.72, 4) == [0.2, 0.4, 0.6]
    assert ticks(-3e-5, 3e-5, 4) == [-2e-5, 0, 2e-5]
    assert [short(value) for value in (20000, 2.5e6, 0.25, -3, 0)] == ["20k", "2.5M", "0.25", "-3", "0"]
    curve = {i: float(i == 1234) - float(i == 4321) for i in range(10_000)}
    kept = thinned(curve)
    assert len(kept) <= 600
    assert (max(kept.values()), min(kept.values()), kept[1234]) == (1.0, -1.0, 1.0)
    drawn, other = charts({"train/kl": {1: 2.0}, "train/ratio_max": {1: 1.0}, "val/bleu": {0: float("nan")}})
    assert [(chart.title, list(chart.curves)) for chart in drawn] == [("KL to the reference", ["train/kl"])]
    assert other == [Chart("ratio_max", "", {"train/ratio_max": {1: 1.0}}, 0)]


def test_groups_and_spacing() -> None:
    assert [is_flat([{"reward": r} for r in rewards]) for rewards in ([1], [1, 1], [1, 2])] == [
        False,
        True,
        False,
    ]
    assert spaced(list(range(0, 101, 10)), 3) == [0, 50, 100]
    assert spaced([1, 2], 3) == [1, 2]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(tmp_path: Path, width: int) -> None:
    """The page's script runs, that of a completion does not, and nothing is wider than a phone."""
    run = make_run(tmp_path / "run", SAMPLES)
    write_records(run, 1, [record(advantages=[0.5, 0.0, -0.5])])
    write_page(run, run / PAGE)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="page" style="width:{width}px;height:900px" src="file://{run / PAGE}"></iframe>'
        "<script>onload = () => setTimeout(() => { const page = document.getElementById('page').contentDocument;"
        "const svg = page.querySelector('svg'); svg.focus();"
        "svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home', bubbles: true}));"
        "document.title = JSON.stringify([page.title, page.querySelector('.at').textContent,"
        "page.documentElement.scrollWidth,"
        "[...page.querySelectorAll('.strip span')].map(it => [it.textContent, it.style.backgroundColor !== ''])]);"
        "}, 100)</script>"
    )
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
    )
    command = [
        str(CHROMIUM),
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{probe}",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    (title,) = re.findall(r"<title>(.*)</title>", dom)
    name, at, wide, tokens = json.loads(unescape(title))
    assert tokens == [[" a", True], [ATTACK, False], ["⏎\n", True]]
    assert (name, at) == ("ppo-tiny, run", "iteration 0")
    assert wide <= width
