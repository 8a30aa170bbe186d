"""``python -m src.train -m sweep=optuna``: a search by Optuna, with pruning, that a second start continues."""

import re
from itertools import islice
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.engine.errors import ConfigError
from src.engine.sweeps.launcher import require_count
from src.engine.sweeps.sweep import running
from src.engine.sweeps.sweeper import JobSweeper


class OptunaSweeper(JobSweeper):
    """Asks a study for trials and tells it what came of their jobs.

    The search space is written in Hydra's syntax: ``interval(a, b)``, ``tag(log, interval(a, b))``,
    ``int(interval(a, b))``, ``range(a, b, step)``, ``choice(a, b)``.

    Args:
        n_jobs: Number of trials that run at once on Slurm, or that a launcher without slots of its own is given.
        n_trials: Number of finished trials, pruned ones among them, to come to; those of an earlier start count.
        study_name: The study's name in its storage; None: the name of the sweep's folder.
        storage: None: a journal file in the sweep's folder. Or a database's URL, for several sweeps to share.
        sampler: Config of an Optuna sampler.
        pruner: Config of an Optuna pruner; None: no pruning.
        params: The search space; the command line overrides it.
        keep: Whose checkpoints stay: ``all``; ``winner``; ``last``, the winner's and the others' last.ckpt.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, study_name: str | None, storage: str | None, sampler: Any, pruner: Any,
        params: Any, keep: str = "all",
    ) -> None:  # fmt: skip
        super().__init__(params)
        require_count("n_trials", n_trials)  # Hydra says whose
        require_count("n_jobs", n_jobs)
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.study = {"name": study_name, "storage": storage, "sampler": sampler, "pruner": pruner}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher of ``hydra/launcher``.

        Raises:
            ConfigError: If a password stands in the config or on the command line, or the launcher is not to wait.
        """
        written = config.hydra.sweeper._get_node("storage")._value()
        if re.search(r"://[^/@:]*:(?!\$\{)[^@]+@|[?&]password=(?!\$\{)", str(written)):
            raise ConfigError(
                "hydra.sweeper.storage: a password in the open; put the URL into the environment, as STUDY_URL say, "
                "and set hydra.sweeper.storage='${oc.env:STUDY_URL}'"
            )
        if config.hydra.launcher.get("wait") is False:
            raise ConfigError("hydra.launcher.wait=false: a search needs its jobs' ends to choose more; leave it out")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until enough have finished, and test the best.

        Raises:
            SweepError: If trials have failed, or the sweep cannot go on.
        """
        from src.engine.sweeps import study  # here: only a search needs Optuna

        overrides, written = self.parse(arguments)
        space = study.make_space({key: overrides[key] for key in written})
        fixed = [str(override.input_line) for key, override in overrides.items() if key not in written]
        with running(self.config, written) as folder:
            opened = study.open_study(folder.path, mode=self.config.mode, **self.study)
            search = study.Search(opened, folder, space, fixed, self.n_trials)
            number = 0
            with search.alive():
                while search.wants_more():
                    jobs: Any = search.jobs()
                    if not hasattr(self.launcher, "n_jobs"):  # it takes a list, not one job after the other
                        jobs = list(islice(jobs, self.n_jobs))
                    number += len(self.launcher.launch(jobs, initial_job_idx=number))
                    search.tell(all_ended=True)
            study.draw_study(opened, folder.path)
