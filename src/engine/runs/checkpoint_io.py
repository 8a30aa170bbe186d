"""How checkpoints reach the disk."""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill or a full disk leaves the previous one as it was.

    Lightning's own goes through a temporary folder, from which a move to another file system is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint whole or not at all.

        Raises:
            OSError: If the disk is full or cannot be written to.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.part")  # one that a kill has left is written over
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except (OSError, RuntimeError) as error:  # of a full disk, torch may say either, the latter about the former
            causes = (getattr(cause, "strerror", None) for cause in (error, error.__context__))
            reason = next(filter(None, causes), str(error).splitlines()[0])
            raise OSError(f"{path}: cannot be written ({reason}); free some space or set hydra.run.dir") from error
        finally:
            aside.unlink(missing_ok=True)
