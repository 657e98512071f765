"""What is timed, and how its results are judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from idm_fast.bench import workload
from idm_fast.bench.workload import psnr
from idm_fast.errors import IdmFastError


def test_psnr() -> None:
    x = torch.zeros(1, 3, 4, 4)
    assert psnr(x, x) == workload.PSNR_MOST
    assert psnr(x + 0.2, x) == pytest.approx(20, abs=1e-4)  # of a range of 2
    for bad in (torch.nan, torch.inf):
        with pytest.raises(IdmFastError, match="its result is not finite"):
            psnr(x + bad, x)


def test_a_file_is_trained_whatever_its_name(tiny_model: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(tiny_model, tmp_path / "random-crops.safetensors"))
    work = workload.workload(str(file), steps=2)
    assert work.weights == "random-crops"
    assert work.trained
    assert (work.table.rows[:, 6] == 1).all()  # the clamp
    drawn = workload.workload("idm-64", size=16, steps=2)
    assert not drawn.trained
    assert (drawn.table.rows[:, 6] == 0).all()
