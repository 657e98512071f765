"""The peer written as the public repositories write their network: the same numbers by other calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from idm_fast.bench import rows, workload
from idm_fast.bench.peers import PEERS
from idm_fast.bench.workload import psnr
from idm_fast.checkpoints import native
from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

GUIDED = UNetConfig(
    image_size=32, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), attention_levels=(1,),
    out_channels=6, num_head_channels=32, qkv_order="heads_qkv",
)  # fmt: skip
SR3 = UNetConfig(
    image_size=32, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), attention_levels=(1,),
    cond_channels=3, concat_order="cond_x", embedding_order="sin_cos", embed_channels=32, embed_silu=False,
    use_scale_shift_norm=False, qkv_bias=False, norm_groups=16,
)  # fmt: skip


def test_float32_is_judged_by_what_another_order_of_sums_reaches(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 M parameters lose 10 dB more than our small networks do, whoever adds them up."""
    work = workload.workload(str(tiny_model), steps=2)
    asked, truth = rows.Asked(["fp32"]), torch.zeros(1)
    monkeypatch.setattr(type(work), "psnr", lambda self, result, truth: 99.0)
    rows._judge(work, "fp32", 93.5, truth, asked)
    with pytest.raises(IdmFastError, match=r"PSNR to fp32 must be >= 93\.0 dB, got 92\.5"):
        rows._judge(work, "fp32", 92.5, truth, asked)
    monkeypatch.setattr(type(work), "psnr", lambda self, result, truth: 140.0)
    with pytest.raises(IdmFastError, match=r"PSNR to fp32 must be >= 110\.0 dB, got 109\.0"):
        rows._judge(work, "fp32", 109.0, truth, asked)


@pytest.mark.parametrize("unet", [GUIDED, SR3], ids=["guided", "sr3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_public_style_computes_the_same(unet: UNetConfig, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = UNet(unet)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter)
    path = tmp_path / "small.safetensors"
    native.save(path, module, ModelConfig("small", unet, DiffusionConfig(), "ddpm"), {}, torch.float32)
    work = workload.workload(str(path), steps=3)
    (one,) = [each for each in PEERS if each.name == "public"]
    (eager,) = [each for each in PEERS if each.name == "eager"]
    assert one.runs_at([dtype], torch.device("cpu")) == [dtype]
    with torch.no_grad():
        truth = eager.build(work, "fp32", 1)
        expected = work.run(truth.denoise, truth.network_dtype)
        made = one.build(work, dtype, 1)
        got = work.run(made.denoise, made.network_dtype)
    assert psnr(got, expected) > (100 if dtype == "fp32" else 25)
    assert made.launches is not None
    assert truth.launches is not None
    assert made.launches > truth.launches
    out = made.denoise(work.start.to(work.start.dtype if dtype == "fp32" else torch.bfloat16), work.table.times(1)[0])
    assert out.shape == work.start.shape
