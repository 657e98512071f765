"""Settings of the whole test run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from idm_fast.clean import CleanOptions, CleanSummary

# Triton reads this when it decorates a kernel, so it must be set before anything imports triton. On a machine with a
# CUDA device the kernels run there instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def device_is_lost() -> bool:
    """Whether an error of a kernel has left the CUDA context of this process unusable."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


lost_by: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and not lost_by and device_is_lost():
        lost_by.append(item.nodeid)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logfinish() -> None:
    """After an illegal access every later test of the process would fail too: the one that did it is the only news."""
    if not lost_by:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)  # pytest-xdist starts another worker for the rest
    pytest.exit(f"the CUDA context is lost after {lost_by[0]}", returncode=3)


@pytest.fixture
def no_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that starts pytest: it must not take itself for a worker of pytest-xdist."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test pictures that lies beside the checkout; a test that needs it skips where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the test pictures in ../shared/data, which are not part of the repository")
    return folder


@pytest.fixture
def made_up_faces(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``train`` and then ``val`` coarse patterns of ``side`` pixels, their table and the folder of both."""

    def write(train: int, val: int, side: int, native_px: Callable[[int], int] = lambda i: 200) -> Path:
        folder = tmp_path / "faces"
        folder.mkdir()
        rng = np.random.default_rng(0)
        rows = ["file,split,native_px"]
        for i in range(train + val):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
            rows.append(f"{i}.png,{'train' if i < train else 'val'},{native_px(i)}")
        (folder / "faces.csv").write_text("\n".join(rows) + "\n")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a 32-px restorer that has learnt nothing and is fast: for what is not about the result."""
    # Imported here: they import triton, which must see the variable above.
    from idm_fast.checkpoints import native
    from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
    from idm_fast.models.unet import UNet

    unet = UNetConfig(
        image_size=32, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, unshuffle=2,
        residual=True, norm_groups=4, num_head_channels=16, embed_channels=32,
    )  # fmt: skip
    config = ModelConfig("tiny", unet, DiffusionConfig("cosine_continuous", "x0"), steps=3)
    torch.manual_seed(0)
    module = UNet(unet)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
        module.out_conv.weight.mul_(0.3)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    native.save(path, module, config, {}, torch.float32)
    return path


ROOT = Path(__file__).resolve().parents[1]


def build(source: Path, folder: Path, target: str, *options: str) -> Path:
    """Builds a native module with CMake where its sources have changed. Skips where there is no compiler."""
    pybind11 = pytest.importorskip("pybind11")
    tools = {}
    for name, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        module = pytest.importorskip(name)
        tools[name] = str(Path(getattr(module, attribute)) / name)
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler found: c++ (or what CXX names)")
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        tools["cmake"], f"-S{source}", f"-B{folder}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    for command in (configure, [tools["cmake"], "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder / f"{target}.so"


def load(name: str, path: Path) -> ModuleType:
    """The module in the file ``path``, whatever else has its name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


CUDA_ON_CPU = ROOT / "csrc" / "common" / "cuda_on_cpu"


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The CUDA kernels compiled for the CPU: what ``_C`` is on a machine with a GPU, for CPU tensors."""
    return load("_E", build(CUDA_ON_CPU, ROOT / "build" / "cuda_on_cpu", "_E"))


@contextmanager
def cuda_rows_on_cpu(emulator: ModuleType) -> Iterator[None]:
    """Every operation's CUDA row runs on the CPU: a copy of its Python side that got the emulator for ``_C``."""
    from idm_fast.kernels import extension
    from idm_fast.ops import OPS

    with ExitStack() as stack:
        extension.cuda_stand_in = emulator
        try:
            for op in OPS.values():
                if (row := op.backends.get("cuda")) is None:
                    continue
                name, _, function = row.function.partition(":")
                spec = importlib.util.find_spec(name)
                assert spec is not None
                copy = load(f"{name}_on_cpu", Path(str(spec.origin)))
                stack.callback(sys.modules.pop, copy.__name__)
                there = replace(row, function=f"{copy.__name__}:{function}", devices=frozenset({"cpu"}))
                stack.enter_context(op.substituted(there))
        finally:
            extension.cuda_stand_in = None
        yield


@pytest.fixture(scope="session")
def emulated_rows() -> Callable[[ModuleType], AbstractContextManager[None]]:
    return cuda_rows_on_cpu


@pytest.fixture(scope="session")
def build_module() -> Callable[..., Path]:
    return build


@pytest.fixture(scope="session")
def load_file() -> Callable[[str, Path], ModuleType]:
    return load


class Cleaning:
    """Runs of the data-set cleaner over eleven aligned crops of 48 px, in two folders; two are the same bytes."""

    def __init__(self, folder: Path, model: Path) -> None:
        from idm_fast.clean import CleanOptions

        self.folder, self.model, self.source, self.out = folder, model, folder / "in", folder / "out"
        self.free = CleanOptions(steps=1, max_identity_distance=None, max_low_frequency=None, batch_size=4)
        (self.source / "deeper").mkdir(parents=True)
        for number in range(9):
            self.crop(number).save(self.source / f"{number}.jpg", quality=95)
        self.crop(9).save(self.source / "deeper" / "9.png")
        shutil.copy(self.source / "3.jpg", self.source / "deeper" / "again.jpg")

    def run(self, options: CleanOptions | None = None, out: str = "out", **more: Any) -> CleanSummary:
        from idm_fast.clean import clean

        return clean(self.source, self.folder / out, self.model, options or self.free, **more)

    def free_but(self, **changed: Any) -> CleanOptions:
        """Options without bounds, some of them changed."""
        return replace(self.free, **changed)

    @staticmethod
    def crop(seed: int, side: int = 48) -> Image.Image:
        """A smooth picture of its own."""
        coarse = np.random.default_rng(seed).integers(40, 216, (6, 6, 3)).astype(np.uint8)
        return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)

    def records(self, out: str = "out") -> dict[str, dict[str, Any]]:
        from idm_fast.clean import manifest

        return {record["file"]: record for record in manifest.scan(self.folder / out / "clean.jsonl")}

    def pictures(self, folder: str = "out") -> dict[str, bytes]:
        """The bytes of every picture of a folder, by name."""
        root = self.folder / folder
        files = [path for path in root.rglob("*") if path.is_file() and path.suffix in (".png", ".jpg", ".bmp")]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def cleaning(tmp_path: Path, tiny_model: Path) -> Cleaning:
    return Cleaning(tmp_path, tiny_model)
