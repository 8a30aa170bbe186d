"""Draw a digit in the browser and see what the net makes of it: ``python -m src.demo [ckpt_path=...] [port=...]``."""

import base64
import io
import json
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import load_libraries, run, short_errors

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PAGE = Path(__file__).with_suffix(".html")
TILE = 56  # pixels of a feature map
MAX_BYTES = 1_000_000  # of a drawing; the page's have some 10,000
# The page has all that it needs, and no say over other addresses.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"


def make_classifier(path: Path, folder: Path) -> Callable[[bytes], dict[str, Any]]:
    """What turns a drawing into the page's content.

    Args:
        path: A checkpoint.
        folder: Where the latest drawing is kept, as ``drawing.png``.

    Returns:
        A function of an image file's content. It returns ``probabilities``, one a class, and ``layers``, each with
        ``name``, ``shape`` and ``picture``, a PNG as a data URL. It raises ValueError if the file is no drawing.
    """
    import torch

    from src.callbacks.layers import Layer, describe_shape, draw_values, trace
    from src.engine.runs import build
    from src.export import preprocess
    from src.predict import find_reader

    datamodule = build.restore_datamodule(path)
    read = find_reader(datamodule)
    net = build.restore(path).net
    drawing = folder / "drawing.png"
    lock = threading.Lock()  # one file, one net

    def classify(content: bytes) -> dict[str, Any]:
        with lock:
            drawing.write_bytes(content)
            try:
                images = torch.as_tensor(read(drawing))
            except Exception as error:  # whatever a decoder raises
                raise ValueError(str(error).split("\n")[0] or type(error).__name__) from error
            inputs = preprocess(images[:1], datamodule)
            layers, logits = trace(net, inputs)
        return {
            "probabilities": logits[0].softmax(dim=0).tolist(),
            "layers": [
                {
                    "name": layer.name,
                    "shape": describe_shape(layer.values[0]),
                    "picture": _to_url(draw_values(layer.values[0], TILE)),
                }
                for layer in [Layer("input", inputs), *layers]
            ],
        }

    return classify


def _to_url(picture: Any) -> str:
    """Grey pixels as a PNG, transparent between the maps."""
    from PIL import Image

    from src.callbacks.layers import BETWEEN

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", transparency=BETWEEN)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class DemoServer(ThreadingHTTPServer):
    """Serves the page, and answers POST /predict. Threads, since browsers keep connections open that they do not use.

    Args:
        port: Port of HOST; 0 for any that is free.
        classify: What ``make_classifier`` returns.

    Raises:
        ConfigError: If the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, port: int, classify: Callable[[bytes], dict[str, Any]]) -> None:
        self.classify = classify
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"port={port}: {error.strerror}; choose another one, as in port={port % 65535 + 1}, or 0 for any"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error."""
        log.debug("a request has failed:", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = 10  # seconds that a browser may be silent

    def do_GET(self) -> None:
        if self.path == "/":
            self._reply(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "only / is here")

    def do_POST(self) -> None:
        length = self.headers["Content-Length"] or ""
        if not (length.isascii() and length.isdecimal() and len(length) < 30):  # of thousands, int() makes no number
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length: expected the number of bytes")
            return
        if int(length) > MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes: expected {MAX_BYTES} or less")
            return
        content = self.rfile.read(int(length))
        if self.path != "/predict":
            self._refuse(HTTPStatus.NOT_FOUND, "drawings go to /predict")
            return
        try:
            answer = self.server.classify(content)
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # the net's own
            log.debug("stack trace:", exc_info=error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, type(error).__name__)
        else:
            self._reply(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._reply(status, json.dumps({"error": reason}).encode(), "application/json")

    def _reply(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """To the log file alone."""
        log.debug(format, *args)


def demo(cfg: DictConfig) -> None:
    """Serve the page as ``conf/demo.yaml`` says, until a signal ends it."""
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output_dir = Path(cfg.output_dir)

    from src.engine.runs import report

    with DemoServer(cfg.port, make_classifier(path, output_dir)) as server:
        OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
        url = f"http://{HOST}:{server.server_port}"
        report.print_table("draw a digit", {"open": url, "checkpoint": report.shown(path), "end": "Ctrl-C"})
        server.serve_forever()


@hydra.main(version_base="1.3", config_path="../conf", config_name="demo")
def main(cfg: DictConfig) -> None:
    """Serve as the command line says."""
    with short_errors(cfg):
        load_libraries()
        demo(cfg)


if __name__ == "__main__":
    run(main, "demo")
