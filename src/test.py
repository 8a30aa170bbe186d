"""Test a checkpoint: ``python -m src.test [ckpt_path=...]``."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.engine.runs import report
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run_function
from src.engine.runs.evaluate import test_checkpoint
from src.engine.runs.processes import get_name


def test(cfg: DictConfig) -> dict[str, Any]:
    """Test a checkpoint as ``conf/test.yaml`` says, and show whatever it has logged.

    The confusion matrix and the accuracy of each class are shown of a module that has them after a test, as its
    attribute ``confusion``: a tensor (num_classes, num_classes), a row a true class.

    Returns:
        What ``test_checkpoint`` does.
    """
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output_dir = Path(cfg.output_dir)
    result = test_checkpoint(path, output_dir, cfg.accelerator, **cfg.data)
    if get_name():  # the process of another rank
        return result
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    if result.get("confusion"):
        report.print_confusion(result["confusion"], result["classes"])
    data = {"data": report.describe_data(result["data"])} if "source" in result["data"] else {}
    paths = {"checkpoint": report.shown(path), "written to": report.shown(output_dir / "metrics.json")}
    report.print_table("tested", {**data, **result["metrics"], **paths})
    return result


if __name__ == "__main__":
    run_function(test, "test")
