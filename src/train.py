"""Train a model: ``python -m src.train [group=option] [key=value]``."""

from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.engine.runs.command import continue_if_requeued, in_sweep, run, short_errors
from src.engine.runs.processes import get_name
from src.engine.runs.status import describe_start, tracked


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
    cfg.test = is_tested(cfg.test, module, datamodule, is_fresh=not (cfg.train or cfg.ckpt_path))
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
            from src.engine.runs.record import show

            show(cfg)


if __name__ == "__main__":
    run(main, "train")
