"""Runs the smallest case of every operation on the device, once a CUDA backend: what compute-sanitizer watches.

``python sanitized_gpu.py``; a script of test_gpu.py. Ends with "ran: N calls".
"""

from __future__ import annotations

import torch

from idm_fast.ops import OPS, BackendError, suite, use_backend


def main() -> None:
    calls = 0
    for name, op in OPS.items():
        cases = sorted(suite(name).cases, key=lambda case: case.bytes_moved(torch.float32) + case.flops)
        dtype = torch.float16 if torch.float16 in suite(name).dtypes else suite(name).dtypes[0]
        for backend in ("triton", "cuda"):
            if backend not in op.backends:
                continue
            for case in cases:  # the smallest that it takes
                print(f"{name} {case.name} {backend}", flush=True)
                try:
                    with use_backend(backend):
                        suite(name).call(case.inputs(dtype, "cuda"))
                except BackendError:
                    continue
                torch.cuda.synchronize()
                calls += 1
                break
    print(f"ran: {calls} calls")


if __name__ == "__main__":
    main()
