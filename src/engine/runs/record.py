"""What a run leaves beside checkpoints and curves: config.yaml, status.json as it stands, metrics.json at its end."""

import json
import logging
import shlex
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from src.engine.runs import report
from src.engine.runs.build import load_checkpoint
from src.engine.runs.checkpoint_io import AtomicCheckpointIO
from src.engine.runs.origin import compare_origins, describe_origin, environment
from src.engine.runs.status import add_to_status, list_checkpoints, read_status, write_status
from src.engine.settings.trust import plain_config

log = logging.getLogger(__name__)


class Record(Callback):
    """The record of a training, kept current. Versions and commit are those of its start.

    Args:
        cfg: The run's config.
        trainer: Its trainer, before the training.
    """

    def __init__(self, cfg: DictConfig, trainer: pl.Trainer) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.metrics: dict[str, float] = {}
        self.best: dict[str, Any] = {"checkpoint": None, "score": None, "monitor": None}
        self._folder = Path(cfg.output_dir)
        self._start = time.perf_counter()
        self._environment = environment()
        if trainer.is_global_zero:
            self._begin()

    def _begin(self) -> None:
        """Write what is known, and see to it that each checkpoint is noted when it is there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(plain_config(self.cfg), self._folder / "config.yaml")
        before = read_status(self._folder)
        origin = describe_origin(self._folder, self.trainer.strategy.root_device)
        changed = compare_origins(before, origin) if list_checkpoints(self._folder) and self.cfg.ckpt_path else ""
        if changed:
            log.warning(f"perhaps not an exact continuation: {changed}")
        origin |= {
            "train": bool(self.cfg.train),
            "debug": bool(before.get("debug") or self.trainer.fast_dev_run),  # type: ignore[attr-defined]
            "resumed_with": [*before.get("resumed_with", []), *([changed] if changed else [])],
        }
        write_status(self._folder, "running", origin)
        self.trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        if isinstance(io := self.trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            io.on_saved = self._note

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which data they are: only now is it known."""
        add_to_status(self._folder, {"data": describe_data(getattr(trainer, "datamodule", None))})

    def _note(self, path: Path | None = None) -> None:
        """Note which checkpoints there are, a new one among them, and which is the one to use."""
        saved = [self._relative(path)] if path else []
        before = dict.fromkeys(map(self._relative, list_checkpoints(self._folder)))
        names = [*(name for name in before if name not in saved), *saved]
        self.best = self._find_best(names)
        add_to_status(self._folder, {"checkpoints": names, "best": self.best})

    def _find_best(self, names: list[str]) -> dict[str, Any]:
        """What the run's ModelCheckpoint says is best, by the run's monitor if there are several; else the last."""
        callbacks = self.trainer.checkpoint_callbacks
        judges = [each for each in callbacks if isinstance(each, ModelCheckpoint) and each.best_model_path]
        for each in sorted(judges, key=lambda each: each.monitor != self.cfg.get("monitor")):
            path = Path(each.best_model_path)
            # Where the run has begun from another one's checkpoint, that one's may be remembered.
            if path.is_file() and each.dirpath and path.is_relative_to(each.dirpath):
                score = None if each.monitor is None or each.best_model_score is None else float(each.best_model_score)
                return {"checkpoint": self._relative(path), "score": score, "monitor": each.monitor, "mode": each.mode}
        return {"checkpoint": names[-1] if names else None, "score": None, "monitor": None, "mode": None}

    def _relative(self, path: Path) -> str:
        path, folder = path.resolve(), self._folder.resolve()
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    def add_training(self) -> str | None:
        """Note the last metrics and the checkpoint to use; of a run that had trained to its end before, those of then.

        Returns:
            The checkpoint's path; None without one.
        """
        last: Mapping[str, Any] = self.trainer.callback_metrics
        if not last and self.cfg.ckpt_path:
            last = load_checkpoint(self.cfg.ckpt_path).get("metrics", {})
        self.metrics = {name: float(value) for name, value in last.items()}
        if self.trainer.is_global_zero:
            self._note()
        self.best = self.trainer.strategy.broadcast(self.best)
        return str(self._folder / self.best["checkpoint"]) if self.best["checkpoint"] else None

    def write(self, tested: list[Mapping[str, float]]) -> dict[str, float]:
        """Write metrics.json, and that the run has finished.

        Args:
            tested: What ``trainer.test`` returned, an entry a loader; empty without a test.

        Returns:
            All metrics by name.
        """
        for metrics in tested:
            self.metrics |= metrics
        monitor = self.cfg.get("monitor")
        # Measured by something else than the sweep's monitor, the checkpoint has no score that could be compared.
        score = self.best["score"] if monitor is not None and self.best["monitor"] == monitor else None
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        rates = [rate for callback in callbacks for rate in getattr(callback, "rates", [])]
        record = {
            "metrics": self.metrics,
            # Of those of the training, the epoch and step of each: not all come with every epoch.
            "logged": {name: at for callback in callbacks for name, at in getattr(callback, "logged", {}).items()},
            "best": self.best | {"score": self.metrics.get(monitor) if score is None else score},
            "pruned": any(getattr(callback, "pruned", False) for callback in callbacks),
            "data": describe_data(getattr(self.trainer, "datamodule", None)),
            "seed": self.cfg.seed,
            "seconds": time.perf_counter() - self._start,
            "images_per_second": statistics.median(rates) if rates else None,
        }
        if self.trainer.is_global_zero:
            report.write_json(self._folder / "metrics.json", record | self._environment)
            write_status(self._folder, "finished")
        return self.metrics


def describe_data(datamodule: pl.LightningDataModule | None) -> dict[str, Any]:
    """What a data module's ``state_dict`` says of its data in plain values; where its loader stands is left out."""
    state = datamodule.state_dict() if datamodule else {}
    return {key: value for key, value in state.items() if key != "loader" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        return bool(json.dumps(value))
    return False


def show(cfg: DictConfig) -> None:
    """Print what came of a run that has finished, and what to try next."""
    folder = Path(cfg.output_dir)
    record = json.loads((folder / "metrics.json").read_text())
    rate, best = record["images_per_second"], record["best"]["checkpoint"]
    report.print_table(
        " and ".join(verb for verb, done in {"trained": cfg.train, "tested": cfg.test}.items() if done),
        {k: v for k, v in sorted(record["metrics"].items()) if k == cfg.monitor or not k.startswith(("train", "lr-"))}
        | ({"data": report.describe_data(record["data"])} if "num_images" in record["data"] else {})
        | {"time": f"{record['seconds']:.1f} s"}
        | ({"samples/s": f"{rate:.0f} (median epoch)"} if rate else {})
        | {"best" if record["best"]["monitor"] else "last": report.shown(folder / best) if best else "no checkpoint"},
    )
    logs = shlex.quote(report.shown(f"{cfg.root_dir}/logs"))
    is_testable = cfg.test and best and not read_status(folder)["debug"]
    sweep = {"python -m src.train -m optimizer.lr=0.001,0.003,0.01": "try three learning rates"}
    report.print_next(
        ({"python -m src.test": "test it once more, in detail"} if is_testable else {})
        | {f"python -m tensorboard.main --logdir {logs}": "the curves of all runs"}
        | (sweep if OmegaConf.select(cfg, "optimizer.lr") else {})
    )
