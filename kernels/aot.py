"""``Variant``: one way a Triton kernel is compiled, declared beside it, so that a gate can compile it without a device.

Each ``<op>/triton_kernel.py`` ends with ``AOT``, a list of these: every kernel, dtype and tuned configuration once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel, the types of its arguments that are no constants, in order, and its constants and options.

    ``types`` holds words such as ``*bf16 *fp32 i32 i64 fp32``. Pointers count as divisible by 16, as torch's are;
    ``i32:16`` says that of a number, ``*bf16:1`` takes it back from a pointer. A None argument is a constant.
    """

    kernel: Any  # a @triton.jit function
    types: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion
    label: str = ""  # instead of the types, constants and options, where they are many
    least: int = 80  # compute capability, as sm_80 has it in its name

    @property
    def name(self) -> str:
        """What the committed table calls it; unique within an operation."""
        settings = {**self.constants, **{k: v for k, v in self.options.items() if k != "enable_fp_fusion"}}
        words = [self.types, *(f"{key}={value}" for key, value in settings.items())]
        return f"{self.kernel.__name__}: {self.label or ', '.join(words)}"

    def signature(self) -> dict[str, str]:
        """Every argument of the kernel -> its Triton type, constants included. Raises ValueError for a wrong count."""
        left = [name for name in self.kernel.arg_names if name not in self.constants]
        words = self.types.split()
        if len(left) != len(words) or len(left) + len(self.constants) != len(self.kernel.arg_names):
            raise ValueError(f"{self.name}: types must be one for each of = {', '.join(left)}, got {self.types!r}")
        types = dict(zip(left, (word.partition(":")[0] for word in words), strict=True))
        return {name: types.get(name, "constexpr") for name in self.kernel.arg_names}

    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What Triton may take for granted of each argument."""
        left = [name for name in self.kernel.arg_names if name not in self.constants]
        found = {}
        for name, word in zip(left, self.types.split(), strict=True):
            _, _, divisor = word.partition(":")
            if (divisor or ("16" if word.startswith("*") else "1")) == "16":
                found[(self.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
        return found
