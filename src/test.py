"""Test a checkpoint: ``python -m src.test [ckpt_path=...]``."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from src.command import run, short_errors
from src.config import newest_checkpoint


def test(cfg: DictConfig) -> dict[str, Any]:
    """Test a checkpoint on the test split of the data that it was trained on.

    Args:
        cfg: The config of ``conf/test.yaml``, composed.

    Returns:
        What ``metrics.json`` in ``cfg.output_dir`` holds: ``metrics`` by name, ``class_accuracy`` (a list),
        ``confusion`` (rows: true classes), ``data``, ``checkpoint`` and the environment.
    """
    import pytorch_lightning as pl

    from src import build, report

    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    module = build.restore(path)
    datamodule = build.restore_datamodule(path, root=cfg.data.root, eval_batch_size=cfg.data.batch_size)
    trainer = pl.Trainer(
        **cfg.accelerator, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=cfg.output_dir,
    )  # fmt: skip
    (metrics,) = trainer.test(module, datamodule, verbose=False)
    data = {key: value for key, value in datamodule.state_dict().items() if key != "loader"}
    result = {
        "metrics": metrics,
        "class_accuracy": report.class_accuracies(module.confusion),
        "confusion": module.confusion.tolist(),
        "data": data,
        "checkpoint": str(path),
        **report.environment(),
    }
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    report.write_json(output_dir / "metrics.json", result)
    report.print_confusion(module.confusion)
    report.print_table(
        "tested",
        {"checkpoint": report.shown(path), "data": report.describe_data(data)}
        | dict(metrics)
        | {"written to": report.shown(output_dir / "metrics.json")},
    )
    return result


@hydra.main(version_base="1.3", config_path="../conf", config_name="test")
def main(cfg: DictConfig) -> None:
    """Test as the command line says."""
    with short_errors(cfg):
        test(cfg)


if __name__ == "__main__":
    run(main, "test")
