"""What a run leaves beside its checkpoints and curves: config.yaml at its start, metrics.json at its end."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from src.engine.runs import report
from src.engine.runs.build import load_checkpoint
from src.engine.settings.trust import plain_config

PLAIN = (bool, int, float, str)


class Record:
    """The record of a training. Versions and commit are those of its start.

    Args:
        cfg: The run's config.
        trainer: Its trainer, before the training.
    """

    def __init__(self, cfg: DictConfig, trainer: pl.Trainer) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.metrics: dict[str, float] = {}
        self.best_checkpoint: str | None = None
        self._folder = Path(cfg.output_dir)
        self._start = time.perf_counter()
        self._environment = report.environment()
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(plain_config(cfg), self._folder / "config.yaml")

    def add_training(self) -> None:
        """Note the last metrics and the best checkpoint; of a run that had trained to its end before, those of then."""
        last: Mapping[str, Any] = self.trainer.callback_metrics
        if not last and self.cfg.ckpt_path:
            last = load_checkpoint(self.cfg.ckpt_path).get("metrics", {})
        self.metrics = {name: float(value) for name, value in last.items()}
        self.best_checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or None

    def write(self, tested: list[Mapping[str, float]]) -> dict[str, float]:
        """Write metrics.json.

        Args:
            tested: What ``trainer.test`` returned, an entry a loader; empty without a test.

        Returns:
            All metrics by name.
        """
        for metrics in tested:
            self.metrics |= metrics
        monitor = self.cfg.get("monitor")
        checkpoint = self.trainer.checkpoint_callback
        # Measured by something else than the sweep's monitor, the checkpoint has no score that could be compared.
        is_same = monitor is not None and getattr(checkpoint, "monitor", None) == monitor
        score = getattr(checkpoint, "best_model_score", None) if is_same else None
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        rates = [rate for callback in callbacks for rate in getattr(callback, "rates", [])]
        record = {
            "metrics": self.metrics,
            # Of those of the training, the epoch and step of each: not all come with every epoch.
            "logged": {name: at for callback in callbacks for name, at in getattr(callback, "logged", {}).items()},
            "best": {
                "score": self.metrics.get(monitor) if score is None else float(score),
                "checkpoint": self.best_checkpoint,
                "monitor": getattr(checkpoint, "monitor", None),
            },
            "pruned": any(getattr(callback, "pruned", False) for callback in callbacks),
            "data": describe_data(getattr(self.trainer, "datamodule", None)),
            "seed": self.cfg.seed,
            "seconds": time.perf_counter() - self._start,
            "images_per_second": statistics.median(rates) if rates else None,
        }
        if self.trainer.is_global_zero:
            report.write_json(self._folder / "metrics.json", record | self._environment)
        return self.metrics


def describe_data(datamodule: pl.LightningDataModule | None) -> dict[str, Any]:
    """What a data module's ``state_dict`` says of its data in plain values; where its loader stands is left out."""
    state = datamodule.state_dict() if datamodule else {}
    return {key: value for key, value in state.items() if key != "loader" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in PLAIN
