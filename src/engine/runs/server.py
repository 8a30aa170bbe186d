"""Serves the demo's page to browsers of this machine, and to no other site's page."""

import json
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from src.engine.errors import ConfigError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_BYTES = 1_000_000  # of a drawing; the page's have some 10,000
# The page has all that it needs, no say over other addresses, and is no part of another page.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'"
)


class PageServer(ThreadingHTTPServer):
    """Serves a page, and answers its POST /predict. Threads, since browsers keep connections open and unused.

    Args:
        port: Port of HOST; 0 for any that is free.
        page: The page, HTML.
        about: What GET /about answers, plain.
        classify: What answers POST /predict: from the content to what is plain.

    Raises:
        ConfigError: If the port cannot be had.
    """

    daemon_threads = True

    def __init__(
        self, port: int, page: bytes, about: Mapping[str, Any], classify: Callable[[bytes], dict[str, Any]]
    ) -> None:
        self.page, self.about, self.classify = page, about, classify
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

    server: PageServer
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
        """The page, and what it is about."""
        if self.path == "/":
            self.reply(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/about":
            self.reply(HTTPStatus.OK, json.dumps(self.server.about).encode())
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "only / is here")

    def do_POST(self) -> None:
        """What a net makes of a drawing."""
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
