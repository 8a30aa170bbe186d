"""Draw in the browser and see what the net makes of it: ``python -m src.demo [ckpt_path=...] [port=...]``."""

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs import report
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run_function
from src.engine.runs.server import HOST, PageServer

# Functions import torch and what needs it: a bad setting is answered without.

PAGE = Path(__file__).with_suffix(".html")
TILE = 56  # pixels of a feature map


def demo(cfg: DictConfig) -> None:
    """Serve the page as ``conf/demo.yaml`` says, until a signal ends it."""
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output_dir = Path(cfg.output_dir)
    with PageServer(cfg.port, PAGE.read_bytes(), *make_classifier(path, output_dir)) as server:
        OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
        url = f"http://{HOST}:{server.server_port}"
        report.print_table("demo", {"open": url, "checkpoint": report.shown(path), "end": "Ctrl-C"})
        server.serve_forever()


def make_classifier(path: Path, folder: Path) -> tuple[dict[str, Any], Callable[[bytes], dict[str, Any]]]:
    """What the page says of a checkpoint, and what turns a drawing into the page's content.

    Args:
        path: A checkpoint.
        folder: Where the latest drawing is kept, as ``drawing.png``.

    Returns:
        ``model``, a name, ``score``, as ``val/acc 0.9876`` or empty, and ``classes``, their names; and a function of an
        image file's content. It returns ``probabilities``, one a class, and of each layer in ``layers`` its ``name``,
        ``shape`` and ``picture``, a grey PNG as a data URL, transparent between the maps.

    Raises:
        ConfigError: If the checkpoint is not of an image classifier.
    """
    from PIL import Image

    from src.callbacks.layers import BETWEEN, Layer, describe_shape, draw_values, trace
    from src.engine.runs.build import load_checkpoint, preprocess, restore, restore_datamodule
    from src.engine.runs.predict import find_reader, read_with_doubt

    module = restore(path)
    datamodule = restore_datamodule(path, str(folder))  # no data are read: the run's folder need not be there
    num_classes = getattr(module, "num_classes", None)
    if num_classes is None:
        raise ConfigError(
            f"{type(module).__name__} is no image classifier: the demo needs its attribute num_classes, and a forward "
            "from images to logits (B, num_classes)"
        )
    read = find_reader(datamodule)
    states = load_checkpoint(path).get("callbacks", {}).values()
    scored = [state for state in states if state.get("current_score") is not None]
    about = {
        "model": type(getattr(module, "net", module)).__name__,
        "score": f"{scored[0]['monitor']} {scored[0]['current_score']:.4f}" if scored else "",
        "classes": list(map(str, getattr(datamodule, "classes", None) or range(num_classes))),
    }
    drawing = folder / "drawing.png"
    lock = threading.Lock()  # one file, one net

    def classify(content: bytes) -> dict[str, Any]:
        with lock:
            drawing.write_bytes(content)
            images, doubt = read_with_doubt(read, drawing)
            inputs = preprocess(images[:1], datamodule)
            layers, logits = trace(module, inputs)
        shown = []
        for name, values in (Layer("input", inputs), *layers):
            file = io.BytesIO()
            Image.fromarray(draw_values(values[0], TILE)).save(file, "PNG", transparency=BETWEEN)
            picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            shown.append({"name": name.removeprefix("net."), "shape": describe_shape(values[0]), "picture": picture})
        return {"probabilities": logits[0].softmax(dim=0).tolist(), "doubt": doubt, "layers": shown}

    return about, classify


if __name__ == "__main__":
    run_function(demo, "demo")
