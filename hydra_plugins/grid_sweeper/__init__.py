"""``python -m src.train -m key=a,b,c``: all combinations, in a folder that a second start completes."""

from collections.abc import Iterable
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from src.engine.errors import ConfigError, SweepError
from src.engine.sweeps.folder import job_name
from src.engine.sweeps.sweep import running
from src.engine.sweeps.sweeper import JobSweeper


class GridSweeper(JobSweeper):
    """Runs all combinations, with readable job names, a leaderboard, and jobs that a second start need not repeat.

    Args:
        params: Swept keys and their values; the command line overrides them.
        max_batch_size: How many jobs the launcher is given at once; None: all.
        keep: Whose checkpoints stay: ``all``; ``winner``; ``last``, the winner's and the others' last.ckpt.
    """

    def __init__(self, max_batch_size: int | None, params: Any = None, keep: str = "all") -> None:
        super().__init__(params)
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs that have not finished, and test the winner.

        Raises:
            ConfigError: If a key runs over an interval.
            SweepError: If jobs have failed, or the sweep cannot go on.
        """
        overrides, space = self.parse(arguments)
        jobs: dict[str, list[str]] = {}
        values = {}
        taken: dict[str, str] = {}
        for job in map(list, product(*map(_spell, overrides.values()))):
            swept = [override for key, override in zip(overrides, job, strict=True) if key in space]
            name = job_name(swept, taken)
            taken.setdefault(name.lower(), name)
            jobs[name] = job
            values[name] = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(swept)}
        if not jobs:
            keys = ", ".join(f"{key}={written}" for key, written in space.items())
            raise SweepError(f"{keys}: nothing to run; a glob matches the options of its group in conf/")
        self.validate_batch_is_legal(self._samples(list(jobs.values()), space))

        with running(self.config, space) as folder:
            folder.add(values)
            todo = [[*job, *added] for name, job in jobs.items() if (added := folder.prepare(name)) is not None]
            size = self.max_batch_size or max(len(todo), 1)
            for start in range(0, len(todo), size):
                self.launcher.launch(todo[start : start + size], initial_job_idx=start)

    def _samples(self, jobs: list[list[str]], keys: Iterable[str]) -> list[list[str]]:
        """Jobs that together have every option of every swept group: if these compose, all do, and soon."""
        loader = self.hydra_context.config_loader
        groups = tuple(f"{key}=" for key in keys if loader.get_group_options(key.lstrip("+~").split("@")[0]))
        samples = []
        for job in jobs:
            changed = [override for override, first in zip(job, jobs[0], strict=True) if override != first]
            if len(changed) <= 1 and all(override.startswith(groups) for override in changed):
                samples.append(job)
        return samples


def _spell(override: Override) -> list[str]:
    """The overrides that a grid makes of one."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: a grid needs values, as choice(a,b); sweep=optuna takes intervals")
    return [f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()]
