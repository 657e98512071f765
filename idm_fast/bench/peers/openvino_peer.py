"""OpenVINO on the CPU, as fast as its own options make it: one stream, static shape, the asked inference precision.

The network is converted from torch's own export with its shape fixed; a trace or an ONNX file came out as the same
nodes, and as fast. One request is reused; its inputs and output are
our own channels-last float32 buffers, bound once, so nothing is copied between steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from idm_fast.bench.peers import Built
from idm_fast.bench.plain import example, plain
from idm_fast.bench.workload import Workload

NO_WORK = ("Const", "Input", "Output", "Reshape")  # the last is a view
PRECISION = {"fp32": "f32", "bf16": "bf16"}


def openvino(workload: Workload, dtype: str, threads: int) -> Built:
    import openvino as ov

    compiled = compile_model(ov, workload, dtype, threads)
    request = compiled.create_infer_request()
    x_name, t_name, *cond_name = [port.get_any_name() for port in compiled.inputs]

    t = torch.zeros(workload.batch)
    out = torch.empty(tuple(compiled.output(0).shape))  # [N, H, W, C]
    request.set_tensor(t_name, ov.Tensor(t.numpy(), shared_memory=True))
    request.set_output_tensor(0, ov.Tensor(out.numpy(), shared_memory=True))
    if cond_name:
        assert workload.cond is not None
        request.set_tensor(cond_name[0], ov.Tensor(_nhwc(workload.cond), shared_memory=True))
    bound: list[Tensor] = []

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        if not bound or bound[0] is not x:
            request.set_tensor(x_name, ov.Tensor(_nhwc(x), shared_memory=True))
            bound[:] = [x]
        t.copy_(time)
        request.infer()
        return workload.image_channels(out.permute(0, 3, 1, 2))

    return Built(denoise, None, len(_executed(compiled)), f"OpenVINO {ov.__version__.split('-')[0]}")


def compile_model(ov: Any, workload: Workload, dtype: str, threads: int) -> Any:
    """Inputs and output NHWC in memory, the network NCHW as it was exported: the reorder is the plugin's."""
    network = plain(workload.model)
    inputs = example(workload.model, workload.batch, *workload.size, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        model = ov.convert_model(torch.export.export(network, inputs))
    model.reshape(dict(zip(model.inputs, [list(each.shape) for each in inputs], strict=True)))
    layout = ov.preprocess.PrePostProcessor(model)
    for i, each in enumerate(inputs):
        layout.input(i).tensor().set_element_type(ov.Type.f32)
        if each.ndim == 4:
            layout.input(i).tensor().set_layout(ov.Layout("NHWC"))
            layout.input(i).model().set_layout(ov.Layout("NCHW"))
    layout.output(0).tensor().set_element_type(ov.Type.f32).set_layout(ov.Layout("NHWC"))
    layout.output(0).model().set_layout(ov.Layout("NCHW"))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": PRECISION[dtype],
    }
    return ov.Core().compile_model(layout.build(), "CPU", options)


def _executed(compiled: Any) -> list[Any]:
    """Nodes of the network as it runs, after the plugin's fusions, without constants and mere views."""
    found: list[Any] = compiled.get_runtime_model().get_ops()
    return [op for op in found if op.get_rt_info()["layerType"].astype(str) not in NO_WORK]


def _nhwc(x: Tensor) -> Any:
    return x.float().permute(0, 2, 3, 1).contiguous().numpy()
