"""Secrets are not saved, and a run folder cannot decide what only the command may decide."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from conftest import evaluated
from policylab.cli.hydra_files import Redacted, tidy
from policylab.cli.logs import Formatter
from policylab.errors import UserError
from policylab.launch.run import task_overrides
from policylab.runs import redaction
from policylab.runs.command import with_command_of
from policylab.runs.consent import check_consent, with_consent
from policylab.runs.folder import write_json
from policylab.runs.redaction import HIDDEN, redact, redact_text, redact_words
from policylab.runs.saved_config import load_usable, plain, self_contained
from policylab.runs.status import RunStatus, read_status


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Forgets the secrets of a test before the next one."""
    monkeypatch.setattr(redaction, "_known", set())


class Paid:
    """A reward with an API key."""

    def __init__(self, api_key: str, password: object = None, headers: object = None) -> None:
        self.api_key = api_key

    def __call__(self, completions):
        logging.getLogger(__name__).warning("asked with %s", self.api_key)
        return [float(len(completion.text)) for completion in completions]


def test_a_plan_knows_the_secrets(monkeypatch, tmp_path, compose):
    from policylab.launch import run

    overrides = ["plan=true", f"paths.logs={tmp_path}", "+reward.api_key=sk-SECRET"]
    hydra = OmegaConf.create(
        {
            "runtime": {"output_dir": str(tmp_path / "run"), "choices": {}},
            "overrides": {"task": overrides},
        }
    )
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: hydra)
    said = []
    monkeypatch.setattr(
        "policylab.planning.plan.plan_job", lambda _: said.append(redact_text("by sk-SECRET"))
    )
    monkeypatch.setattr("sys.argv", ["train.py"])
    run.train_job(compose(overrides))
    assert said == [f"by {HIDDEN}"]


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("+reward.api_key=sk-SECRET", f"+reward.api_key={HIDDEN}"),
        ("++x.password=123456", f"++x.password={HIDDEN}"),
        ("a.token='tk SECRET'", f"a.token={HIDDEN}"),
        ("a.api_keys=[one,two]", f"a.api_keys={HIDDEN}"),
        ("a.authToken=a,b", f"a.authToken={HIDDEN}"),
        ("+a={_target_:my.Reward,api-key:x}", f"+a={HIDDEN}"),
        ("+a=[{X-API-Key:x}],[{X-API-Key:y}]", f"+a={HIDDEN}"),
        ("+a.secrets.openai=x", f"+a.secrets.openai={HIDDEN}"),
        ("+a.key=${oc.env:KEY,sk-SECRET}", "+a.key=${oc.env:KEY,sk-SECRET}"),
        ("+a.api_key=${oc.env:KEY,sk-SECRET}", f"+a.api_key={HIDDEN}"),
        ("a.uri=http://user:word@host", f"a.uri={HIDDEN}"),
        ("a.uri=http://host?token=x&n=1", f"a.uri={HIDDEN}"),
        *[
            (word, word)
            for word in (
                *("+a.api_key=${oc.env:KEY}", "+a={Authorization:'Bearer ${oc.env:KEY}'}", "a.token=null"),
                *("m.eos_token=0", "m.pad_token='<pad>'", "rollout.max_new_tokens=8", "a.use_auth=true"),
                *("~a.api_key", "-m", "train.py", "--config-dir=/x", "a.uri=http://u:${oc.env:P}@host"),
            )
        ],
    ],
)
def test_a_command_line_without_secrets(word, kept):
    assert redact_words([word]) == [kept]


def test_a_secret_is_hidden_at_every_other_place(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    before = {
        "logger": {"wandb": {"api_key": "sk-SECRET", "project": "p"}},
        "reward": {"password": 123456, "credentials": {"user": "me"}, "eos_token": "</s>"},
        "note": ["holds 0123456789abcdef inside", "sk-SECRET again"],
        "command": "train.py hf_token=abc seed=1",
    }
    after = {
        "logger": {"wandb": {"api_key": HIDDEN, "project": "p"}},
        "reward": {"password": HIDDEN, "credentials": {"user": HIDDEN}, "eos_token": "</s>"},
        "note": [f"holds {HIDDEN} inside", f"{HIDDEN} again"],
        "command": f"train.py hf_token={HIDDEN} seed=1",
    }
    assert redact(before) == after
    assert redact_text("401 for sk-SECRET") == f"401 for {HIDDEN}"
    record = logging.makeLogRecord({"msg": "401 for %s", "args": ("sk-SECRET",)})
    assert Formatter("%(message)s").format(record) == f"401 for {HIDDEN}"


def test_the_reason_of_a_failure_holds_no_secret(tmp_path):
    redact({"api_key": "sk-SECRET"})
    with pytest.raises(ValueError, match="401"), RunStatus(tmp_path, 1, None):
        raise ValueError("401 for sk-SECRET")
    assert read_status(tmp_path)["exception"] == f"ValueError: 401 for {HIDDEN}"


def test_a_saved_config_refers_to_the_environment_and_resolves_all_other_values(monkeypatch):
    monkeypatch.setenv("KEY", "sk-SECRET")
    monkeypatch.setenv("NUMBER", "5")
    monkeypatch.setenv("HF_TOKEN", "hf-SECRET")
    config = OmegaConf.create(
        {
            "reward": {"api_key": "${oc.env:KEY}", "auth": "Bearer ${oc.env:KEY}", "token": "literal"},
            "copy": "${reward.api_key}",
            "number": "${oc.decode:${oc.env:NUMBER}}",
            "other": "${number}",
            "setting": "${oc.env:NUMBER,3}",
            "none": "${oc.env:NOT_THERE,null}",
            "hub": "${oc.env:HF_TOKEN,null}",
            "hub_too": "${oc.env:HF_TOKEN,fallback}",
            "text": "a \\${b} and \\\\\\${c}",
        }
    )
    saved = plain(config)
    assert saved["reward"] == {
        "api_key": "${oc.env:KEY}",
        "auth": "Bearer ${oc.env:KEY}",
        "token": HIDDEN,
    }
    assert saved["copy"] == "${oc.env:KEY}"
    assert saved["number"] == saved["other"] == 5
    assert (saved["setting"], saved["none"]) == ("5", "${oc.env:NOT_THERE,null}")
    assert (saved["hub"], saved["hub_too"]) == ("${oc.env:HF_TOKEN,null}", "${oc.env:HF_TOKEN}")
    resolved = OmegaConf.to_container(config, resolve=True)
    assert OmegaConf.to_container(OmegaConf.create(self_contained(config)), resolve=True) == resolved
    assert "SECRET" not in json.dumps(saved)


def test_a_reference_on_the_command_line_is_recorded_unresolved(monkeypatch):
    monkeypatch.setenv("KEY", "sk-SECRET")
    words = ["+reward.api_key=${oc.env:KEY}", "seed=1"]
    assert redact_words(task_overrides(OmegaConf.create({"overrides": {"task": words}}))) == words


def test_a_secret_that_was_not_saved_is_not_used(monkeypatch, tmp_path):
    monkeypatch.delenv("KEY", raising=False)
    config = OmegaConf.create({"reward": {"api_key": HIDDEN}, "model": {"key": "${oc.env:KEY}"}, "n": 1})
    OmegaConf.save(config, tmp_path / "config.yaml")
    load_usable(tmp_path, ["n"], False)
    with pytest.raises(
        UserError, match=r"api_key was given as plain text, and secrets are not saved; write \$"
    ):
        load_usable(tmp_path, ["reward"], False)
    with pytest.raises(UserError, match=r"config\.yaml: model\.key: Environment variable 'KEY' not found"):
        load_usable(tmp_path, ["model"], False)
    monkeypatch.setenv("KEY", "here")
    assert load_usable(tmp_path, ["model"], False).model.key == "here"


def test_hydra_s_own_files_hold_no_secrets(tmp_path):
    content = {
        "reward": {"api_key": "sk-SECRET", "more": "${reward.api_key}"},
        "hydra": {
            "mode": RunMode.MULTIRUN,
            "overrides": {"task": ["+reward.api_key=sk-SECRET", "seed=0,1"]},
            "job": {"override_dirname": "+reward.api_key=sk-SECRET,seed=0"},
            "sweep": {"dir": str(tmp_path)},
            "runtime": {"output_dir": str(tmp_path / "0")},
            "output_subdir": ".hydra",
        },
    }
    files = tmp_path / "multirun.yaml", tmp_path / "0" / ".hydra" / "overrides.yaml"
    files[1].parent.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(content), files[0])
    OmegaConf.save(OmegaConf.create(["+reward.api_key=sk-SECRET", "seed=0"]), files[1])
    Redacted().on_job_start(OmegaConf.create(content))
    tidy(files[0])
    assert [file.read_text().count("SECRET") for file in files] == [0, 0]
    assert OmegaConf.load(files[1]) == [f"+reward.api_key={HIDDEN}", "seed=0"]
    assert OmegaConf.to_container(OmegaConf.load(files[0]))["reward"]["more"] == "${reward.api_key}"
    shutil.rmtree(tmp_path / "0")
    tidy(files[0])
    assert not tmp_path.exists(), "every job was refused"


def test_each_job_of_a_multirun_that_fails_is_named(capsys):
    config = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "job": {"num": 1}}})
    failed = JobReturn(overrides=["seed=1", "+a.api_key=x"], status=JobStatus.FAILED)
    failed._return_value = UserError("x is wrong")
    Redacted().on_job_end(config, failed)
    assert capsys.readouterr().err == f"job 1 (seed=1 +a.api_key={HIDDEN}) failed: x is wrong\n"
    assert failed.overrides == ["seed=1", f"+a.api_key={HIDDEN}"]
    Redacted().on_job_end(config, JobReturn(overrides=[], status=JobStatus.COMPLETED))
    assert capsys.readouterr().err == ""


def test_a_run_keeps_no_secret(train_briefly, monkeypatch, caplog):
    """In no file, also of loggers; a secret from the environment is read again at evaluation."""
    monkeypatch.setenv("PAID_KEY", "sk-SECRET123")
    run = train_briefly(
        [
            *("debug=fast", "model=tiny_scratch", "hardware=cpu", "callbacks.console=null"),
            *(f"reward._target_={__name__}.Paid", "reward._partial_=false", "logger=tensorboard"),
            *(
                "+reward.api_key=${oc.env:PAID_KEY}",
                "+reward.password=4711000",
                "+reward.headers=[{token: to ken}]",
            ),
        ]
    )
    assert any("sk-SECRET123" in message for message in caplog.messages), "the reward had its key"
    said = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert [
        path for path, text in said.items() if b"SECRET" in text or b"4711000" in text or b"to ken" in text
    ] == []
    assert len([path for path, text in said.items() if b"${oc.env:PAID_KEY}" in text]) >= 3
    with pytest.raises(UserError, match=r"reward\.password was given as plain text"):
        evaluated(run)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace(HIDDEN, "${oc.env:PAID_KEY}"))
    assert evaluated(run)["metrics"]["val/reward"] > 0


# -- code that comes with a model ---------------------------------------------------------------------------


def test_only_this_command_can_allow_remote_code():
    config = OmegaConf.create({"model": {"trust_remote_code": True}, "reward": [{"trust_remote_code": True}]})
    changed = with_consent(config, False)
    assert not changed.model.trust_remote_code
    assert not changed.reward[0].trust_remote_code
    assert with_consent(changed, True) == config
    config.resume = "logs/x"
    with pytest.raises(
        UserError, match=r"logs/x was started with model\.trust_remote_code=true, .* give it again"
    ):
        check_consent(config, ["train.py", "resume=logs/x"])
    with pytest.raises(UserError, match=r"with reward\[0\]\.trust_remote_code=true"):
        check_consent(config, ["train.py", "resume=logs/x", "model.trust_remote_code=true"])
    config.reward = None
    check_consent(config, ["train.py", "resume=logs/x", "model.trust_remote_code=true"])
    check_consent(config, ["train.py", "resume=logs/x", "+model={trust_remote_code: true}"])
    check_consent(OmegaConf.create({"model": {"trust_remote_code": False}}), [])


def test_a_run_s_folder_cannot_have_code_run(tmp_path, monkeypatch):
    """Code in a model's folder runs only if this command allows it, whatever config.yaml says."""
    from policylab.launch.generate import load_trained

    folder = tmp_path / "model" / "best"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    write_json(folder / "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}})
    config = {
        "model": {"dtype": "float32", "attn_implementation": "sdpa", "trust_remote_code": True},
        "hardware": {"products": "pytorch"},
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="trust_remote_code=true"):
        load_trained(tmp_path, "best")
    assert not (tmp_path / "ran").exists()


def test_a_resumed_run_asks_for_its_secret(tmp_path: Path):
    write_json(tmp_path / "status.json", {"status": "failed"})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    write_json(
        tmp_path / "env.json", {"overrides": redact_words(["+reward.api_key=x", "+a.api_key=${oc.env:KEY}"])}
    )
    with pytest.raises(UserError, match=r"reward\.api_key was given as plain text.* give it again") as told:
        with_command_of([f"resume={tmp_path}"])
    assert redact_text(str(told.value)) == str(told.value), "and can be told"
    words = with_command_of([f"resume={tmp_path}", "+reward.api_key=x"])
    assert words[0] == "+a.api_key=${oc.env:KEY}"
