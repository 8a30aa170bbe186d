"""Cut poor trials of a search short."""

import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from src.engine.sweeps.study import open_trial


class Pruning(pl.Callback):
    """Reports the monitored metric to a trial of an Optuna study, and stops the run when its pruner says so.

    Args:
        study: The study's name, in the storage that the environment names.
        trial: The trial's number.
        monitor: The metric to report.
    """

    def __init__(self, study: str, trial: int, monitor: str) -> None:
        self.study = study
        self.number = trial
        self.monitor = monitor
        self.pruned = False
        self.num_reported = 0  # validations: an epoch may have several, or a run no end of its epoch
        self._trial: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop again what was stopped between the pruner's word and the run's end."""
        trainer.should_stop = trainer.should_stop or self.pruned

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the metric; what is left after the last validation, or of the last epoch, is not worth pruning."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        number, self.num_reported = self.num_reported, self.num_reported + 1
        prune = False
        if trainer.is_global_zero:
            self._trial = self._trial or open_trial(self.study, self.number)
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # one that a kill has undone
                self._trial.report(float(trainer.callback_metrics[self.monitor]), step=number)
            prune = bool(self._trial.should_prune())  # NumPy's may be what a pruner says; a checkpoint holds none
        is_last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        self.pruned = trainer.strategy.broadcast(prune) and not is_last
        trainer.should_stop = trainer.should_stop or self.pruned

    def state_dict(self) -> dict[str, Any]:
        """Whether the run was pruned, for one that is stopped right then, and how many values it has reported."""
        return {"pruned": self.pruned, "num_reported": self.num_reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self.pruned, self.num_reported = state_dict["pruned"], state_dict["num_reported"]
