"""ONNX Runtime on the CPU: the network exported by torch, float32 (it has no bf16 convolution there)."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idm_fast.bench.peers import Built
from idm_fast.bench.plain import example, plain
from idm_fast.bench.workload import Workload


def onnxruntime(workload: Workload, dtype: str, threads: int) -> Built:
    """All graph optimisations, sequential, ``threads`` threads, buffers bound once."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file = export(workload, Path(folder) / "network.onnx")
        # Its threads spin while they wait for work. Within a run that is its right; after it, it slows whoever is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        nodes = _nodes(Path(options.optimized_model_filepath))
    names = [each.name for each in session.get_inputs()]
    out = torch.empty(tuple(session.get_outputs()[0].shape))
    t = torch.zeros(workload.batch)
    x_in = torch.empty_like(workload.start, memory_format=torch.contiguous_format)
    tensors = [x_in, t] if workload.cond is None else [x_in, t, workload.cond.contiguous()]
    binding = session.io_binding()
    for name, tensor in zip(names, tensors, strict=True):
        binding.bind_input(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, "float32", tuple(out.shape), out.data_ptr())

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        tensors[0].copy_(x)  # NHWC to the NCHW that it wants
        t.copy_(time)
        session.run_with_iobinding(binding)
        return workload.image_channels(out.contiguous(memory_format=torch.channels_last))

    return Built(denoise, None, nodes, f"ONNX Runtime {ort.__version__}")


def export(workload: Workload, file: Path) -> Path:
    """The plain network as an ONNX file with static shapes."""
    network = plain(workload.model)
    inputs = example(workload.model, workload.batch, *workload.size, torch.float32)
    inputs = tuple(each.contiguous() for each in inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        torch.onnx.export(
            network, inputs, str(file), dynamo=True, verbose=False,
            input_names=["x", "t", "cond"][: len(inputs)], output_names=["out"],
        )  # fmt: skip
    return file


def _nodes(file: Path) -> int | None:
    """Nodes of the graph as it runs, after the runtime's fusions."""
    import onnx

    try:
        found: Any = onnx.load(str(file), load_external_data=False)
    except (OSError, ValueError):
        return None
    return len(found.graph.node)
