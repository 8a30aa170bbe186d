"""How checkpoints reach the disk."""

import io
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import Container, OmegaConf
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map_only

from src.engine.errors import CheckpointError
from src.engine.runs.report import replacing

log = logging.getLogger(__name__)

HYPER = "hyper_parameters"  # of the module, and of the data module
PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill or a full disk leaves the previous one as it was.

    Lightning's own goes through a temporary folder, from which a move to another file system is a copy.

    A checkpoint holds plain values and tensors only, so that it loads under ``weights_only=True``, and the run's config
    under the key ``config``. What of the hyper-parameters is not plain, as a net, is left out: the config rebuilds it.
    """

    config: dict[str, Any] | None = None
    on_saved: Callable[[Path], None] | None = None  # called with each file when it is there
    is_rehearsing = False  # checkpoints are then written to memory, without their tensors' values, and read back

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()

    def _rehearse(self, checkpoint: dict[str, Any]) -> None:
        for key, part in checkpoint.items():
            file = io.BytesIO()
            try:
                torch.save(tree_map_only(Tensor, lambda tensor: tensor.new_empty(0), part), file)
                file.seek(0)
                torch.load(file, weights_only=True)
            except Exception as error:  # whatever a user's object raises when it is pickled
                found = re.search(r"GLOBAL (\S+)", str(error))  # torch's words come to ten lines
                reason = found[1] if found else str(error).strip().split("\n")[0]
                said = (
                    f"its part {key!r} holds more than tensors and plain values ({reason}); convert that as it is saved"
                )
                raise CheckpointError(f"a checkpoint of this run could not be read back: {said}") from error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint whole or not at all.

        Raises:
            OSError: If the disk is full or cannot be written to.
        """
        checkpoint = {key: value for key, value in checkpoint.items() if key != "hparams_type"}  # OmegaConf's class
        for key in [key for key in checkpoint if key.endswith(HYPER)]:
            checkpoint[key], left = _keep_plain(checkpoint[key])
            if left and self.is_rehearsing:
                log.info(f"{key}: not plain, so not in the checkpoints: {', '.join(left)}; the config rebuilds them")
        if self.config is not None:
            checkpoint["config"] = self.config
        if self.is_rehearsing:
            self._rehearse(checkpoint)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside, aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # of a full disk, torch may say either, the latter about the former
            causes = (getattr(cause, "strerror", None) for cause in (error, error.__context__))
            reason = next(filter(None, causes), str(error).splitlines()[0])
            raise OSError(f"{path}: cannot be written ({reason}); free some space or set hydra.run.dir") from error
        self._folders.add(path.parent.resolve())
        if self.on_saved:
            self.on_saved(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; what its callbacks remember of files is looked up beside it, or forgotten.

        A run's folder may have been moved; and ModelCheckpoint removes the files that its state names.
        """
        checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        for state in (checkpoint.get("callbacks") or {}).values():
            if isinstance(state, dict) and "best_model_path" in state:
                _relocate(state, Path(path).resolve().parent)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file that ends in ``.ckpt`` from a folder in which this run has saved one; nothing else."""
        path = Path(path)
        if path.suffix == ".ckpt" and path.parent.resolve() in self._folders and not path.is_symlink():
            path.unlink(missing_ok=True)


def _relocate(state: dict[str, Any], folder: Path) -> None:
    """Have the state of a ModelCheckpoint name files of the checkpoint's folder only, or of its own beside that."""
    name = Path(str(state.get("dirpath"))).name
    if name not in ("", "..") and (folder.parent / name).is_dir():
        folder = folder.parent / name

    def find(name: Any) -> str:
        path = folder / Path(str(name)).name
        return str(path) if name and path.is_file() else ""

    for key in ("best_model_path", "last_model_path", "kth_best_model_path"):
        state[key] = find(state.get(key))
    models = state.get("best_k_models") or {}
    state["best_k_models"] = {find(name): score for name, score in models.items() if find(name)}
    state["dirpath"] = str(folder)


def _keep_plain(parameters: Any) -> tuple[dict[str, Any], list[str]]:
    """Hyper-parameters that are made of plain values and tensors, and the names of the others."""
    if isinstance(parameters, Container):
        parameters = OmegaConf.to_container(parameters, resolve=True)
    kept = {key: value for key, value in parameters.items() if is_plain(value)}
    return kept, [str(key) for key in parameters if key not in kept]


def is_plain(value: Any) -> bool:
    """Whether a value is made of tensors and plain values, as ``weights_only=True`` wants it."""
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple | set):
        return type(value) in (list, tuple, set, torch.Size) and all(map(is_plain, value))
    return type(value) in PLAIN
