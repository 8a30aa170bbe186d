"""LeNet-5 on MNIST: a PyTorch Lightning and Hydra research template."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and find_spec("hydra") is None:  # a command of ours, by a Python that has no Hydra
    sys.exit(
        f"error: {sys.executable}: this Python has no Hydra; use the environment that `make train` makes, as in "
        ".venv/bin/python -m src.train, or pip install -r requirements.txt"
    )
