"""Writes a module into a file that needs nothing of this project, and compares what the file computes."""

import copy
import inspect
import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from src.engine.errors import ConfigError
from src.engine.runs import report
from src.engine.runs.build import preprocess
from src.engine.runs.origin import environment
from src.engine.runs.record import describe_data

Compute = Callable[..., Any]  # from input tensors to outputs, nested in any way
Inputs = tuple[Tensor, ...]
Batches = Iterable[tuple[Inputs, Any]]
TOLERANCE = 1e-4  # |found - expected| <= TOLERANCE (1 + |expected|)


class Graph(nn.Module):
    """What is exported: a module behind what its inputs go through before.

    Args:
        module: The module.
        names: Of the inputs, as its ``forward`` has them.
        example: Inputs of two samples: of a batch of one torch would make a constant.
        adapt: From inputs, in order, to those of ``forward``, by name.
        batches: Makes the inputs to compare on, each with their labels, None without.
    """

    def __init__(
        self, module: nn.Module, names: list[str], example: Inputs, adapt: Compute, batches: Callable[[], Batches]
    ) -> None:
        super().__init__()
        self.module, self.names, self.example, self.adapt, self.batches = module, names, example, adapt, batches

    def forward(self, *inputs: Tensor) -> Any:
        """What the module returns."""
        return self.module(**self.adapt(*inputs))


def export_module(
    module: Any, datamodule: Any, output: Path, file_format: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Export a module, and compare what the file computes with what the module does, on the whole test split.

    The file's graph maps inputs as the data module's loaders yield them, any number at a time, to what the module's
    ``forward`` returns: what the data module does in ``on_after_batch_transfer`` is inside (MNIST's padding and
    normalisation: uint8 (B, 28, 28) goes in). Where the first part of a batch is not what ``forward`` takes, inputs are
    as in the module's ``example_input_array``. A safetensors file has no graph but the weights.

    Args:
        module: In evaluation mode, on the CPU.
        datamodule: Its data; None without.
        output: The file to write, once its content has passed, in place of one that is there.
        file_format: ``onnx``, ``pt2`` or ``safetensors``.
        facts: What else the file's metadata say.

    Returns:
        The metadata that the file holds, and ``checked`` (samples compared), ``bytes``, ``milliseconds`` (the median
        time of one sample on one CPU thread). Of a classifier, a module with ``num_classes`` whose outputs are
        (B, num_classes), the metadata have ``classes`` and ``accuracy``, too.

    Raises:
        ConfigError: If the module cannot be exported, or the file computes something else.
    """
    module = module.to(memory_format=torch.contiguous_format)  # what safetensors and pt2 files hold
    graph = make_graph(module, datamodule)
    try:
        with torch.no_grad():
            outputs = find_tensors(graph(*graph.example))
    except Exception as error:  # whatever your forward raises
        given = ", ".join(map(describe, graph.example))
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = "set example_input_array in its constructor to tensors that it takes"
        raise ConfigError(f"{type(module).__name__}: its forward fails on {given} ({reason}); {remedy}") from error
    is_classifier = [values.shape[1:] for values in outputs] == [(getattr(module, "num_classes", None),)]
    names = ["logits" if is_classifier else "output"]
    if len(outputs) != 1:
        names = [f"output_{index}" for index in range(len(outputs))]
    inputs = graph.adapt(*graph.example).values() if file_format == "safetensors" else graph.example
    metadata: dict[str, Any] = {
        "inputs": dict(zip(graph.names, map(describe, inputs), strict=True)),
        "outputs": dict(zip(names, map(describe, outputs), strict=True)),
        "data": describe_data(datamodule),
        **facts,
        **environment(),
    }
    if is_classifier:
        metadata["classes"] = list(getattr(datamodule, "classes", None) or range(outputs[0].shape[1]))
        metadata["accuracy"] = measure_accuracy(graph)
    try:
        texts = {key: json.dumps(value, default=str) for key, value in metadata.items()}
        content, compute = WRITERS[file_format](graph, names, texts)
    except Exception as error:  # whatever the exporters raise; each says it in another way
        text = re.sub(r"\x1b\[\d*m", "", str(error)).strip()  # without colours
        reason = text.split("\n")[0] or type(error).__name__
        raise ConfigError(f"format={file_format}: {type(module).__name__} cannot be exported: {reason}") from error
    checked = compare(compute, graph, file_format)
    output.parent.mkdir(parents=True, exist_ok=True)
    report.write_bytes(output, content)
    milliseconds = measure_time(compute, tuple(values[:1] for values in graph.example))
    return {**metadata, "checked": checked, "bytes": len(content), "milliseconds": milliseconds}


def make_graph(module: Any, datamodule: Any) -> Graph:
    """What is exported of a module: from what the test loader yields, or else from ``example_input_array``.

    Raises:
        ConfigError: If ``forward`` takes neither, or there is none.
    """
    if not is_overridden("forward", module):
        raise ConfigError(f"{type(module).__name__} has no forward: there is nothing to export")

    def read_batches() -> Iterator[tuple[Inputs, Any]]:
        for batch in chain.from_iterable(CombinedLoader(datamodule.test_dataloader()).flattened):
            inputs, labels, *_ = [*batch, None] if isinstance(batch, list | tuple) else [batch, None]
            yield (inputs,), labels

    def adapt(inputs: Tensor) -> dict[str, Tensor]:
        return {names[0]: preprocess(inputs, datamodule)}

    names = list(inspect.signature(module.forward).parameters)
    own: Any = module.example_input_array
    if datamodule and is_overridden("test_dataloader", datamodule):
        datamodule.prepare_data()
        datamodule.setup("test")
        (inputs,), _ = next(iter(read_batches()))
        if isinstance(inputs, Tensor):
            example = inputs.new_zeros(2, *inputs.shape[1:])
            if own is None or (isinstance(own, Tensor) and own.shape[1:] == adapt(example)[names[0]].shape[1:]):
                return Graph(module, names[:1], (example,), adapt, read_batches).eval()
    if own is None:
        raise ConfigError(
            f"{type(module).__name__}: what its forward takes is not known, as its data's batches are no pairs of "
            "inputs and labels; set example_input_array in its constructor"
        )
    named = own if isinstance(own, dict) else dict(zip(names, own if isinstance(own, tuple) else [own], strict=False))
    two, three = (tuple(torch.cat([part] * count)[:count] for part in named.values()) for count in (2, 3))
    batches = [(tuple(named.values()), None), (three, None)]
    return Graph(
        module, list(named), two, lambda *inputs: dict(zip(named, inputs, strict=True)), lambda: batches
    ).eval()


def describe(values: Tensor) -> str:
    """A tensor's type and shape, whose first axis is the batch, as in ``uint8 (batch, 28, 28)``."""
    return f"{values.dtype} ({', '.join(map(str, ['batch', *values.shape[1:]]))})".removeprefix("torch.")


def find_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in what a module returns, in order."""
    found: list[Tensor] = []
    apply_to_collection(outputs, Tensor, found.append)
    return found


def measure_accuracy(graph: Graph) -> dict[str, float]:
    """A classifier's accuracy on the test split; nothing where batches do not have a class for each sample."""
    hits = count = 0
    for inputs, labels in graph.batches():
        if getattr(labels, "shape", None) != inputs[0].shape[:1]:
            return {}
        hits += int((graph(*inputs).argmax(dim=1) == labels).sum())
        count += len(labels)
    return {"test/acc": hits / count}


def trace(graph: Graph) -> Any:
    """The graph as torch.export makes it, without where its source lies on this machine."""
    batch = torch.export.Dim("batch", min=1)
    said: dict[str, Any] = {"args": graph.example, "dynamic_shapes": (tuple({0: batch} for _ in graph.example),)}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's is no operator of ONNX
    try:
        program = torch.export.export(graph, **said)
    except Exception:  # of len(inputs) it makes a constant; strict tracing does not, but knows less of Python
        program = torch.export.export(graph, **said, strict=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def write_onnx(graph: Graph, names: list[str], metadata: Mapping[str, str]) -> tuple[bytes, Compute]:
    """An ONNX file, whose outputs have names.

    Returns:
        The file's content and what it computes, as of the other formats.
    """
    import onnxruntime

    said: dict[str, Any] = {"input_names": graph.names, "output_names": names}
    said["dynamic_shapes"] = (({0: "batch"}, *({} for _ in graph.example[1:])),)  # as trace has them; one names all
    program = torch.onnx.export(trace(graph), dynamo=True, verbose=False, **said)
    assert program is not None  # only where it writes a file itself
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # see measure_time
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def compute(*inputs: Tensor) -> list[Tensor]:
        feed = {name: values.numpy() for name, values in zip(graph.names, inputs, strict=True)}
        return [torch.from_numpy(values) for values in session.run(None, feed)]

    return content, compute


def write_pt2(graph: Graph, names: list[str], metadata: Mapping[str, str]) -> tuple[bytes, Compute]:
    """A file for torch.export.load."""
    file = io.BytesIO()
    torch.export.save(trace(graph), file, extra_files=dict(metadata))
    return file.getvalue(), torch.export.load(file).module()


def write_safetensors(graph: Graph, names: list[str], metadata: Mapping[str, str]) -> tuple[bytes, Compute]:
    """The weights by their names in the net, or in the module if there are more than its net's."""
    from safetensors.torch import load, save

    weights = find_net(graph).state_dict()
    content = save({name: values.clone() for name, values in weights.items()}, dict(metadata))  # shared ones, too
    loaded = copy.deepcopy(graph)
    find_net(loaded).load_state_dict(load(content))
    return content, loaded


def find_net(graph: Graph) -> nn.Module:
    """The one submodule that has all weights, such as ``net``, or else the module."""
    module = graph.module
    parts = {name.partition(".")[0] for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return dict(module.named_children()).get(parts.pop(), module) if len(parts) == 1 else module


WRITERS = {"onnx": write_onnx, "pt2": write_pt2, "safetensors": write_safetensors}


def compare(compute: Compute, graph: Graph, file_format: str) -> int:
    """The number of samples of which the file's outputs and the module's were compared.

    Raises:
        ConfigError: If one is not within TOLERANCE.
    """
    checked = 0
    for inputs, _ in graph.batches():
        with torch.no_grad():
            expected = find_tensors(graph(*inputs))
            found = find_tensors(compute(*(values.contiguous() for values in inputs)))
        try:
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)  # nor is NaN close to NaN
        except AssertionError as error:
            raise ConfigError(
                f"format={file_format}: the file computes something else than the checkpoint: "
                f"{' '.join(str(error).split())}; nothing was written; choose another format"
            ) from error
        checked += len(inputs[0])
    return checked


def measure_time(compute: Compute, inputs: Inputs) -> float:
    """Median milliseconds of inputs, on one thread, since several wait for each other."""
    timer = Timer("compute(*inputs)", globals={"compute": compute, "inputs": inputs}, num_threads=1)
    number = max(1, round(0.05 / timer.timeit(10).mean))  # of a twentieth of a second
    return 1000 * statistics.median(timer.timeit(number).mean for _ in range(7))
