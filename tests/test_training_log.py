"""The tables that training runs keep."""

from __future__ import annotations

from pathlib import Path

from idm_fast.training.log import put_row


def test_figures_may_come_and_go(tmp_path: Path) -> None:
    """Those of a package that was not installed all the time; and lines of steps that are made again go."""
    for step, figures in (
        (1, {"psnr": 20.0}),
        (2, {"psnr": 21.0, "lpips": 0.5}),
        (4, {"psnr": 9.0}),
        (3, {"psnr": 22.0}),
    ):
        put_row(tmp_path / "figures.csv", step, figures)
    assert (tmp_path / "figures.csv").read_text().split() == ["step,psnr,lpips", "1,20.0,", "2,21.0,0.5", "3,22.0,"]
