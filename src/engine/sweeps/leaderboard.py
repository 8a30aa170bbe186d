"""Which job of a sweep is best: as a table, in sweep.csv and sweep.md, in a figure and in TensorBoard."""

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from src.engine.runs import report
from src.engine.sweeps.folder import DONE, Job, count

REPEATED = re.compile(r"(.*\.)?((\w+_)?seed|fold)")  # keys that, swept, only repeat a setting: seed, data.fold
MAX_NUM = 1000  # a difference that needs more repetitions is none that matters


class Setting(NamedTuple):
    """The jobs that differ by their seed or fold only.

    Args:
        values: Their swept values, without these.
        jobs: The jobs.
        scores: The values of the monitored metric, of the finished jobs.
    """

    values: Mapping[str, Any]
    jobs: Sequence[Job]
    scores: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean score; NaN without a finished job."""
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation of the scores; NaN below two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan

    @property
    def name(self) -> str:
        """Its values, as they are typed."""
        return ",".join(f"{key}={_shown(value)}" for key, value in self.values.items())

    @property
    def tests(self) -> dict[str, list[float]]:
        """The tests' metrics by name, of the jobs that were tested."""
        names = sorted({name for job in self.jobs for name in job.tests})
        return {name: [job.tests[name] for job in self.jobs if name in job.tests] for name in names}


class Leaderboard:
    """A sweep's settings, best first.

    Args:
        jobs: The sweep's jobs.
        monitor: The metric that decides.
        mode: ``max`` or ``min``.
    """

    def __init__(self, jobs: Sequence[Job], monitor: str, mode: str) -> None:
        self.heading = f"best {monitor}"
        if any(job.status in DONE and not job.is_best for job in jobs):  # best and last do not compare
            self.heading = f"last {monitor}"
            jobs = [job._replace(score=job.metrics.get(monitor)) for job in jobs]
        self.jobs = jobs
        self.monitor = monitor
        self.keys = list(dict.fromkeys(key for job in jobs for key in job.values))
        self.repeated = list(filter(REPEATED.fullmatch, self.keys))
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            groups.setdefault(repr(_values_of(job)) if self.repeated else job.name, []).append(job)
        sign = -1 if mode == "max" else 1
        self.planned = [Setting(_values_of(group[0]), group, scores_of(group)) for group in groups.values()]
        # A setting of which a job failed ranks below those that are complete: one lucky run must not win.
        self.settings = sorted(
            self.planned, key=lambda setting: (-len(setting.scores), sign * setting.mean if setting.scores else 0.0)
        )
        self._sign = sign

    @property
    def winner(self) -> Setting | None:
        """The best setting; None as long as no job has finished."""
        return self.settings[0] if self.settings and self.settings[0].scores else None

    @property
    def best_job(self) -> Job | None:
        """The winner's best job."""
        finished = [job for job in self.winner.jobs if _counts(job)] if self.winner else []
        return min(finished, key=lambda job: self._sign * (job.score or 0.0), default=None)

    def rows(self) -> list[dict[str, Any]]:
        """A row a job, the best setting's first; what a job lacks is left out."""
        rows = []
        for rank, setting in enumerate(self.settings, 1):
            for job in sorted(setting.jobs, key=lambda job: (not _counts(job), self._sign * (job.score or 0.0))):
                row = {"rank": rank, "job": job.name, **job.values, "status": job.status, self.heading: job.score}
                row |= {**job.metrics, **{_test_name(name): value for name, value in job.tests.items()}}
                rows.append(row | {"seconds": job.seconds, "checkpoint": job.checkpoint, "error": job.error})
        return rows

    def to_csv(self) -> str:
        """The rows as comma-separated values, numbers in full."""
        rows = self.rows()
        file = io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    def to_markdown(self, title: str) -> str:
        """A table of the settings, one of the jobs' tests, and the errors."""
        header, *rows = self.table()
        lines = [
            f"# {title}",
            "",
            _markdown_row(header),
            _markdown_row(["---"] * len(header)),
            *map(_markdown_row, rows),
        ]
        lines += ["", *(f"- {line}" for line in self.summary())]
        return "\n".join(lines) + "\n"

    def table(self) -> list[list[str]]:
        """A header and a row a setting, as text."""
        keys = [key for key in self.keys if key not in self.repeated]
        tested = [setting.tests for setting in self.settings if setting.tests]
        tests = list(dict.fromkeys(name for found in tested for name in found)) if len(tested) > 1 else []
        header = ["rank", *keys, *(["n"] if self.repeated else []), self.heading, *map(_test_name, tests), "status"]
        rows = []
        for rank, setting in enumerate(self.settings, 1):
            pruned = [job.score for job in setting.jobs if job.status == "pruned" and job.score is not None]
            score = shown_mean(setting.scores or pruned)
            status = count(job.status for job in setting.jobs) if self.repeated else setting.jobs[0].status
            values = [_shown(setting.values.get(key, "")) for key in keys]
            number = [str(len(setting.scores))] if self.repeated else []
            found = [shown_mean(setting.tests.get(name, [])) for name in tests]
            rows.append([str(rank), *values, *number, score, *found, status])
        return [header, *rows]

    def summary(self, folder: str | Path = "") -> list[str]:
        """What came out: the best job, its checkpoint, its test, and what failed.

        Args:
            folder: The sweep's, where the checkpoint's path is to begin with it.
        """
        lines = [] if self.monitor else ["monitor=null: jobs are not ranked; name a metric that they log"]
        job = self.best_job
        if job and self.winner:
            lines.append(f"best: {job.name}, {self.monitor} {job.score:.4f}")
            top = min((each for each in self.settings if each.scores), key=lambda each: self._sign * each.mean)
            if self._sign * top.mean < self._sign * self.winner.mean:
                lines.append(
                    f"{top.name} has a better mean, {top.mean:.4f}, of fewer {self._units}, {len(top.scores)} "
                    f"beside {len(self.winner.scores)}: settings with more finished {self._units} win"
                )
            lines.append(f"checkpoint: {report.shown(Path(folder, job.checkpoint)) if job.checkpoint else 'none'}")
            for name, tests in self.winner.tests.items():
                lines.append(f"{_test_name(name)}: {shown_mean(tests)}" + (f" (n={len(tests)})" if tests[1:] else ""))
            lines += self._lead(self.winner)
        failed = [job for job in self.jobs if job.status == "failed"]
        return lines + [f"{job.status}: {job.name}: {job.error.partition(chr(10))[0]}" for job in failed]

    def show(self, folder: Path) -> None:
        """Print the table and the summary of the sweep in a folder."""
        header, *rows = self.table()
        table = Table(*map(escape, header), title=f"sweep {report.shown(folder)}", title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        console = report.make_console()
        console.print(table)
        for line in self.summary(folder):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

    @property
    def _units(self) -> str:
        """What repeats a setting, in the plural."""
        return f"{self.repeated[0].rpartition('.')[2]}s" if len(self.repeated) == 1 else "repetitions"

    def _lead(self, winner: Setting) -> list[str]:
        """Whether the winner is better than the next setting or only ahead: their difference, paired over the seeds."""
        runner_up = next((setting for setting in self.settings[1:] if setting.scores), None)
        if runner_up is None:
            return []
        ours, theirs = (
            {_pair(job): job.score for job in setting.jobs if _counts(job) and job.score is not None}
            for setting in (winner, runner_up)
        )
        differences = [self._sign * (theirs[pair] - ours[pair]) for pair in ours.keys() & theirs.keys()]
        if len(differences) < 2:
            return []
        num = len(differences)
        lead, std = statistics.fmean(differences), statistics.stdev(differences)
        margin = _margin(num, std)
        said = f"ahead of {runner_up.name} by {lead:.4f}, 95 % interval {lead - margin:.4f} to {lead + margin:.4f}"
        if lead > margin:
            return [f"{said}: better over {num} {self._units}"]
        more = next((n - num for n in range(num, MAX_NUM) if _margin(n, std) < lead), None)
        return [f"{said}: not told apart by {num} {self._units}" + (f"; some {more} more may tell" if more else "")]


def shown_mean(scores: Sequence[float]) -> str:
    """Mean and standard deviation, or the one score."""
    if not scores:
        return "-"
    std = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.4f}{std}"


def _values_of(job: Job) -> dict[str, Any]:
    """A job's swept values but for those that only repeat a setting."""
    return {key: value for key, value in job.values.items() if not REPEATED.fullmatch(key)}


def _pair(job: Job) -> tuple[Any, ...]:
    """What a job shares with those of other settings: its seed and fold."""
    return tuple(value for key, value in job.values.items() if REPEATED.fullmatch(key))


def _counts(job: Job) -> bool:
    return job.status == "finished" and job.score is not None and math.isfinite(job.score)


def scores_of(jobs: Iterable[Job]) -> list[float]:
    """The scores of the finished jobs."""
    return [job.score for job in jobs if _counts(job) and job.score is not None]


def _test_name(name: str) -> str:
    """A test's metric, told apart from the validation's of the same name."""
    return name if name.startswith("test") else f"test {name}"


def _margin(num: int, std: float) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t."""
    return float(stdtrit(num - 1, 0.975)) * std / math.sqrt(num)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
