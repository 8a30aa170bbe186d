"""The words of a command, in any order."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from src.engine.errors import ConfigError
from src.engine.runs.command_line import arrange, describe_command


@pytest.mark.parametrize(
    ("arguments", "arranged"),
    [
        (["seed=1,2", "-m"], ["-m", "seed=1,2"]),
        (["a=1", "--config-dir", "x", "-m", "b=2"], ["--config-dir", "x", "-m", "a=1", "b=2"]),
        (["--config-dir=x", "~callbacks.lr", "+note=1"], ["--config-dir=x", "~callbacks.lr", "+note=1"]),
        (["callbacks=null", "optimizer=null", "monitor=null"], ["callbacks=[]", "optimizer=[]", "monitor=null"]),
        (["a=1", "--cfg", "job"], ["--cfg", "job", "a=1"]),
        (["--optimizer.lr=0.1", "--cfg=job", "-m"], ["--cfg=job", "-m", "optimizer.lr=0.1"]),  # as W&B's agent has it
    ],
)
def test_flags_and_settings_may_come_in_any_order(arguments: list[str], arranged: list[str]) -> None:
    assert arrange(arguments, "train") == arranged


@pytest.mark.parametrize("words", [["--cfg"], ["--cfg", "jobb"], ["--cfg=jobb"], ["-c", "seed=1"], ["--info", "x"]])
def test_a_flag_that_lacks_its_word_is_told(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"^{words[0].partition('=')[0]} .*: expected one of (job|all), "):
        arrange(words, "train")


def test_words_without_a_key_are_files_where_a_command_takes_them(tmp_path: Path) -> None:
    odd = tmp_path / "a=b, c.png"
    odd.touch()
    arranged = arrange(["x.png", "batch_size=2", str(odd)], "predict", "inputs")
    assert arranged == ["batch_size=2", f"inputs=['x.png','{odd}']"]
    assert OverridesParser.create().parse_override(arranged[-1]).value() == ["x.png", str(odd)]


def test_help_shows_a_commands_own_keys_a_line_each() -> None:
    said = describe_command("test")
    for line in ("ckpt_path: null ", "  root: null", "  batch_size: null", "accelerator=auto, cpu, gpu, mps"):
        assert f"\n{line}" in said
    assert "optimizer" not in said
    assert "\noptimizer=adam, adamw" in describe_command("train")
