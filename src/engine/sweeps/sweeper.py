"""What this project's sweepers share: what a command sweeps over, and the launcher of its jobs."""

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class JobSweeper(Sweeper):
    """A sweeper whose jobs have folders of their own in that of the sweep.

    Args:
        params: Swept keys and what they run over; the command line overrides it.
    """

    def __init__(self, params: Mapping[str, Any] | None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher of ``hydra/launcher``."""
        self.hydra_context: HydraContext = hydra_context
        self.config: DictConfig = config
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def parse(self, arguments: list[str]) -> tuple[dict[str, Override], dict[str, str]]:
        """The overrides by their keys, the last of each, and what each swept key runs over, as it was written."""
        parser = OverridesParser.create(self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        last = {override.get_key_element(): override for override in overrides}
        swept = {key: override for key, override in last.items() if override.is_sweep_override()}
        return last, {key: str(override.input_line).partition("=")[2] for key, override in swept.items()}
