"""What one writes in torch: a matrix of distances and its argmin, in chunks of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.vq_nearest import positions

CHUNK_DISTANCES = 2**22  # 16 MiB of float32


def vq_nearest(z: Tensor, codebook: Tensor, codes: Tensor, quantised: Tensor) -> None:
    work = torch.promote_types(z.dtype, torch.float32)
    book = codebook.to(work)
    squares = book.square().sum(dim=1)
    flat_codes = codes.view(-1)
    for begin in range(0, flat_codes.shape[0], step := max(1, CHUNK_DISTANCES // book.shape[0])):
        rows = positions(z)[begin : begin + step].to(work)
        distances = torch.addmm(squares, rows, book.T, alpha=-2)
        distances = distances.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        flat_codes[begin : begin + step] = distances.argmin(dim=1)
    n, d, h, w = z.shape
    quantised.copy_(codebook[flat_codes].reshape(n, h, w, d).permute(0, 3, 1, 2))
