"""``make bench``: an epoch of the template beside the shortest hand-written PyTorch loop.

Both train the same net on the same images in memory, with the same optimizer, batch size and threads, and validate
once; the template also logs, shows its progress and keeps checkpoints. They take turns, so that a slow moment of the
machine meets both; the table has medians and their ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.nn import functional as F

from src.build import build_datamodule, build_module, build_trainer
from src.config import CONF, ROOT
from src.data.mnist import MNISTDataModule, preprocess
from src.report import print_table


def bare_epoch(cfg: DictConfig) -> float:
    """Seconds that one epoch of training and a validation take without Lightning."""
    data = build_datamodule(cfg)
    assert isinstance(data, MNISTDataModule)
    data.prepare_data()
    data.setup("fit")
    module = build_module(cfg)
    net, optimizer = module.net, module.optimizer(module.net.parameters())  # type: ignore[misc]
    train, val = data.splits["train"], data.splits["val"]
    size = cfg.data.batch_size
    start = time.perf_counter()
    order = torch.randperm(len(train.labels))
    for indices in order.split(size):
        optimizer.zero_grad()
        F.cross_entropy(net(preprocess(train.images[indices])), train.labels[indices]).backward()
        optimizer.step()
    with torch.no_grad():
        for images, labels in zip(val.images.split(1000), val.labels.split(1000), strict=True):
            (net(preprocess(images)).argmax(dim=1) == labels).sum().item()
    return time.perf_counter() - start


def template_epoch(cfg: DictConfig) -> float:
    """Seconds that the same takes with the template, all of its callbacks and loggers on."""
    data, module, trainer = build_datamodule(cfg), build_module(cfg), build_trainer(cfg, enable_model_summary=False)
    data.prepare_data()
    data.setup("fit")
    start = time.perf_counter()
    trainer.fit(module, data)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="of the train command, such as data.batch_size=512")
    arguments = parser.parse_args()
    data_root = os.environ.get("MNIST_ROOT", ROOT.parent / "shared" / "mnist")
    bare, template = [], []
    for _ in range(arguments.repetitions):
        with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF), version_base="1.3"):
            found = [f"data.root={data_root}"] if Path(data_root, "MNIST").is_dir() else ["data=mnist5k"]
            settings = [*found, f"output_dir={folder}", "trainer.max_epochs=1", "callbacks.summary=null"]
            cfg = compose("train", [*settings, *arguments.overrides])
            bare.append(bare_epoch(cfg))
            template.append(template_epoch(cfg))
    ratios = [ours / theirs for ours, theirs in zip(template, bare, strict=True)]
    print_table(
        f"an epoch and a validation, medians of {arguments.repetitions} turns, {torch.get_num_threads()} threads",
        {
            "bare loop": f"{statistics.median(bare):.2f} s",
            "template": f"{statistics.median(template):.2f} s",
            "ratio": f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})",
        },
    )


if __name__ == "__main__":
    main()
