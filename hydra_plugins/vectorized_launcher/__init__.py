"""``hydra/launcher=vectorized``: the jobs of a sweep side by side in one process, their nets computed as one."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from hydra.core.utils import JobReturn, configure_log, run_job
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

COMPILE = "src.callbacks.compile.Compile"


class VectorizedLauncher(Launcher):
    """Trains jobs in lockstep that share net, data and trainer; they may differ in all else.

    Each job does what it does alone, in its own folder: logs, validates, saves, stops early, fails. What is shared is
    the pass through the net, forward and backward: all members' weights as one tensor (torch.func). Jobs that differ in
    the net (but for its dropout rates), the data (but for their order) or the trainer train group by group.

    Args:
        max_members: How many jobs train at once, 1 or more.
    """

    def __init__(self, max_members: int) -> None:
        self.max_members = max_members

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what ``launch`` needs.

        Raises:
            ConfigError: If there cannot be so many members; here, since Hydra would wrap what ``__init__`` raises.
        """
        from src.config import ConfigError

        if not isinstance(self.max_members, int) or isinstance(self.max_members, bool) or self.max_members < 1:
            raise ConfigError(f"hydra.launcher.max_members={self.max_members}: expected a whole number of 1 or more")
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Iterable[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run jobs, group by group.

        Args:
            job_overrides: The overrides of each job.
            initial_job_idx: The first one's number.

        Returns:
            Completed or failed, in the order of the groups.

        Raises:
            ConfigError: If the nets cannot be computed as one.
        """
        from src.command import load_libraries
        from src.config import ConfigError

        load_libraries()
        from src.sweeps.stack import StackError
        from src.sweeps.vectorized import Ensemble

        groups: dict[str, list[DictConfig]] = {}
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            job = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(job):
                job.hydra.job.id = job.hydra.job.num = number
            precision = job.accelerator.precision
            if precision != "32-true":
                raise ConfigError(
                    f"accelerator.precision={precision}: hydra/launcher=vectorized computes in 32 bits; set "
                    "accelerator.precision=32-true, or hydra/launcher=basic"
                )
            if compiles := [
                name for name, node in (job.get("callbacks") or {}).items() if node and node._target_ == COMPILE
            ]:
                raise ConfigError(
                    f"callbacks.{compiles[0]}: hydra/launcher=vectorized computes all nets as one, uncompiled; set "
                    f"callbacks.{compiles[0]}=null, or hydra/launcher=basic"
                )
            groups.setdefault(get_shared(job), []).append(job)
        returns: list[JobReturn] = []
        for group in groups.values():
            jobs = iter(group)
            while members := list(islice(jobs, self.max_members)):
                ensemble = Ensemble([partial(self._run, job) for job in members])
                try:
                    ensemble.run()
                except StackError as error:
                    raise ConfigError(
                        f"hydra/launcher=vectorized: {error}; run the same command with hydra/launcher=basic"
                    ) from error
                finally:
                    configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
                for member in ensemble.members:
                    if member.error:
                        raise member.error
                    returns.append(member.result)
        return returns

    def _run(self, job: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def get_shared(job: DictConfig) -> str:
    """What jobs must have in common to train in lockstep."""
    config: Any = OmegaConf.to_container(OmegaConf.masked_copy(job, ["model", "data", "trainer", "accelerator"]))
    config["model"].pop("loss", None)
    config["data"].pop("seed", None)
    return json.dumps(_without_dropout(config))


def _without_dropout(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_dropout(value) for key, value in node.items() if "dropout" not in str(key)}
    return node
