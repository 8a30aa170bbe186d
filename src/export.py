"""Export a checkpoint: ``python -m src.export format=onnx|pt2|safetensors [ckpt_path=...] [output=...]``."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.engine.runs import report
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run_function
from src.engine.settings.check import require

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",), "pt2": ()}  # by format


def check_format(cfg: DictConfig) -> None:
    """Look for the packages that the format needs, before torch is imported and the run's folder is made."""
    require(f"format={cfg.format}", *PACKAGES[cfg.format], extra="export")


def export(cfg: DictConfig) -> dict[str, Any]:
    """Export as ``conf/export.yaml`` says, and show what came out.

    Returns:
        What ``export_module`` does.
    """
    from src.engine.runs.build import load_checkpoint, restore, restore_datamodule  # torch: a bad setting needs none
    from src.engine.runs.export import TOLERANCE, export_module

    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output = Path(cfg.output or Path(cfg.output_dir) / f"model.{cfg.format}")
    datamodule = restore_datamodule(path, **cfg.data)
    module = restore(path, datamodule)
    facts = {"config": load_checkpoint(path)["config"], "checkpoint": str(path)}
    result = export_module(module, datamodule, output, cfg.format, facts)
    OmegaConf.save(cfg, Path(cfg.output_dir) / "config.yaml", resolve=True)
    tensors = {f"{kind}: {name}": text for kind in ("inputs", "outputs") for name, text in result[kind].items()}
    measured = {
        "compared": f"{result['checked']:,} samples, outputs within {TOLERANCE:.0e}",
        "size": f"{result['bytes']:,} bytes",
        "latency": f"{result['milliseconds']:.3f} ms, one sample on one CPU thread",
    }
    paths = {"checkpoint": report.shown(path), "written to": report.shown(output)}
    report.print_table("exported", {**tensors, **result.get("accuracy", {}), **measured, **paths})
    return result


if __name__ == "__main__":
    run_function(export, "export", check=check_format)
