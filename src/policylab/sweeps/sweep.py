"""A sweep: runs the jobs of a multirun for Hydra's launcher."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from policylab.cli.hydra_files import sweep_file
from policylab.config.checks import check, check_switch, check_whole
from policylab.errors import RunError, UserError, counted
from policylab.runs import status
from policylab.runs.find import LATEST_SWEEP
from policylab.runs.folder import check_link, point_latest
from policylab.runs.parents import with_parent
from policylab.runs.redaction import redact, redact_file, redact_words
from policylab.runs.words import leaves, override, override_key
from policylab.sweeps import ending
from policylab.sweeps.choices import Choices, sweep_words
from policylab.sweeps.cluster import Cluster
from policylab.sweeps.index import Index
from policylab.sweeps.jobs import SIDE, Job
from policylab.sweeps.pool import Outcome, Pool, Running
from policylab.sweeps.process import JobProcess, is_alive
from policylab.sweeps.progress import is_done
from policylab.sweeps.slots import Slot, Slots, need_of
from policylab.sweeps.table import View
from policylab.user_code import short_path

#: Overrides of Hydra's settings that concern the multirun, not its jobs.
OF_THE_MULTIRUN = (
    *("hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper", "hydra.mode"),
    "hydra.run.",
)
#: Hydra's flags that select the configs.
CONFIG_FLAGS = ("config_path", "config_name", "config_dir")


class Sweep:
    """Runs the jobs of a multirun and records them in its folder.

    Args:
        config: config of the multirun: values that all jobs share, and Hydra's own.
        context, task: from Hydra.
        jobs, threads, fail_fast, resume, cluster, submitit: values of ``hydra.launcher``.

    Raises:
        UserError: when a value is wrong, or ``sweep=`` names another sweep than this command's.
    """

    def __init__(
        self,
        config: DictConfig,
        context: HydraContext,
        task: TaskFunction,
        *,
        jobs: int | None,
        threads: int,
        fail_fast: bool,
        resume: bool,
        cluster: str | None,
        submitit: DictConfig,
    ) -> None:
        for name, number in (("jobs", jobs), ("threads", threads)):
            if name != "jobs" or number is not None:
                check_whole(f"hydra.launcher.{name}", number, 1)
        check_switch("hydra.launcher.fail_fast", fail_fast)
        self.config, self.context, self.task = config, context, task
        self.threads = threads
        self.slots = Slots(sys.maxsize if cluster and jobs is None else jobs, threads)
        self.at_once = str(jobs) if jobs else "all" if cluster else "as many as fit"
        self.view = View()
        self.pool = Pool(self.start, self.is_alive, self.slots, self.view, fail_fast=fail_fast)
        words = sweep_words(config.hydra.sweeper.get("params"), config.hydra.overrides.task)
        self.choices = Choices(words, context.config_loader)
        self.folder, self.logs = Path(config.hydra.sweep.dir).absolute(), Path(config.paths.logs)
        self.places = dict[Path, str]()  # label of the job of each folder
        parameters: Any = OmegaConf.to_container(submitit, resolve=True)
        self.cluster = Cluster(cluster, self.folder, parameters) if cluster else None
        if not config.plan:
            self.index = Index(self.folder, resume=resume)
            self.index.begin(self.choices.shared, self.choices.swept, self.values)

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """The config values that decide the results of jobs with these overrides, by dotted key, unresolved and without
        secrets."""
        config = self.context.config_loader.load_sweep_config(self.config, list(words))
        content: Any = OmegaConf.to_container(config, resolve=False)
        own = {key: value for key, value in content.items() if key not in SIDE}
        return dict(leaves(redact(own))) | {"hydra.launcher.threads": self.threads}

    def launch(self, overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Runs a batch of jobs and returns their outcomes."""
        if self.config.plan:
            return self.plan([with_parent(self.choices.own(words), self.logs) for words in overrides])
        jobs = [self.job(words) for words in overrides]
        self.announce(jobs)
        outcomes = dict[str, Outcome]()
        try:
            for outcome in self.outcomes(dict.fromkeys(jobs)):
                outcomes[outcome.job.label] = outcome
        finally:
            self.end(jobs, outcomes)
        missing = [
            job.label for job in jobs if job.label not in outcomes or outcomes[job.label].state != status.DONE
        ]
        error = RunError(
            f"{len(missing)} of {counted(len(jobs), 'job')} did not finish: {', '.join(missing)}"
        )
        return [returned(job, outcomes.get(job.label), error) for job in jobs]

    def announce(self, jobs: Sequence[Job]) -> None:
        """Prints the number of jobs and their states."""
        states = Counter(self.view.progress(job).state for job in jobs)
        count = ", ".join(f"{number} {state}" for state, number in states.items())
        self.view.say(
            None,
            f"sweep {short_path(self.folder)}: {counted(len(jobs), 'job')} ({count}), {self.at_once} at once",
        )
        for job in jobs:
            if job.label in self.index.failed and not is_done(job.folder):
                self.view.say(job, f"failed before: {self.index.failed[job.label]}")

    def each(self, overrides: Iterable[Sequence[str]]) -> Iterator[JobReturn]:
        """Runs jobs. Takes the next one when there is room for it, and yields each as soon as it has ended."""
        for outcome in self.outcomes(map(self.job, overrides)):
            yield returned(
                outcome.job, outcome, RunError(f"{outcome.job.label} {outcome.state}: {outcome.reason}")
            )

    def outcomes(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yields the outcomes of jobs, and records failures."""
        redact_file(sweep_file(self.config))
        for outcome in self.pool.run(jobs):
            if outcome.state == status.FAILED:
                self.index.add_failure(outcome.job, outcome.reason)
            yield outcome

    def job(self, words: Sequence[str]) -> Job:
        """The job with these overrides.

        Raises:
            UserError: when a value is wrong, this machine does not have the job's hardware, or another job has the same
                folder.
        """
        own = self.choices.own(words)
        label = self.index.label(own)
        own = with_parent(own, self.logs)
        config = self.context.config_loader.load_sweep_config(self.config, own)
        with open_dict(config):
            config.hydra.job.id = label
            place = self.folder / str(config.hydra.sweep.subdir)
            del config.hydra
        check(config)
        if (other := self.places.setdefault(place, label)) != label:
            raise UserError(
                f"jobs {other} and {label} have the same folder {place}; put every swept key into hydra.sweep.subdir, "
                "or leave it out"
            )
        return Job(label, tuple(own), place, *((1, False) if self.cluster else need_of(config)))

    def start(self, job: Job, slot: Slot) -> Running:
        """Starts or submits a job, which resumes the run in its folder if there is one."""
        check_link(self.logs / LATEST_SWEEP)
        point_latest(self.folder, self.logs, LATEST_SWEEP)
        command, environment = self.command(job), self.slots.environment(slot)
        if self.cluster is None:
            return JobProcess(job, command, environment)
        submitted = self.cluster.submit(job, command, environment)
        self.index.add({"submitted": job.label, "id": submitted.handle.job_id})
        return submitted

    def is_alive(self, job: Job) -> bool:
        """Whether a process of another session works in the folder of a job, or a cluster will start one."""
        number = self.index.submitted.get(job.label)
        return is_alive(job.folder) or bool(self.cluster and number and self.cluster.is_alive(number))

    def command(self, job: Job) -> list[str]:
        """The command of a job: this command as a single run."""
        from hydra._internal.utils import get_args_parser

        given = vars(get_args_parser().parse_args(sys.argv[1:]))
        flags = [f"--{name.replace('_', '-')}={given[name]}" for name in CONFIG_FLAGS if given[name]]
        of_hydra = list(self.config.hydra.overrides.hydra)
        of_jobs = [word for word in of_hydra if not override_key(word).startswith(OF_THE_MULTIRUN)]
        place = override("hydra.run.dir", job.folder)
        return [sys.executable, sys.argv[0], *flags, *job.words, *of_jobs, place, "resume=auto"]

    def plan(self, overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Plans each job in this process, with Hydra's own launcher."""
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher

        launcher = BasicLauncher()
        launcher.setup(hydra_context=self.context, task_function=self.task, config=self.config)
        return launcher.launch(overrides, 0)

    def end(self, jobs: Sequence[Job], outcomes: dict[str, Outcome]) -> None:
        """Prints results, failures and the next commands."""
        done = sorted(job.folder for job in jobs if is_done(job.folder))
        failed = {label: o.reason for label, o in outcomes.items() if o.state == status.FAILED}
        lines = [*(ending.results(done) if done else []), *ending.failures(failed)]
        if len(done) < len(jobs):
            lines.append(
                f"resume  {ending.same_command(sys.argv[0], redact_words(sys.argv[1:]), self.folder)}"
            )
        self.view.say(None, "\n" + "\n".join(lines))


class Returned(JobReturn):
    """The result of a job for a sweeper. Hydra's own class prints the overrides of a failed job, with secrets."""

    @property  # type: ignore[misc]  # Hydra's has a setter, which is not needed here
    def return_value(self) -> Any:
        """The best value of the monitored metric; raises if the job failed."""
        if self.status != JobStatus.COMPLETED:
            raise self._return_value
        return self._return_value


def returned(job: Job, outcome: Outcome | None, error: RunError) -> JobReturn:
    """The result of a job, for Hydra."""
    done = outcome is not None and outcome.state == status.DONE
    return Returned(
        overrides=redact_words(job.words),
        working_dir=str(job.folder),
        status=JobStatus.COMPLETED if done else JobStatus.FAILED,
        _return_value=best_of(job.folder) if done else error,
    )


def best_of(folder: Path) -> float | None:
    """The best value of the monitored metric of a finished job."""
    best = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["best"]
    return best["value"] if best else None
