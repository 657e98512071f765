"""What converting a full-size public file costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idm_fast.checkpoints import guided_keys
from idm_fast.checkpoints.format import modules_to_names
from idm_fast.config import preset
from idm_fast.models.unet import UNet

_MEASURED = """
import json, sys, time
from idm_fast import checkpoints
def resident(which):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(which)) * 1024
before, start = resident("VmRSS"), time.process_time()
checkpoints.convert(sys.argv[1], sys.argv[2])
most = resident("VmHWM")  # getrusage would give the parent's where that was larger
print(json.dumps({"memory": most - before, "seconds": time.process_time() - start}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
def test_a_file_of_difface_takes_seconds_and_less_than_twice_its_size(tmp_path: Path) -> None:
    unet, tensors = UNet(preset("difface-512").unet), {}
    state = unet.state_dict()
    for ours, (theirs,) in modules_to_names(unet, guided_keys.modules(unet)).items():
        flat = ours.endswith(("qkv.weight", "attention.out.weight"))
        tensors[f"module.{theirs}"] = state[ours].squeeze(-1) if flat else state[ours]
    assert (len(tensors), sum(tensor.numel() for tensor in tensors.values()) // 100_000) == (630, 1597)
    source, out = tmp_path / "difface.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": tensors}, source)
    size = source.stat().st_size
    command = [sys.executable, "-c", _MEASURED, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    print(f"{cost['memory'] / size:.2f} of the file's size, {cost['seconds']:.1f} s of processor time")
    assert out.stat().st_size == pytest.approx(size, rel=0.01)
    assert cost["memory"] < 2 * size
    assert cost["seconds"] < 10
    source.unlink()  # pytest keeps the folders of some runs
    out.unlink()
