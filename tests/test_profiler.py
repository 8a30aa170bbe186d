"""src/profiler.py: it changes nothing but the time."""

from pathlib import Path

from pytorch_lightning import Callback

from src.build import build_datamodule, build_module, build_trainer
from src.profiler import NoProfiler
from tests.compose import compose_cfg


class Count(Callback):
    def __init__(self) -> None:
        self.profilers: list[type] = []

    def on_train_batch_end(self, trainer: object, *_: object) -> None:
        self.profilers.append(type(trainer.profiler))  # type: ignore[attr-defined]


def test_hooks_run_without_a_profiler(tmp_path: Path) -> None:
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "trainer=cpu", "callbacks=minimal", "logger=[]", "trainer.max_epochs=1",
        "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    trainer, count = build_trainer(cfg), Count()
    trainer.callbacks.append(count)  # type: ignore[attr-defined]

    trainer.fit(build_module(cfg), build_datamodule(cfg))

    assert count.profilers == [NoProfiler, NoProfiler]


def test_an_exception_goes_through() -> None:
    try:
        with NoProfiler().profile("a hook"):
            raise KeyError("from the hook")
    except KeyError as error:
        found = error
    assert found.args == ("from the hook",)
