"""A real PostgreSQL server for a test: on loopback, with a password, in a folder of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conftest import free_port

USER, PASSWORD = "researcher", "correct horse"


def find_program(name: str) -> str | None:
    """The path of one of PostgreSQL's server programs, which Debian keeps off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(debian[-1]) if debian else shutil.which(name)


@contextmanager
def serve_postgres() -> Iterator[str]:
    """Serve an empty database; yields its URL, password and all."""
    # The server refuses to run as root, and another user cannot look into pytest's folders.
    user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    with TemporaryDirectory(prefix="postgres-") as folder:
        data, port, password = f"{folder}/data", free_port(), Path(folder, "password")
        password.write_text(PASSWORD)
        if user:
            shutil.chown(folder, **user)

        def run(program: str, *arguments: str) -> None:
            command = [str(find_program(program)), "-D", data, *arguments]
            subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]

        run("initdb", "-U", USER, "--pwfile", str(password), "-A", "scram-sha-256", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        run("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", options)
        try:
            yield f"postgresql+psycopg://{USER}:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "fast")
