"""The test split by ``trainer.test``, as ``python -m src.test`` calls it, and by a bare loop: seconds of both."""

import argparse
import json
import time
import warnings

from src.engine.runs.preflight import load_libraries


def main() -> None:
    """Let both take turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--source", default="files")
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()

    load_libraries()  # for both
    import pytorch_lightning as pl
    import torch
    from torch.nn import functional as F

    from src.classifier import ImageClassifier
    from src.data.mnist import MNISTDataModule, preprocess
    from src.models.lenet5 import LeNet5

    warnings.filterwarnings("ignore")
    data = MNISTDataModule(arguments.root, source=arguments.source)
    data.setup()
    module = ImageClassifier(LeNet5(activation="relu")).eval()
    tester = pl.Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip

    def bare() -> None:
        images, labels = data.splits["test"]
        loss, correct = 0.0, 0
        with torch.inference_mode():
            for part, truth in zip(images.split(250), labels.split(250), strict=True):
                logits = module.net(preprocess(part))
                loss += F.cross_entropy(logits, truth, reduction="sum").item()
                correct += int((logits.argmax(dim=1) == truth).sum())

    def template() -> None:
        tester.test(module, data, verbose=False)

    seconds: dict[str, list[float]] = {"bare": [], "template": []}
    for turn in range(arguments.turns + 1):
        for side in (bare, template):
            start = time.perf_counter()
            side()
            if turn:  # the first one warms up
                seconds[side.__name__].append(time.perf_counter() - start)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
