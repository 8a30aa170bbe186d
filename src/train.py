"""Train a model: ``python -m src.train [group=option] [key=value]``."""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.engine.runs.command import continue_if_requeued, in_sweep, run, short_errors
from src.engine.runs.processes import get_name
from src.engine.runs.status import describe_start, read_status, tracked


def train(cfg: DictConfig) -> dict[str, float]:
    """Train, and test with the best checkpoint; everything lands in ``cfg.output_dir``.

    Args:
        cfg: The config of ``conf/train.yaml``, composed.

    Returns:
        The last metrics of training and validation, and the test's where ``cfg.test``, by name.
    """
    from src.engine.runs.build import build_datamodule, build_module, seed_everything
    from src.engine.runs.record import Record
    from src.engine.runs.rehearsal import is_tested
    from src.engine.runs.trainer import build_trainer

    seed_everything(cfg)
    datamodule = build_datamodule(cfg)
    module = build_module(cfg)
    cfg.test = is_tested(cfg.test, module, is_fresh=not (cfg.train or cfg.ckpt_path))
    trainer = build_trainer(cfg)
    record = Record(cfg, trainer)

    checkpoint = cfg.ckpt_path
    if cfg.train:
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        checkpoint = record.add_training()

    tested = []
    if cfg.test:
        tested = trainer.test(module, datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return record.write(tested)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train as the command line says."""
    folder = nullcontext() if get_name() else tracked(Path(cfg.output_dir), describe_start(HydraConfig.get()))
    with folder, short_errors(cfg):
        continue_if_requeued(cfg)
        if in_sweep() and OmegaConf.select(cfg, "callbacks.summary"):
            cfg.callbacks.summary = None  # the same for each job
        train(cfg)
        if not get_name() and not in_sweep():
            _show(cfg)


def _show(cfg: DictConfig) -> None:
    from src.engine.runs import report

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


if __name__ == "__main__":
    run(main, "train")
