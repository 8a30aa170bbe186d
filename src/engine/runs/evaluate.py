"""Test a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.engine.runs.processes import prepare_trainer


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

    from src.engine.runs import build, report

    module = build.restore(path)
    datamodule = build.restore_datamodule(path, **overrides)
    tester = pl.Trainer(
        **trainer, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=output_dir,
    )  # fmt: skip
    prepare_trainer(tester)
    (metrics,) = tester.test(module, datamodule, verbose=False)
    confusion = module.confusion.tolist() if hasattr(module, "confusion") else None
    result = {
        "metrics": metrics,
        "class_accuracy": report.class_accuracies(confusion) if confusion else None,
        "confusion": confusion,
        "data": {key: value for key, value in datamodule.state_dict().items() if key != "loader"},
        "checkpoint": str(path),
        **report.environment(),
    }
    if tester.is_global_zero:
        output_dir.mkdir(parents=True, exist_ok=True)
        report.write_json(output_dir / "metrics.json", result)
    return result
