"""Draw in the browser and see what the net makes of it: ``python -m src.demo [ckpt_path=...] [port=...]``."""

import base64
import io
import json
import logging
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs import report
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run_function
from src.predict import find_reader, read_with_doubt

# Functions import torch and what needs it: a bad setting is answered without.
log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PAGE = Path(__file__).with_suffix(".html")
TILE = 56  # pixels of a feature map
MAX_BYTES = 1_000_000  # of a drawing; the page's have some 10,000
# The page has all that it needs, no say over other addresses, and is no part of another page.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'"
)


def demo(cfg: DictConfig) -> None:
    """Serve the page as ``conf/demo.yaml`` says, until a signal ends it."""
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output_dir = Path(cfg.output_dir)
    with DemoServer(cfg.port, *make_classifier(path, output_dir)) as server:
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


class DemoServer(ThreadingHTTPServer):
    """Serves the page, and answers POST /predict. Threads, since browsers keep connections open that they do not use.

    Args:
        port: Port of HOST; 0 for any that is free.
        about: What the page says of the checkpoint.
        classify: What answers a drawing; both as ``make_classifier`` returns them.

    Raises:
        ConfigError: If the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, port: int, about: Mapping[str, Any], classify: Callable[[bytes], dict[str, Any]]) -> None:
        self.about, self.classify = about, classify
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"port={port}: {error.strerror}; choose another one, as in port={port % 65535 + 1}, or 0 for any"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error."""
        log.debug("a request has failed:", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """Answers the page's requests."""

    server: DemoServer
    timeout = 10  # seconds that a browser may be silent

    def parse_request(self) -> bool:
        """Refuse a request of another site's page: one by another name for this machine, or from another origin."""
        if not super().parse_request():
            return False
        host, origin = self.headers["Host"] or "", self.headers["Origin"]
        if host.rpartition(":")[0] in (HOST, "localhost") and origin in (None, f"http://{host}"):
            return True
        self.refuse(HTTPStatus.FORBIDDEN, f"Host or Origin: expected http://{HOST}:<port>, the address printed")
        return False

    def do_GET(self) -> None:
        """The page, and what it says of the checkpoint."""
        if self.path == "/":
            self.reply(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/about":
            self.reply(HTTPStatus.OK, json.dumps(self.server.about).encode())
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "only / is here")

    def do_POST(self) -> None:
        """What the net makes of a drawing."""
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal() or len(length) > 9 or int(length) > MAX_BYTES:
            self.refuse(HTTPStatus.BAD_REQUEST, f"Content-Length: expected a number of bytes, {MAX_BYTES} or less")
            return
        content = self.rfile.read(int(length))
        if self.path != "/predict":
            self.refuse(HTTPStatus.NOT_FOUND, "drawings go to /predict")
            return
        try:
            answer = self.server.classify(content)
        except Exception as error:  # whatever a decoder or the net raises
            log.debug("stack trace:", exc_info=error)
            self.refuse(HTTPStatus.BAD_REQUEST, str(error).split("\n")[0] or type(error).__name__)
        else:
            self.reply(HTTPStatus.OK, json.dumps(answer).encode())

    def refuse(self, status: HTTPStatus, reason: str) -> None:
        """Answer why not."""
        self.reply(status, json.dumps({"error": reason}).encode())

    def reply(self, status: HTTPStatus, content: bytes, kind: str = "application/json") -> None:
        """Answer, with what a browser must know to keep the page to itself."""
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": POLICY}
        for name, value in {**headers, "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Only to the log file."""
        log.debug(format, *args)


if __name__ == "__main__":
    run_function(demo, "demo")
