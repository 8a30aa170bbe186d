"""Experiment trackers: each run, or job of a sweep, is one run there, which ends with it and resumes with it."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import loggers
from torch.utils.tensorboard.summary import hparams

from src.engine.errors import ConfigError
from src.engine.runs.command import in_sweep
from src.engine.runs.trainer import put_before_now
from src.engine.settings.check import require

HPARAMS = ("data", "model", "optimizer", "scheduler", "trainer")  # groups whose plain values are a run's row


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Lightning's logger, without a chart of the epochs' numbers, and with a row in the HPARAMS tab.

    The row has the plain settings of the run; TensorBoard puts first those in which runs differ. A job of a sweep gets
    its row from the sweep, by what that varies. No summary of the experiment is written: TensorBoard reads only one.
    """

    _end: Any = None  # the summary that says that all went well

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, but for the number of the epoch."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Begin the row."""
        super().log_hyperparams(params, metrics, step)
        if HydraConfig.initialized() and in_sweep():
            return
        groups = {name: group for name in HPARAMS if isinstance(group := params.get(name), Mapping)}
        own = {f"{name}.{key}": v for name, group in groups.items() for key, v in group.items()}
        plain = {key: v for key, v in {"seed": params.get("seed"), **own}.items() if isinstance(v, int | float | str)}
        _, start, self._end = hparams(plain, {})
        if self.experiment.file_writer:  # None once it was closed: a second training has no row of its own
            self.experiment.file_writer.add_summary(start)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the row; Lightning calls this after the training, after the test and on errors."""
        if status == "success" and self._end is not None and self.experiment.file_writer:
            self.experiment.file_writer.add_summary(self._end)
            self._end = None
        super().finalize(status)
        put_before_now(Path(self.log_dir))  # what follows, a test's metrics say, comes into a file of its own


class WandbLogger(loggers.WandbLogger):
    """Lightning's logger for Weights & Biases, whose run is called as the folder, and its group as the folder above.

    A run that resumes in its folder keeps its id. Steps that W&B has already are not logged twice: it ignores them.

    Args:
        save_dir: The run's folder; W&B writes below ``wandb`` in it.
        has_test: Whether a test follows the training, after which the run then ends.
        kwargs: Arguments of Lightning's logger and of ``wandb.init``, as ``name``, ``group``, ``tags`` and ``notes``;
            those that are None are left out.
    """

    def __init__(self, save_dir: str, has_test: bool = False, **kwargs: Any) -> None:
        folder = Path(save_dir)
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # else in the home directory
        before = sorted(folder.glob("wandb/*run-*-*"))  # offline-run-20260131_235959-<id>
        version = before[-1].name.split("run-", 1)[1].split("-", 1)[1] if before else None
        own = {"version": version, "name": folder.name, "group": folder.parent.name, "reinit": "create_new"}
        super().__init__(save_dir=save_dir, **own | _given(kwargs))
        del self._wandb_init["anonymous"]  # W&B warns of it
        self._has_test = has_test

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun or resumed.

        Raises:
            ConfigError: If W&B refuses, or is out of reach.
        """
        import wandb

        try:
            return super().experiment
        except wandb.Error as error:
            raise ConfigError(f"logger.wandb: {error} Or set logger.wandb.offline=true.") from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under W&B's own step, too: so it knows which ones it has."""
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run; Lightning calls this after the training, after the test and on errors."""
        super().finalize(status)
        if self._experiment is not None and not (status == "success" and self._has_test):
            self._experiment.finish(exit_code=int(status != "success"))
        self._has_test = False


class MLFlowLogger(loggers.MLFlowLogger):
    """Lightning's logger for MLflow, whose run is called as the folder; the tag ``group`` is the folder above.

    A run that resumes in its folder keeps its id, and its parameters, which MLflow does not let anybody change. Steps
    that MLflow has already are not logged twice.

    Args:
        save_dir: The run's folder, in which ``mlflow_run_id`` is kept.
        tracking_uri: A database or server; the folder of an SQLite file is made.
        tags: Names and values, or words, which become the tag ``tags``.
        notes: The run's description.
        kwargs: Arguments of Lightning's logger, as ``run_name``; those that are None are left out.
    """

    def __init__(
        self,
        save_dir: str,
        tracking_uri: str,
        tags: Mapping[str, Any] | Sequence[str] | None = None,
        notes: str | None = None,
        **kwargs: Any,
    ) -> None:
        require("MLFlowLogger", "mlflow", extra="trackers")  # ahead of the lock below, which would be left behind
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._folder = Path(save_dir)
        self._id_path = self._folder / "mlflow_run_id"
        self._last_steps: dict[str, int] = {}  # of the metrics that the run had when it resumed
        own = dict(tags) if isinstance(tags, Mapping) else {"tags": ", ".join(tags)} if tags else {}
        described = {"mlflow.note.content": notes} if notes else {}  # the name that MLflow's page reads
        given = {"group": self._folder.parent.name, "output_dir": str(self._folder.resolve()), **own, **described}
        self._lock = FileLock(self._folder / ".mlflow.lock")
        if tracking_uri.startswith("sqlite:///"):  # several jobs may be about to make its tables
            path = Path(tracking_uri.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{path}.lock")
        run_id = self._id_path.read_text() if self._id_path.exists() else None
        named = {"run_name": self._folder.name} | _given(kwargs)
        with self._lock:
            super().__init__(tracking_uri=tracking_uri, run_id=run_id, tags=given, **named)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client, with the run begun or resumed."""
        if self._initialized:
            return super().experiment
        with self._lock:
            client = super().experiment
        if self._id_path.exists():
            client.update_run(self._run_id, status="RUNNING")
            for name in client.get_run(self._run_id).data.metrics:
                history = client.get_metric_history(self._run_id, name)
                self._last_steps[name] = max(metric.step for metric in history)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._id_path.write_text(str(self._run_id))
        return client

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the parameters, once."""
        if not self.experiment.get_run(self.run_id).data.params:
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what the run does not have yet."""
        super().log_metrics({k: v for k, v in metrics.items() if (step or 0) > self._last_steps.get(k, -1)}, step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Log pictures, (H, W, 3) of bytes each, beside the metrics of that name and step; as of W&B's logger."""
        client = self.experiment
        for image in images if (step or 0) > max(self._last_steps.values(), default=-1) else ():
            client.log_image(self.run_id, image, key=key, step=step, synchronous=True)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run as finished, failed, or killed by a signal."""
        is_stopped = isinstance(sys.exc_info()[1], SystemExit | KeyboardInterrupt)
        super().finalize("KILLED" if is_stopped else status)
