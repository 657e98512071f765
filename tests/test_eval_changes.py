"""How subjects differ face by face, and with whom each is compared."""

from __future__ import annotations

import math

import pytest
import torch

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.changes import changes, compared
from idm_fast.evaluation.report import FD, Report, Row, Subject


def test_a_change_is_told_face_by_face() -> None:
    """Faces differ by far more than the subjects do: of the means alone nobody could tell them apart."""
    generator = torch.Generator().manual_seed(0)
    before = {"psnr": 25 + 4 * torch.randn(40, generator=generator), FD: torch.randn(40, 3, generator=generator)}
    now = {"psnr": before["psnr"] + 0.2 + 0.1 * torch.randn(40, generator=generator), FD: before[FD] + 1}
    now["psnr"][7] = math.nan  # counts in neither
    clean = {FD: before[FD] + 2}
    found = changes(now, before, clean, 0)
    keep = torch.arange(40) != 7
    assert found["psnr"].mean == pytest.approx(float((now["psnr"] - before["psnr"])[keep].double().mean()), rel=1e-6)
    assert 0.1 < found["psnr"].low < 0.2 < found["psnr"].high < 0.3
    assert found[FD].mean == pytest.approx(-75, abs=1e-4)  # half as far away, in each of three directions
    conditions = {"reference": "-", "faces": 40, "crop_px": 128, "degradation_version": 1, "seed": 0, "intervals": "-"}
    text = Report(conditions, [], {"old": [Row("mild", "new", 1, found, pictures=40, pairs=40)]}).as_markdown()
    assert "Change from old on the same faces" in text
    assert f"| mild | new | 1 | {found['psnr'].mean:+.2f} [" in text
    assert "| FD-VGG % ↓ |" in text


def test_what_a_subject_is_compared_with() -> None:
    def named(*items: tuple[str, int | None]) -> list[Subject]:
        return [Subject(name, lambda y, seeds: y, steps) for name, steps in items]

    assert compared(named(("input", None), ("a", 1), ("a", 4), ("b", 1), ("b", 4)), "a") == [(3, 1), (4, 2)]
    assert compared(named(("input", None), ("a", 1), ("a", 4)), "input") == [(1, 0), (2, 0)]
    with pytest.raises(IdmFastError, match="--against must be a row with others of its steps and sampler, got 'a' = 2"):
        compared(named(("input", None), ("a", 1), ("a", 4)), "a")
    with pytest.raises(IdmFastError, match="--against must be one of 'input', 'a', got 'c'"):
        compared(named(("input", None), ("a", 1)), "c")
