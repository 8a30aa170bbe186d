"""Test a checkpoint."""

from collections.abc import Mapping
from os.path import relpath
from pathlib import Path
from typing import Any

from src.engine.errors import UntestedError
from src.engine.runs import report
from src.engine.runs.origin import environment


def test_checkpoint(path: Path, output_dir: Path, trainer: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Test a checkpoint on the test split of the data that it was trained on.

    Args:
        path: A checkpoint.
        output_dir: Where ``metrics.json`` is written.
        trainer: Arguments of the Trainer: ``accelerator``, ``devices`` and so on.
        overrides: Arguments of the data module that override the run's; None keeps the run's.

    Returns:
        What ``metrics.json`` holds: ``metrics`` by name, of all test loaders; ``confusion`` (rows: true classes) and
        ``class_accuracy`` (a list), each None unless the module has a tensor ``confusion`` after the test;
        ``classes``, the data module's, their names or None; ``data``, the environment, and ``checkpoint``, by its path
        from ``output_dir`` if that lies in its run's folder.

    Raises:
        UntestedError: If the module has no ``test_step``, or its data no ``test_dataloader``.
    """
    import pytorch_lightning as pl  # here: a sweep's command imports this before its config is known to be good

    from src.engine.runs import build
    from src.engine.runs.processes import prepare_trainer
    from src.engine.runs.record import describe_data
    from src.engine.runs.rehearsal import missing_for_test
    from src.engine.runs.trainer import set_matmul_precision

    datamodule = build.restore_datamodule(path, **overrides)
    module = build.restore(path, datamodule)
    if missing := missing_for_test(module, datamodule):
        raise UntestedError(f"ckpt_path={path}: {missing}: there is nothing to test")
    tester = pl.Trainer(
        **trainer, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=output_dir,
    )  # fmt: skip
    prepare_trainer(tester)
    set_matmul_precision(build.load_checkpoint(path)["config"], tester.strategy.root_device)
    tested = tester.test(module, datamodule, verbose=False)
    confusion: Any = getattr(module, "confusion", None)
    matrix = None if confusion is None else confusion.tolist()
    names = getattr(datamodule, "classes", None)
    is_named = matrix is not None and isinstance(names, list | tuple) and len(names) == len(matrix)
    run = output_dir.parent  # of a sweep's job
    is_in_run = (run / "status.json").is_file() and path.is_relative_to(run)
    result = {
        "metrics": {name: value for metrics in tested for name, value in metrics.items()},
        "class_accuracy": report.class_accuracies(matrix) if matrix else None,
        "confusion": matrix,
        "classes": list(map(str, names or ())) if is_named else None,
        "data": describe_data(datamodule),
        "checkpoint": relpath(path, output_dir) if is_in_run else str(path),
        **environment(),
    }
    if tester.is_global_zero:
        output_dir.mkdir(parents=True, exist_ok=True)
        report.write_json(output_dir / "metrics.json", result)
    return result
