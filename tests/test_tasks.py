"""Tasks: sources of reviews, their splits and metrics."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from conftest import Compose
from policylab.data.rollout import Completion
from policylab.errors import UserError
from policylab.tasks import vader
from policylab.tasks.base import Example, examples, take_validation
from policylab.tasks.metrics import distinct_2, polarity
from policylab.tasks.reviews import Reviews
from policylab.tasks.shuffle import permutation


def reviews(source: str, data_dir: Path = Path("nowhere"), **changes: Any) -> Reviews:
    values = {
        "name": "reviews",
        "prompt_words": 3,
        "held_out": 2,
        "instruction": None,
        "columns": {},
    } | changes
    values["hub"] = dict.fromkeys(["config", "revision", "train", "val"]) | changes.get("hub", {})
    return Reviews(source=source, data_dir=str(data_dir), **values)


def written(path: Path, *rows: object) -> str:
    """A JSON-lines file; text and bytes are written unchanged."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return str(path)


class TestDefault:
    def test_openings_are_many_short_and_split(self):
        task = reviews("default")
        train, val = ({example.text for example in split} for split in (task.train, task.val))
        assert len(task.val) == 256
        assert len(train) == len(task.train) == 1536
        assert not train & val
        assert all(2 <= len(text.split()) <= 6 for text in train | val)
        assert all(text == text.lower().strip() for text in train | val)

    def test_openings_are_neutral_to_the_reward(self):
        analyzer = SentimentIntensityAnalyzer()
        texts = [example.text for example in (*reviews("default").train, *reviews("default").val)]
        assert [text for text in texts if analyzer.polarity_scores(text)["compound"]] == []

    def test_metrics_do_not_see_the_prompt(self):
        completions = [
            Completion("a wonderful film", text, None, (1,), True)
            for text in (" about trains", " excellent so good so good")
        ]
        metrics = reviews("default").metrics(completions)
        assert metrics["polarity"][0] == 0.0
        assert metrics["polarity"][1] > 0.7
        assert metrics["distinct_2"] == [1.0, 0.75]


class TestFile:
    def test_prompts_and_whole_texts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        source = written(
            tmp_path / "mine.jsonl",
            {"prompt": "the cast", "completion": " is fine", "reference": {"stars": 4}, "split": "val"},
            {"prompt": "the script"},
            {"text": "one  two three four\nfive", "rating": 3},
            "",
            {"text": "two words"},
            {"text": "Alone"},
        )
        task = reviews(source)
        assert task.val == [Example("the cast", " is fine", {"stars": 4})]
        assert task.train == [
            Example("the script", "", None),
            Example("one two three", " four five", None),
            Example("two", " words", None),  # of a short text, the prompt omits only the last word
        ]  # a single word cannot be cut
        assert "1 of 5 rows are left out: a text of one word" in caplog.text

    def test_held_out_rows_are_the_same_every_time(self, tmp_path: Path):
        source = written(tmp_path / "mine.jsonl", *({"prompt": f"row {i}"} for i in range(10)))
        task = reviews(source, held_out=3)
        assert [example.text for example in task.val] == ["row 0", "row 8", "row 9"]
        assert len({example.text for example in (*task.train, *task.val)}) == 10

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ('{"prompt": ', r"mine.jsonl:2: Expecting value at column 12; give one JSON object a line"),
            ("[1]", r"mine.jsonl:2: \[1\] is not an object; give \{.prompt.: "),
            (b'{"prompt": "caf\xe9"}', r"mine.jsonl:2: 'utf-8' codec .*; save the file as UTF-8"),
            ({"review": "x"}, r"mine.jsonl:2: neither prompt nor text is among the fields \['review'\]"),
            ({"prompt": ""}, r"mine.jsonl:2: prompt is ''; it must be a text that is not empty"),
            ({"prompt": 3}, r"mine.jsonl:2: prompt is 3"),
            ({"prompt": "a", "completion": 3}, r"mine.jsonl:2: completion is 3"),
            ({"text": None}, r"mine.jsonl:2: text is None"),
            ({"prompt": "a", "split": "dev"}, r"mine.jsonl:2: split is 'dev'; it must be one of train, val"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, row: object, message: str):
        with pytest.raises(UserError, match=message):
            reviews(written(tmp_path / "mine.jsonl", {"prompt": "fine"}, row))

    def test_text_that_is_no_utf8(self, tmp_path: Path):
        (tmp_path / "mine.jsonl").write_bytes('{"prompt": "caf\xe9"}'.encode("latin-1"))
        with pytest.raises(UserError, match=r"mine.jsonl:1: .*decode"):
            reviews(str(tmp_path / "mine.jsonl"))

    def test_columns_by_another_name(self, tmp_path: Path):
        source = written(
            tmp_path / "mine.jsonl", *({"question": f"row {i}", "answer": i, "text": "no"} for i in range(4))
        )
        task = reviews(source, columns={"prompt": "question", "reference": "answer"}, held_out=1)
        assert task.val == [Example("row 0", "", 0)]
        assert task.val[0].where == f"{source}:1"
        with pytest.raises(
            UserError, match=r"mine.jsonl:1: task.columns.prompt=quest is not among the fields \['answer'"
        ):
            reviews(source, columns={"prompt": "quest"})
        with pytest.raises(
            UserError, match=r"task\.columns\.question is not a field of a row; known are prompt"
        ):
            reviews(source, columns={"question": "prompt"})

    def test_too_few_rows(self, tmp_path: Path):
        source = written(tmp_path / "mine.jsonl", {"prompt": "a"}, {"prompt": "b"})
        with pytest.raises(
            UserError, match=r"task.held_out=2, but .* has 2 rows; give task.held_out from 1 to 1"
        ):
            reviews(source)
        with pytest.raises(UserError, match="has 1 row; training and validation need one each"):
            reviews(written(tmp_path / "one.jsonl", {"prompt": "a"}))
        with pytest.raises(UserError, match="is a folder"):
            reviews(tmp_path)

    def test_nothing_to_train_on(self, tmp_path: Path):
        with pytest.raises(UserError, match="no row to train on"):
            reviews(written(tmp_path / "mine.jsonl", {"prompt": "a", "split": "val"}))

    @pytest.mark.parametrize("source", ["mine.jsonl", "./mine", "~/nowhere/mine.json"])
    def test_a_missing_file_is_no_hub_data_set(self, source: str):
        with pytest.raises(UserError, match="there is no such file"):
            reviews(source)

    def test_wrong_arguments(self):
        with pytest.raises(UserError, match=r"task\.prompt_words=0"):
            reviews("default", prompt_words=0)
        with pytest.raises(UserError, match=r"task\.instruction='Go on:' has no place for the prompt"):
            examples(reviews("default", instruction="Go on:"), "val")


class TestHub:
    """The `datasets` library is an extra, so a stub replaces the one function that is used."""

    GSM8K = MappingProxyType({"question": "Natalia sold clips ?", "answer": "48 / 2 = 24\n#### 24"})

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any]) -> None:
        def load_dataset(
            path: str, name: str | None = None, *, revision: str | None = None
        ) -> dict[str, Any]:
            if path == "openai/gsm8k":
                if name is None:
                    raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")
                return {
                    "train": [dict(self.GSM8K)] * 3,
                    "test": [self.GSM8K | {"answer": f"{name} {revision}"}],
                }
            if path not in splits:
                raise FileNotFoundError(f"no {path}")
            return splits[path]

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    def test_gsm8k(self, monkeypatch: pytest.MonkeyPatch):
        """It has two configs, other column names and a test split."""
        self.stand_in(monkeypatch, {})
        columns = {"prompt": "question", "reference": "answer"}
        task = reviews("openai/gsm8k", columns=columns, hub={"config": "main", "revision": "v1"})
        assert task.train == [Example(self.GSM8K["question"], "", self.GSM8K["answer"])] * 3
        assert task.val == [Example(self.GSM8K["question"], "", "main v1")]
        assert task.val[0].where == "openai/gsm8k/test:0"
        with pytest.raises(
            UserError, match=r"Config name is missing. Please pick .* name one: task\.hub\.config="
        ):
            reviews("openai/gsm8k", columns=columns)
        with pytest.raises(
            UserError, match=r"neither prompt nor text .*'answer', 'question'.*task.columns.prompt="
        ):
            reviews("openai/gsm8k", hub={"config": "main"})

    def test_splits_by_name(self, monkeypatch: pytest.MonkeyPatch):
        self.stand_in(
            monkeypatch,
            {"org/films": {"part": [{"prompt": str(i)} for i in range(4)], "b": [{"prompt": "b"}]}},
        )
        assert len(reviews("org/films", hub={"train": "part"}).val) == 2
        assert reviews("org/films", hub={"train": "part", "val": "b"}).val == [Example("b", "", None)]
        with pytest.raises(
            UserError, match=r"task\.hub\.val=test: org/films has no such split; it has part, b"
        ):
            reviews("org/films", hub={"train": "part", "val": "test"})
        with pytest.raises(UserError, match="has the splits part, b; choose one"):
            reviews("org/films")

    def test_its_test_split_is_held_out(self, monkeypatch: pytest.MonkeyPatch):
        rows = {"train": [{"text": "a b c d", "label": 0}], "test": [{"text": "e f g h", "label": 1}]}
        self.stand_in(monkeypatch, {"org/films": rows | {"unsupervised": [{"text": "no"}]}})
        task = reviews("org/films")
        assert task.train == [Example("a b c", " d", None)]
        assert task.val == [Example("e f g", " h", None)]

    def test_what_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch):
        self.stand_in(monkeypatch, {})
        with pytest.raises(
            UserError, match=r"task.source=org/none: .*cannot be loaded \(FileNotFoundError: no org/none\)"
        ):
            reviews("org/none")

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch):
        self.stand_in(monkeypatch, {})
        monkeypatch.setattr("policylab.models.hub.why_unreachable", lambda: "the hub cannot be reached")
        with pytest.raises(
            UserError, match=r"task\.source=org/films: the hub cannot be reached; HF_HUB_OFFLINE"
        ):
            reviews("org/films")

    def test_the_extra_is_not_installed(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"pip install -e '.\[hub\]'"):
            reviews("org/films")


class TestVader:
    """With an archive of the same layout with three snippets, because the real one is never committed."""

    LINES = (
        "1\t2.5\tA ''small'' film    but R&amp;D works\r\n"
        "2\t-0.6\tEffective but too tepid biopic\r\n"
        "3\t-0.6\tEffective but too tepid biopic\r\n"
        "4\t1\tIt's `fun' \N{EN DASH} really it\N{RIGHT SINGLE QUOTATION MARK}s\r\n"
    )

    def archive(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder.mkdir(parents=True)
        path = folder / vader.ARCHIVE
        inner = packed(vader.RATINGS, self.LINES.encode())
        path.write_bytes(packed(vader.INNER_ARCHIVE, inner))
        monkeypatch.setattr(vader, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    def test_repairs_and_provenance(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.archive(tmp_path / "vader", monkeypatch)
        path = vader.movie_reviews(tmp_path)
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
            {"text": 'A "small" film -- but R&D works', "reference": {"rating": 2.5}},
            {"text": "Effective but too tepid biopic", "reference": {"rating": -0.6}},
            {"text": "It's 'fun' -- really it's", "reference": {"rating": 1.0}},
        ]
        assert "MIT licence" in (path.parent / "PROVENANCE.md").read_text()
        assert not list(path.parent.glob("*.part"))

    def test_is_fetched_by_the_task_and_said_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        self.archive(tmp_path / "vader", monkeypatch)
        task = reviews("vader", tmp_path, held_out=1)
        assert len(task.train) == 2
        assert capsys.readouterr().out.startswith("fetching the movie reviews of vaderSentiment==3.3.2")
        assert reviews("vader", tmp_path, held_out=1).val == task.val
        assert capsys.readouterr().out == ""

    def test_a_changed_archive_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = self.archive(tmp_path / "vader", monkeypatch)
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(UserError, match=r"has sha256 .* delete it"):
            vader.movie_reviews(tmp_path)
        assert not (tmp_path / "vader" / "movie_reviews.jsonl").exists()

    def test_no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        failed = SimpleNamespace(stderr="WARNING: ...\nERROR: No matching distribution")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
        with pytest.raises(UserError, match=r"\(pip: ERROR: No matching distribution\).*tasks.vader"):
            reviews("vader", tmp_path)


def packed(name: str, content: bytes) -> bytes:
    """A .tar.gz with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_polarity_literals():
    assert [polarity(text) for text in ("good", "not good", "about trains", "")] == [0.7, -0.35, 0.0, 0.0]


def test_distinct_2_literals():
    texts = ["so good so good so good", "a b c", "good good good", "good", ""]
    assert [distinct_2(text) for text in texts] == [0.4, 1.0, 0.5, 1.0, 1.0]


def test_take_validation(caplog: pytest.LogCaptureFixture):
    task = reviews("default")
    assert take_validation(task, 3) == task.val[:3]
    assert not caplog.records
    assert take_validation(task, 257) == task.val
    assert caplog.messages == [
        "validation.prompts=257, but task reviews has 256 held-out prompts; all of them are used"
    ]
    task.val = []
    with pytest.raises(UserError, match="task reviews has no held-out prompt for validation"):
        take_validation(task, 3)


def test_rows_of_a_task_are_examples():
    task = reviews("default")
    assert examples(task, "train") == task.train
    task.train = [task.train[0], ("a", "b")]
    with pytest.raises(
        UserError, match=r"row 1 of train of task reviews is \('a', 'b'\); it must be an Example"
    ):
        examples(task, "train")
    del task.instruction
    with pytest.raises(UserError, match="task Reviews has no instruction"):
        examples(task, "train")


def test_permutation_is_a_pure_function_of_its_key():
    assert permutation(8, 0, 0) == [0, 3, 7, 5, 1, 2, 6, 4]
    assert sorted(permutation(100, 1, 2)) == list(range(100))
    assert permutation(100, 1, 2) != permutation(100, 1, 3) != permutation(100, 2, 2)


def test_a_task_states_the_length_of_completions(compose: Compose):
    """A walk has at most 10 nodes, of which the first is the prompt, and then the EOS."""
    from policylab.config.build import engine_of

    config = compose(["task=random_walks"])
    assert engine_of(config).max_new_tokens == config.rollout.max_new_tokens == 10
    assert compose(["task=random_walks", "task.max_length=6"]).rollout.max_new_tokens == 6
    assert compose(["task=random_walks", "rollout.max_new_tokens=7"]).rollout.max_new_tokens == 7
    assert compose(["~task.max_new_tokens"]).rollout.max_new_tokens == 24, "a task need not say"


@pytest.mark.parametrize("name", ["reviews", "random_walks"])
def test_the_configs_build_tasks(compose: Compose, name: str):
    from policylab.config.build import instantiate, without

    config = compose([f"task={name}"])
    task = instantiate(without(config, "task"))
    reward = instantiate(without(config, "reward"))
    assert task.name == name
    example = task.val[0]
    completion = Completion(example.text, example.completion or "a", example.reference, (1,), True)
    assert len(reward([completion])) == 1
    assert all(len(values) == 1 for values in task.metrics([completion]).values())
    assert len(take_validation(task, config.validation.prompts)) == 256
