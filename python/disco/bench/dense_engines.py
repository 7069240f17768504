"""The whole dense model in other people's engines, each with its best settings for few threads.

A maker takes a model in `eval()` mode, an example input and a private folder, and returns the
function to call. It uses as many threads as `torch.get_num_threads()`. Shapes are fixed to the
example's wherever an engine gains by that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Engine:
    """A model ready to run. `threads` is what the engine itself says that it uses."""

    function: Callable[..., Any]
    threads: int


Maker = Callable[[nn.Module, Tensor, str], Engine]


def make_eager(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """torch as it is."""
    return Engine(model, torch.get_num_threads())


def make_channels_last(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """torch with weights and activations in channels-last order."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Engine(
        lambda x: model(x.contiguous(memory_format=torch.channels_last)), torch.get_num_threads()
    )


def make_inductor(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """`torch.compile` with the weights frozen: batch norms folded, weights packed for oneDNN."""
    config: Any = importlib.import_module("torch._inductor.config")
    config.freezing = True
    # No pool of compiler processes that would stay beside the measurements.
    config.compile_threads = 1
    compiled = torch.compile(model, dynamic=False)
    with torch.inference_mode():
        compiled(example)
    return Engine(compiled, torch.get_num_threads())


def make_onnxruntime(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """ONNX Runtime in float32: all graph optimisations, one operator at a time."""
    return _run_onnxruntime(_export(model, example, folder))


def make_onnxruntime_int8(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """ONNX Runtime with 8-bit integers, quantised by its own tool (`_quantised`)."""
    return _run_onnxruntime(_quantised(model, example, folder))


def _run_onnxruntime(path: str) -> Engine:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {"x": x.numpy()})]

    return Engine(run, session.get_session_options().intra_op_num_threads)


def make_openvino(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """OpenVINO in float32, compiled for latency: one stream with all threads."""
    return _run_openvino(_export(model, example, folder), "f32")


def make_openvino_bf16(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """OpenVINO with bfloat16 products and activations; inputs and outputs are float32."""
    return _run_openvino(_export(model, example, folder), "bf16")


def make_openvino_int8(model: nn.Module, example: Tensor, folder: str) -> Engine:
    """OpenVINO with 8-bit integers, the same quantised model as ONNX Runtime's, else bfloat16."""
    return _run_openvino(_quantised(model, example, folder), "bf16")


def _run_openvino(path: str, precision: str) -> Engine:
    core = importlib.import_module("openvino").Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        # Without it, CPUs with bf16 would compute in that.
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    compiled = core.compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> list[Tensor]:
        values = request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(value) for value in values.to_tuple()]

    return Engine(run, int(compiled.get_property("INFERENCE_NUM_THREADS")))


MAKERS: dict[str, Maker] = {
    "eager": make_eager,
    "channels_last": make_channels_last,
    "inductor": make_inductor,
    "onnxruntime": make_onnxruntime,
    "openvino": make_openvino,
    "openvino_bf16": make_openvino_bf16,
    "onnxruntime_int8": make_onnxruntime_int8,
    "openvino_int8": make_openvino_int8,
}

_PACKAGES = {
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "openvino_bf16": ("onnx", "openvino"),
    "onnxruntime_int8": ("onnx", "onnxruntime"),
    "openvino_int8": ("onnx", "onnxruntime", "openvino"),
}


def why_missing(kind: str) -> str | None:
    """What an engine lacks here, in words, or None if it can run."""
    packages = _PACKAGES.get(kind, ())
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: install them with `pip install '.[bench]'`"
    compiler = os.environ.get("CXX", "g++")
    if kind == "inductor" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return None


def _export(model: nn.Module, example: Tensor, folder: str) -> str:
    """The model as an ONNX file with the example's shapes.

    By TorchScript, because torch's newer exporter asks for another package.
    """
    path = os.path.join(folder, "model.onnx")
    torch.onnx.export(model, (example,), path, dynamo=False, opset_version=17, input_names=["x"])
    return path


def _quantised(model: nn.Module, example: Tensor, folder: str) -> str:
    """The model as an ONNX file that multiplies 8-bit integers, by ONNX Runtime's static tool.

    As `disco.compile` does it: weights signed with a scale a channel, activations unsigned with one
    a tensor, from the least and largest values that the example gives. Sums are not halved
    ("reduced range"): CPUs with AVX-512-VNNI add them in 32 bits.
    """
    tool: Any = importlib.import_module("onnxruntime.quantization")
    preparation: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    given = iter([{"x": example.numpy()}])

    class Reader(tool.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(given, None)

    plain, prepared = _export(model, example, folder), os.path.join(folder, "prepared.onnx")
    preparation.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    path = os.path.join(folder, "int8.onnx")
    tool.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=tool.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tool.QuantType.QUInt8,
        weight_type=tool.QuantType.QInt8,
        calibrate_method=tool.CalibrationMethod.MinMax,
    )
    return path
