"""Train a model: ``python -m src.train [group=option] [key=value]``."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import CheckpointError
from src.engine.runs.command import continue_if_requeued, in_sweep, load_libraries, run, short_errors
from src.engine.runs.processes import get_name, is_requeued, prepare_trainer
from src.engine.runs.resume import check_difference
from src.engine.runs.status import describe_start, tracked

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, float]:
    """Train, and test with the best checkpoint; everything lands in ``cfg.output_dir``.

    Args:
        cfg: The config of ``conf/train.yaml``, composed.

    Returns:
        The last validation's metrics, and the test's where ``cfg.test``, by name.
    """
    import statistics
    import time

    import pytorch_lightning as pl

    from src.callbacks.speed import Speed
    from src.engine.runs import build, report

    start = time.perf_counter()
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(cfg.seed, verbose=False)
    checkpoint = build.load_checkpoint(cfg.ckpt_path) if cfg.ckpt_path else {}
    datamodule = build.build_datamodule(cfg)
    module = build.build_module(cfg)
    first_step = 0 if cfg.resume or is_requeued() else None  # without a checkpoint, too
    if checkpoint:
        if "loops" not in checkpoint:
            raise CheckpointError(
                f"ckpt_path={cfg.ckpt_path}: holds weights alone, nothing to go on from; choose a run's last.ckpt"
            )
        first_step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        check_difference(checkpoint["hyper_parameters"], dict(module.hparams))
        if not get_name():
            log.info(f"going on from {report.shown(cfg.ckpt_path)}, step {first_step}")
    trainer = build.build_trainer(cfg, first_step)
    prepare_trainer(trainer)
    if trainer.is_global_zero:
        OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)

    trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    last = trainer.callback_metrics or checkpoint.get("metrics", {})  # those of a run that had trained to its end
    metrics = {name: float(value) for name, value in last.items() if "/" in name}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if cfg.test:
        (tested,) = trainer.test(module, datamodule, ckpt_path=best or None, weights_only=True, verbose=False)
        metrics |= tested

    data = {key: value for key, value in datamodule.state_dict().items() if key != "loader"}
    # By another measure than the sweep's, the checkpoint has no score that could be compared.
    same = getattr(trainer.checkpoint_callback, "monitor", None) == cfg.monitor
    score = getattr(trainer.checkpoint_callback, "best_model_score", None) if same else None
    if trainer.is_global_zero:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        rates = [rate for callback in callbacks if isinstance(callback, Speed) for rate in callback.rates]
        record = {
            "metrics": metrics,
            "best": {"score": metrics.get(cfg.monitor) if score is None else float(score), "checkpoint": best or None},
            "pruned": any(getattr(callback, "pruned", False) for callback in callbacks),
            "data": data,
            "seed": cfg.seed,
            "seconds": time.perf_counter() - start,
            "images_per_second": statistics.median(rates) if rates else None,
        }
        report.write_json(output_dir / "metrics.json", record | report.environment())
    return metrics


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train as the command line says."""
    folder = nullcontext() if get_name() else tracked(Path(cfg.output_dir), describe_start(HydraConfig.get()))
    with folder, short_errors(cfg):
        continue_if_requeued(cfg)
        if in_sweep() and OmegaConf.select(cfg, "callbacks.summary"):
            cfg.callbacks.summary = None  # the same for each job
        load_libraries()
        train(cfg)
        if not get_name() and not in_sweep():
            _show(cfg)


def _show(cfg: DictConfig) -> None:
    from src.engine.runs import report

    record = json.loads((Path(cfg.output_dir) / "metrics.json").read_text())
    rate, best = record["images_per_second"], record["best"]["checkpoint"]
    report.print_table(
        "trained and tested" if cfg.test else "trained",
        {name: value for name, value in sorted(record["metrics"].items()) if name.startswith(("val/", "test/"))}
        | {"data": report.describe_data(record["data"]), "time": f"{record['seconds']:.1f} s"}
        | ({"images/s": f"{rate:.0f} (median epoch)"} if rate else {})
        | {"best": report.shown(best) if best else "no checkpoint was asked for"},
    )
    report.print_next(
        {
            "python -m src.test": "accuracy per digit, confusion matrix",
            "tensorboard --logdir logs": "the curves of all runs",
            "python -m src.train -m optimizer.lr=0.001,0.003,0.01": "try three learning rates",
        }
    )


if __name__ == "__main__":
    run(main, "train")
