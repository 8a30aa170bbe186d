"""Test a checkpoint: ``python -m src.test [ckpt_path=...]``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from src.command import load_libraries, run, short_errors
from src.config import newest_checkpoint
from src.processes import get_name, prepare_trainer


def test_checkpoint(path: Path, output_dir: Path, trainer: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Test a checkpoint on the test split of the data that it was trained on.

    Args:
        path: A checkpoint.
        output_dir: Where ``metrics.json`` is to be written.
        trainer: Arguments of the Trainer: ``accelerator``, ``devices`` and so on.
        overrides: Arguments of the data module that go before the run's; None keeps the run's.

    Returns:
        What ``metrics.json`` holds: ``metrics`` by name, ``class_accuracy`` (a list), ``confusion`` (rows: true
        classes), ``data``, ``checkpoint`` and the environment.
    """
    import pytorch_lightning as pl

    from src import build, report

    module = build.restore(path)
    datamodule = build.restore_datamodule(path, **overrides)
    tester = pl.Trainer(
        **trainer, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=output_dir,
    )  # fmt: skip
    prepare_trainer(tester)
    (metrics,) = tester.test(module, datamodule, verbose=False)
    confusion = module.confusion.tolist()
    result = {
        "metrics": metrics,
        "class_accuracy": report.class_accuracies(confusion),
        "confusion": confusion,
        "data": {key: value for key, value in datamodule.state_dict().items() if key != "loader"},
        "checkpoint": str(path),
        **report.environment(),
    }
    if tester.is_global_zero:
        output_dir.mkdir(parents=True, exist_ok=True)
        report.write_json(output_dir / "metrics.json", result)
    return result


def test(cfg: DictConfig) -> dict[str, Any]:
    """Test a checkpoint as ``conf/test.yaml`` says, and show what came out.

    Returns:
        What ``test_checkpoint`` does.
    """
    from src import report

    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output_dir = Path(cfg.output_dir)
    result = test_checkpoint(path, output_dir, cfg.accelerator, root=cfg.data.root, eval_batch_size=cfg.data.batch_size)
    if get_name():
        return result
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    report.print_confusion(result["confusion"])
    report.print_table(
        "tested",
        {"checkpoint": report.shown(path), "data": report.describe_data(result["data"])}
        | result["metrics"]
        | {"written to": report.shown(output_dir / "metrics.json")},
    )
    return result


@hydra.main(version_base="1.3", config_path="../conf", config_name="test")
def main(cfg: DictConfig) -> None:
    """Test as the command line says."""
    with short_errors(cfg):
        load_libraries()
        test(cfg)


if __name__ == "__main__":
    run(main, "test")
