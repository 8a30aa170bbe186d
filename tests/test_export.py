"""The export command: what it writes computes the same, in processes that have nothing of this project."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from src.data.mnist import preprocess
from src.data.sources import read_package
from src.engine.errors import ConfigError
from src.engine.runs.build import load_checkpoint, restore, restore_datamodule
from src.engine.runs.export import export_module
from src.engine.settings.trust import admit, instantiate
from src.export import check_format, export
from tests import forks
from tests.compose import compose_cfg, run_command
from tests.marks import by_default

DIGITS = read_package().images[::50]  # (100, 28, 28)
SLOW_FORMATS = [pytest.param(file_format, marks=pytest.mark.slow) for file_format in ("onnx", "pt2")]


def run_alone(script: str, folder: Path) -> str:
    """Run a script that finds nothing of this project, in a folder of its own."""
    env = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compute_logits(checkpoint: Path) -> NDArray[np.float32]:
    """What the checkpoint says of DIGITS, (100, 10)."""
    with torch.no_grad():
        logits: NDArray[np.float32] = restore(checkpoint)(preprocess(DIGITS)).numpy()
    return logits


def export_checkpoint(checkpoint: Path, output: Path, file_format: str) -> dict[str, Any]:
    module = restore(checkpoint)
    facts = {"config": load_checkpoint(checkpoint)["config"]}
    return export_module(module, restore_datamodule(checkpoint), output, file_format, facts)


def check_metadata(metadata: dict[str, Any], checkpoint: Path) -> None:
    """It says what the file is of, as JSON."""
    said = {key: json.loads(value) for key, value in metadata.items()}
    assert said["classes"] == list(range(10))
    assert said["config"] == load_checkpoint(checkpoint)["config"]
    assert said["accuracy"]["test/acc"] > 0.9
    assert said["data"]["source"] == "package"
    assert said["data"]["num_images"]["test"] == 500
    assert said["data"]["fingerprint"].startswith("crc32:")
    assert said["versions"]["torch"] == version("torch")


@pytest.mark.slow
def test_the_command_writes_where_it_is_told_and_says_what(trained: Path, tmp_path: Path) -> None:
    result = forks.run_command(
        "export",
        f"ckpt_path={trained}",
        "output=out/digits.onnx",
        "hydra.run.dir=run",
        cwd=tmp_path,
        PROJECT_ROOT=str(trained.parents[1]),
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "No CUDA runtime" not in line] == []  # of torch, by nvcc
    path = tmp_path / "out" / "digits.onnx"
    assert list(path.parent.iterdir()) == [path]
    for said in ("uint8 (batch, 28, 28)", "500 samples, outputs within ", f"{path.stat().st_size:,} bytes", " ms,"):
        assert said in result.stdout


@pytest.mark.slow
def test_onnx_needs_onnxruntime_alone(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "digits.onnx"
    export_checkpoint(trained, path, "onnx")
    np.save(tmp_path / "digits.npy", DIGITS.numpy())
    printed = run_alone(
        """
import json, sys, numpy, onnxruntime
session = onnxruntime.InferenceSession("digits.onnx")
digits = numpy.load("digits.npy")
for number in (100, 7, 1):
    numpy.save(f"logits{number}.npy", session.run(None, {"images": digits[:number]})[0])
assert not {"torch", "src", "pytorch_lightning", "hydra"} & set(sys.modules)
(images,), (logits,) = session.get_inputs(), session.get_outputs()
assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 28, 28])
assert (logits.name, logits.shape) == ("logits", ["batch", 10])
print(json.dumps(session.get_modelmeta().custom_metadata_map))
""",
        tmp_path,
    )
    expected = compute_logits(trained)
    for number in (100, 7, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"logits{number}.npy"), expected[:number], rtol=0, atol=1e-4)
    check_metadata(json.loads(printed), trained)
    assert b"runs/export.py" not in path.read_bytes()  # where the source lies on this machine


@pytest.mark.slow
def test_pt2_needs_torch_alone(trained: Path, tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, f"ckpt_path={trained}", "format=pt2", config_name="export")
    check_format(cfg)
    result = export(cfg)
    path = tmp_path / "model.pt2"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "model.pt2"]
    assert result["checked"] == 500
    assert result["bytes"] == path.stat().st_size < 400_000  # weights of 247 kB, and no images
    np.save(tmp_path / "digits.npy", DIGITS.numpy())
    printed = run_alone(
        """
import json, sys, numpy, torch
extra = {key: "" for key in ("classes", "config", "accuracy", "data", "versions")}
net = torch.export.load("model.pt2", extra_files=extra).module()
digits = torch.from_numpy(numpy.load("digits.npy"))
for number in (100, 7, 1):
    numpy.save(f"logits{number}.npy", net(digits[:number]).detach().numpy())
assert not {"src", "pytorch_lightning", "hydra", "torchvision"} & set(sys.modules)
print(json.dumps(extra))
""",
        tmp_path,
    )
    expected = compute_logits(trained)
    for number in (100, 7, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"logits{number}.npy"), expected[:number], rtol=0, atol=1e-4)
    check_metadata(json.loads(printed), trained)


def test_safetensors_holds_the_nets_weights(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "a" / "model.safetensors"
    result = export_checkpoint(trained, path, "safetensors")
    net = pytest.importorskip("src.models.lenet5").LeNet5(activation="relu")
    net.load_state_dict(load_file(path))
    with torch.no_grad():
        np.testing.assert_allclose(net(preprocess(DIGITS)).numpy(), compute_logits(trained), rtol=0, atol=1e-4)
    with safe_open(path, "pt") as file:
        check_metadata(file.metadata(), trained)
    assert result["inputs"] == {"images": "float32 (batch, 1, 32, 32)"}


class FloatDigits(pl.LightningDataModule):
    """A user's own data, ready for the net."""

    def test_dataloader(self) -> DataLoader:
        labels = torch.arange(100) % 10
        return DataLoader(TensorDataset(preprocess(DIGITS)[:, :, ::4, ::4], labels), 33)


def alter(checkpoint: Path, path: Path, **nodes: Any) -> Path:
    """A checkpoint with other nodes in its config, and weights that are not trained."""
    content = load_checkpoint(checkpoint)
    content["config"]["model"].update(nodes.pop("model"))
    content["config"].update(nodes)
    content["state_dict"] = instantiate(OmegaConf.create(content["config"]["model"])).state_dict()
    torch.save(content, path)
    return path


def sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "torch.nn.Sequential", "_args_": list(layers)}


FLATTEN = {"_target_": "torch.nn.Flatten"}


@pytest.mark.parametrize("file_format", [*SLOW_FORMATS, "safetensors"])
def test_a_net_and_data_of_the_users_own_are_exported(file_format: str, trained: Path, tmp_path: Path) -> None:
    admit({"_target_": "tests.test_export.FloatDigits"})
    norm = {"_target_": "torch.nn.BatchNorm1d", "num_features": 64}
    linear = {"_target_": "torch.nn.Linear", "in_features": 64, "out_features": 10}
    model = {"net": sequential(FLATTEN, norm, linear), "input_size": [1, 8, 8]}
    data = {"_target_": "tests.test_export.FloatDigits"}
    checkpoint = alter(trained, tmp_path / "own.ckpt", model=model, data=data)
    result = export_checkpoint(checkpoint, tmp_path / "own.bin", file_format)
    assert result["inputs"] == {"images": "float32 (batch, 1, 8, 8)"}
    assert result["checked"] == 100
    assert (tmp_path / "own.bin").stat().st_size == result["bytes"]


class Reader(pl.LightningModule):
    """No classifier: two inputs, whose batches are dicts, and several outputs, nested, by len(tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 8)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(8, 1)
        self.example_input_array = {"tokens": torch.ones(1, 5, dtype=torch.long), "weights": torch.ones(1, 5)}

    def forward(self, tokens: Tensor, weights: Tensor) -> dict[str, Any]:
        states = self.encoder(self.embedding(tokens)) * weights.unsqueeze(2)  # (B, T, 8)
        states = torch.cat([states[:, 1:], torch.zeros(len(tokens), 1, 8)], dim=1)
        return {"states": states, "scores": (self.head(states.mean(dim=1)).squeeze(1), tokens.sum(dim=1))}


class Sentences(pl.LightningDataModule):
    def test_dataloader(self) -> DataLoader:
        rows: Any = [{"tokens": torch.arange(5)}]
        return DataLoader(rows, batch_size=1)


@pytest.mark.parametrize("file_format", [*SLOW_FORMATS, "safetensors"])
@pytest.mark.parametrize("datamodule", [Sentences(), None], ids=["dicts", "none"])
def test_a_module_that_is_no_classifier_is_exported_with_its_example(
    file_format: str, datamodule: pl.LightningDataModule | None, tmp_path: Path
) -> None:
    module, path = Reader().eval(), tmp_path / f"reader.{file_format}"
    result = export_module(module, datamodule, path, file_format, {})
    assert result["inputs"]["tokens"] == "int64 (batch, 5)"
    assert list(result["outputs"].values()) == ["float32 (batch, 5, 8)", "float32 (batch)", "int64 (batch)"]
    assert not {"accuracy", "classes", "logits"} & {*result, *result["outputs"]}
    assert result["checked"] == 4  # the example, and three of it
    tokens, weights = torch.randint(0, 9, (7, 5)), torch.rand(7, 5)
    with torch.no_grad():
        expected = module(tokens, weights)["scores"][0].numpy()
    if file_format == "onnx":
        session = onnxruntime.InferenceSession(path)
        assert [each.shape[0] for each in [*session.get_inputs(), *session.get_outputs()]] == ["batch"] * 5
        found = session.run(["output_1"], {"tokens": tokens.numpy(), "weights": weights.numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    elif file_format == "pt2":
        found = torch.export.load(path).module()(tokens, weights)["scores"][0].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert load_file(path).keys() == module.state_dict().keys()


class Large(pl.LightningModule):
    """Outputs of some millions: what rounding leaves of them is no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(64, 2)

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = 1e7 * self.line(rows.flatten(1))
        return outputs


def test_outputs_are_compared_relative_to_their_size(tmp_path: Path) -> None:
    result = export_module(Large().eval(), FloatDigits(), tmp_path / "large.onnx", "onnx", {})
    assert result["outputs"] == {"output": "float32 (batch, 2)"}
    assert result["checked"] == 100


class Scaled(pl.LightningModule):
    """Takes images and a scale, which its batches, of images and labels, do not have."""

    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.line = torch.nn.Linear(64, 2)
        self.example_input_array = example

    def forward(self, images: Tensor, scale: Tensor) -> Tensor:
        outputs: Tensor = self.line(images.flatten(1)) * scale[:, None]
        return outputs


def test_a_forward_of_two_inputs_needs_an_example_and_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "scaled.safetensors"
    said = r"Scaled: its forward fails on float32 \(batch, 1, 8, 8\) \(TypeError: .*set example_input_array"
    with pytest.raises(ConfigError, match=said):
        export_module(Scaled().eval(), FloatDigits(), path, "safetensors", {})
    result = export_module(
        Scaled((torch.ones(1, 1, 8, 8), torch.ones(1))).eval(), FloatDigits(), path, "safetensors", {}
    )
    assert result["inputs"] == {"images": "float32 (batch, 1, 8, 8)", "scale": "float32 (batch)"}


@pytest.mark.parametrize("datamodule", [Sentences(), pl.LightningDataModule(), None])
def test_without_pairs_and_an_example_it_is_said_what_is_missing(
    datamodule: pl.LightningDataModule | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^Large: .*; set example_input_array in its constructor$"):
        export_module(Large(), datamodule, tmp_path / "a.onnx", "onnx", {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="LightningModule has no forward: there is nothing to export"):
        export_module(pl.LightningModule(), None, tmp_path / "model.onnx", "onnx", {})


@pytest.mark.parametrize("file_format", [*SLOW_FORMATS, "safetensors"])
def test_files_have_the_mode_that_the_user_gives_files(file_format: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_module(Large().eval(), FloatDigits(), tmp_path / "model", file_format, {})
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("file_format", "message"),
    [
        ("onnx", "format=onnx: ImageClassifier cannot be exported: "),
        ("safetensors", "format=safetensors: the file computes something else than the checkpoint: "),
    ],
)
def test_what_cannot_be_exported_leaves_what_was_there(
    file_format: str, message: str, trained: Path, tmp_path: Path
) -> None:
    pool = {"_target_": "torch.nn.FractionalMaxPool2d", "kernel_size": 2, "output_size": 9}  # at random, always
    linear = {"_target_": "torch.nn.Linear", "in_features": 81, "out_features": 10}
    checkpoint = alter(trained, tmp_path / "random.ckpt", model={"net": sequential(pool, FLATTEN, linear)})
    output = tmp_path / "out" / "model.bin"
    output.parent.mkdir()
    output.write_text("an older export")
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(checkpoint, output, file_format)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(output.parent.iterdir()) == [output]
    assert output.read_text() == "an older export"


def test_logits_that_are_not_numbers_are_not_taken_for_the_same(trained: Path, tmp_path: Path) -> None:
    content = load_checkpoint(trained)
    content["state_dict"]["net.output.bias"][3] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(ConfigError, match=r"Greatest absolute difference: nan"):
        export_checkpoint(tmp_path / "nan.ckpt", tmp_path / "model.safetensors", "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    by_default(
        [
            (["format=tflite"], "format=tflite: expected onnx, pt2 or safetensors"),
            (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: no such file"),
            ([], "train first (python -m src.train)"),
        ]
    ),
)
def test_a_bad_setting_is_said_and_nothing_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run_command("export", *arguments, cwd=tmp_path, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file_format", "package"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_a_missing_package_is_said(
    file_format: str, package: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"format={file_format}: needs {package}: pip install"):
        check_format(compose_cfg(tmp_path, f"ckpt_path={trained}", f"format={file_format}", config_name="export"))
