"""How a codebook learns: codes are running means of the latents that chose them, and codes that nobody chooses move.

Sources: "Neural Discrete Representation Learning" (arXiv 1711.00937), appendix A.1, for the means; "Jukebox" (arXiv
2005.00341), section 3.1, for the revival of dead codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idm_fast.models.vqgan import Codebook
from idm_fast.training.distributed import Group


class CodebookAverage(nn.Module):
    """Running ``counts`` [K] and ``sums`` [K, D] of the latents that chose each code; the code is their quotient.

    ``decay``: of the running sums, per step. ``revive_below``: a code chosen less often than this share of the mean is
    dead; every ``revive_every`` steps the dead ones become latents of the step, chosen at random. So do all of them at
    the first update, but for codes to ``keep``.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: Codebook, decay: float, revive_below: float, revive_every: int) -> None:
        super().__init__()
        self.decay, self.revive_below, self.revive_every = decay, revive_below, revive_every
        self.register_buffer("counts", torch.zeros(len(codebook.weight), device=codebook.weight.device))
        self.register_buffer("sums", torch.zeros_like(codebook.weight.detach()))

    @torch.no_grad()
    def keep(self, codebook: Codebook, mean: float) -> None:
        """Goes on from codes that have been learned, as if each had been chosen ``mean`` times a step."""
        self.counts.fill_(mean)
        self.sums.copy_(mean * codebook.weight)

    @torch.no_grad()
    def update(self, codebook: Codebook, latent: Tensor, codes: Tensor, step: int, seed: int, group: Group) -> int:
        """Moves ``codebook`` after step ``step``, whose ``latent`` [N, D, h, w] chose ``codes`` [N, h, w].

        Every process ends with the same codes. Returns how many were revived.
        """
        rows = latent.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        flat = codes.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, flat, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, flat, rows)
        group.add_up(counts)
        group.add_up(sums)
        revives = step % self.revive_every == 0
        first = revives and not bool(self.counts.any())
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        alive = self.counts > 0
        codebook.weight[alive] = self.sums[alive] / self.counts[alive, None]
        if not revives:
            return 0
        mean = float(counts.sum()) / len(counts)
        dead = torch.ones_like(self.counts, dtype=torch.bool) if first else self.counts < self.revive_below * mean
        return self._revive(codebook, dead, rows, mean, (seed << 32) + step, group)

    def _revive(self, codebook: Codebook, dead: Tensor, rows: Tensor, mean: float, seed: int, group: Group) -> int:
        number = int(dead.sum())
        if number:
            # On the CPU: the same choice on every device.
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randint(len(rows), (number,), generator=generator).to(rows.device)
            found = rows[chosen]
            group.broadcast(found)
            codebook.weight[dead] = found
            # Twice the bound: time to be chosen, and no weight against the latents that do.
            self.counts[dead] = start = 2 * self.revive_below * mean
            self.sums[dead] = start * found
        return number

    def use(self) -> tuple[float, float]:
        """(share of codes that are chosen at least a tenth as often as the mean, perplexity as a share of all)."""
        share = self.counts / self.counts.sum().clamp(min=1e-12)
        used = (share >= 0.1 / len(share)).float().mean()
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum()) / len(share)
        return used.item(), perplexity.item()
