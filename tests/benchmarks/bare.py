"""The shortest hand-written PyTorch loop that trains what ``python -m src.train`` does: the peer called bare.

It has the same net, images in memory, preprocessing, optimizer, schedule, batches and epochs, and counts the correct
images of a validation after each epoch; no more. It prints seconds since 1970, of its first step and of each epoch's
end, and its peak of memory in MB.
"""

import argparse
import resource
import sys
import time

import torch
from torch.nn import functional as F

from src.data.mnist import MNISTDataModule, preprocess
from src.models.lenet5 import LeNet5


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--source", default="files")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()

    data = MNISTDataModule(arguments.root, source=arguments.source)
    data.setup()
    train, val = data.splits["train"], data.splits["val"]
    batches = min(arguments.batches or 10**9, -(-len(train.labels) // arguments.batch_size))
    net = LeNet5(activation="relu").to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=arguments.epochs * batches)
    for epoch in range(arguments.epochs):
        for step, indices in enumerate(torch.randperm(len(train.labels)).split(arguments.batch_size)[:batches]):
            optimizer.zero_grad()
            F.cross_entropy(net(preprocess(train.images[indices])), train.labels[indices]).backward()
            optimizer.step()
            scheduler.step()
            if epoch == step == 0:
                print("step", time.time(), flush=True)
        with torch.no_grad():
            parts = zip(val.images.split(250), val.labels.split(250), strict=True)
            correct = sum((net(preprocess(images)).argmax(dim=1) == labels).sum().item() for images, labels in parts)
        print("epoch", time.time(), correct / len(val.labels), flush=True)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


if __name__ == "__main__":
    main()
