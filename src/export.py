"""Export a checkpoint: ``python -m src.export format=onnx|pt2|safetensors [ckpt_path=...] [output=...]``."""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run, short_errors

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule
    from torch import Tensor, nn

TOLERANCE = 1e-4  # of a logit
NUM_TIMED, MAX_SECONDS = 200, 2.0


def export_checkpoint(path: Path, output: Path, file_format: str, **overrides: Any) -> dict[str, Any]:
    """Export a checkpoint, and compare what the file computes with what the checkpoint does, on the whole test split.

    The file's graph maps images as the data module's loaders yield them, any number at a time, to logits, float
    (B, num_classes): what the data module does in ``on_after_batch_transfer`` is inside (MNIST's padding and
    normalisation: uint8 (B, 28, 28) goes in). A safetensors file has no graph but the net's weights.

    Args:
        path: A checkpoint.
        output: The file to write; it appears when it has passed, in place of one that is there.
        file_format: ``onnx``, ``pt2`` or ``safetensors``.
        overrides: Arguments of the data module that go before the run's; None keeps the run's.

    Returns:
        The metadata that the file holds, and ``checked`` (images compared), ``max_difference`` (of their logits),
        ``bytes``, ``milliseconds`` (the median time of an image alone, on one CPU thread).

    Raises:
        ConfigError: If the net cannot be exported, or the file computes something else.
    """
    import torch

    from src.engine.runs import build, report

    module = build.restore(path)
    datamodule = build.restore_datamodule(path, **overrides)
    datamodule.prepare_data()
    datamodule.setup("test")
    net = module.net.to(memory_format=torch.contiguous_format)  # what safetensors and torch.export.save want
    whole = with_preprocessing(net, datamodule)
    images = next(iter(datamodule.test_dataloader()))[0]
    example = images.new_zeros(2, *images.shape[1:])  # of a batch of 1 torch would make a constant
    with torch.no_grad():
        num_classes = whole(example).shape[1]
        hits = torch.cat([whole(images).argmax(dim=1) == labels for images, labels in datamodule.test_dataloader()])
    data = {key: value for key, value in datamodule.state_dict().items() if key != "loader"}
    inputs = preprocess(example, datamodule) if file_format == "safetensors" else example
    metadata = {
        "classes": list(range(num_classes)),
        "input": {"dtype": str(inputs.dtype).removeprefix("torch."), "shape": ["batch", *inputs.shape[1:]]},
        "accuracy": {"test/acc": hits.float().mean().item()},
        "data": data,
        "config": dict(module.hparams),
        "checkpoint": str(path),
        **report.environment(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}.{file_format}")
    try:
        try:
            WRITERS[file_format](whole, example, {key: json.dumps(value) for key, value in metadata.items()}, aside)
        except Exception as error:  # whatever the exporters raise; each says it in another way
            reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
            raise ConfigError(
                f"format={file_format}: {type(module.net).__name__} cannot be exported: {reason}"
            ) from error
        compute = LOADERS[file_format](aside, whole)
        difference = _compare(compute, whole, datamodule, file_format)
        facts = {"checked": len(hits), "max_difference": difference, "bytes": aside.stat().st_size}
        result = {**metadata, **facts, "milliseconds": _time(compute, example[:1])}
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    return result


def preprocess(images: "Tensor", datamodule: "LightningDataModule") -> "Tensor":
    """What the net is given, (B, C, H, W), for images as the data module's loaders yield them."""
    import torch

    batch = (images, torch.zeros(images.shape[0], dtype=torch.int64))  # it expects labels, too
    inputs: Tensor = datamodule.on_after_batch_transfer(batch, 0)[0]
    return inputs


def with_preprocessing(net: "nn.Module", datamodule: "LightningDataModule") -> "nn.Module":
    """The net behind its data module's preprocessing, in evaluation mode."""
    from torch import nn

    class WithPreprocessing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: "Tensor") -> "Tensor":
            logits: Tensor = self.net(preprocess(images, datamodule))
            return logits

    return WithPreprocessing().eval()


def _trace(whole: "nn.Module", example: "Tensor") -> Any:
    import torch

    with torch.no_grad():
        program = torch.export.export(whole, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where the source lies on this machine
    return program


def _write_onnx(whole: "nn.Module", example: "Tensor", metadata: Mapping[str, str], path: Path) -> None:
    import torch

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(_trace(whole, example), dynamo=True, verbose=False, **names)
    assert program is not None  # only where it writes a file itself
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _load_onnx(path: Path, whole: "nn.Module") -> "Callable[[Tensor], Tensor]":
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # see _time
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_pt2(whole: "nn.Module", example: "Tensor", metadata: Mapping[str, str], path: Path) -> None:
    import torch

    torch.export.save(_trace(whole, example), path, extra_files=dict(metadata))


def _load_pt2(path: Path, whole: "nn.Module") -> "Callable[[Tensor], Tensor]":
    import torch

    loaded: Any = torch.export.load(path).module()
    return loaded  # type: ignore[no-any-return]


def _write_safetensors(whole: "nn.Module", example: "Tensor", metadata: Mapping[str, str], path: Path) -> None:
    from safetensors.torch import save_model

    save_model(whole.get_submodule("net"), str(path), dict(metadata))


def _load_safetensors(path: Path, whole: "nn.Module") -> "Callable[[Tensor], Tensor]":
    from safetensors.torch import load_model

    loaded = copy.deepcopy(whole)
    for values in loaded.state_dict().values():
        values.zero_()  # what the file lacks shall be missed
    load_model(loaded.get_submodule("net"), path)
    return loaded


WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "safetensors": _write_safetensors}
LOADERS = {"onnx": _load_onnx, "pt2": _load_pt2, "safetensors": _load_safetensors}


def _compare(
    compute: "Callable[[Tensor], Tensor]", whole: "nn.Module", datamodule: "LightningDataModule", file_format: str
) -> float:
    """The largest difference of a logit on the test split, within TOLERANCE and with the same classes."""
    import torch

    largest = 0.0
    with torch.no_grad():
        for images, _ in datamodule.test_dataloader():
            expected, found = whole(images), compute(images.contiguous())
            differing = int((expected.argmax(dim=1) != found.argmax(dim=1)).sum())
            difference = (expected - found).abs().max().item()
            if differing or not difference <= TOLERANCE:  # nor is NaN
                raise ConfigError(
                    f"format={file_format}: the file computes something else than the checkpoint ({differing} of "
                    f"{len(images)} classes differ, logits by up to {difference:.1g}; expected 0 and {TOLERANCE:.0e}); "
                    "nothing was written; choose another format"
                )
            largest = max(largest, difference)
    return largest


def _time(compute: "Callable[[Tensor], Tensor]", image: "Tensor") -> float:
    """Median milliseconds of an image, (1, ...), alone; on one thread, since several wait for each other."""
    import torch

    seconds: list[float] = []
    begin, num_threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        while len(seconds) < NUM_TIMED and time.perf_counter() - begin < MAX_SECONDS:
            start = time.perf_counter()
            compute(image)
            seconds.append(time.perf_counter() - start)
    torch.set_num_threads(num_threads)
    return 1000 * statistics.median(seconds)


def export(cfg: DictConfig) -> dict[str, Any]:
    """Export as ``conf/export.yaml`` says, and show what came out.

    Returns:
        What ``export_checkpoint`` does.
    """
    from src.engine.runs import report

    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output = Path(cfg.output or Path(cfg.output_dir) / f"model.{cfg.format}")
    result = export_checkpoint(path, output, cfg.format, root=cfg.data.root, eval_batch_size=cfg.data.batch_size)
    OmegaConf.save(cfg, Path(cfg.output_dir) / "config.yaml", resolve=True)
    shape = ", ".join(map(str, result["input"]["shape"]))
    same = f"same classes on {result['checked']:,} test images, logits within {result['max_difference']:.1g}"
    report.print_table(
        "exported",
        {
            "checkpoint": report.shown(path),
            "input": f"{result['input']['dtype']} ({shape})",
            "output": f"logits (batch, {len(result['classes'])})",
            **result["accuracy"],
            "compared": same,
            "size": f"{result['bytes']:,} bytes",
            "latency": f"{result['milliseconds']:.3f} ms, an image alone on one CPU thread",
            "written to": report.shown(output),
        },
    )
    return result


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Export as the command line says."""
    with short_errors(cfg):
        export(cfg)


if __name__ == "__main__":
    run(main, "export")
