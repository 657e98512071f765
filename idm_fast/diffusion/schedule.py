"""Noise schedules: x_t = alpha_t x0 + sigma_t n with alpha_t^2 + sigma_t^2 = 1, all in float64 on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from idm_fast.diffusion import spacing as _spacing
from idm_fast.diffusion.spacing import Spacing
from idm_fast.errors import IdmFastError

if TYPE_CHECKING:
    from idm_fast.config import DiffusionConfig

Array = npt.NDArray[np.float64]
Times = float | Sequence[float] | npt.NDArray[Any]
Conditioning = Literal["index", "t1000", "noise_level"]
Kind = Literal["discrete", "cosine", "vp_sde"]
CONDITIONINGS: tuple[Conditioning, ...] = ("index", "t1000", "noise_level")


@dataclass(frozen=True, eq=False)
class Schedule:
    """alpha_t, sigma_t of a diffusion, and the number by which the network is told the time.

    Build one with a class method below.

    Time ``t`` is an index 0 .. N-1 into ``alphas_cumprod`` (discrete; fractions are interpolated linearly in log SNR)
    or a real number 0 (clean) .. ``t_max`` <= 1 (noise) (continuous).

    ``conditioning`` is what ``network_time`` returns:

    - ``index``: the index itself, also of a respaced chain (DDPM, guided-diffusion). Discrete only.
    - ``t1000``: 1000 t, or 1000 index / N for a table (guided-diffusion's ``rescale_timesteps``).
    - ``noise_level``: sqrt(alpha_bar_t) = alpha_t (SR3). SR3's code keeps a table padded with 1 at the front and
      reads entry t+1 for step t, which is the alpha of step t itself.
    """

    kind: Kind
    conditioning: Conditioning
    alphas_cumprod: Array | None = None  # [N], discrete only
    beta_min: float = 0.0  # vp_sde only
    beta_max: float = 0.0  # vp_sde only
    t_max: float = 1.0  # continuous only

    # ---- building ----------------------------------------------------------------------------------------------

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, n: int = 1000, *, conditioning: Conditioning = "index"
    ) -> Schedule:
        """beta linear in the index (DDPM, section 4)."""
        return cls._from_betas(np.linspace(beta_start, beta_end, _count(n)), conditioning)

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        n: int = 1000,
        *,
        conditioning: Conditioning = "index",
    ) -> Schedule:
        """sqrt(beta) linear in the index (latent diffusion)."""
        if min(beta_start, beta_end) < 0:
            raise IdmFastError(f"Schedule: betas must be inside (0, 1), got {beta_start} .. {beta_end}")
        return cls._from_betas(np.linspace(beta_start**0.5, beta_end**0.5, _count(n)) ** 2, conditioning)

    @classmethod
    def cosine(cls, n: int = 1000, *, conditioning: Conditioning = "index") -> Schedule:
        """alpha_bar(t) ~ cos^2((t/N + s)/(1 + s) pi/2), s = 0.008, beta <= 0.999 (Improved DDPM, eq. 17)."""
        s = 0.008
        edges = np.cos((np.arange(_count(n) + 1) / n + s) / (1 + s) * np.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        return cls._from_betas(betas, conditioning)

    @classmethod
    def from_alphas_cumprod(cls, values: Times, *, conditioning: Conditioning = "index") -> Schedule:
        """A table alpha_bar [N] as a checkpoint stores it: strictly falling, inside (0, 1); the last may be 0."""
        table = np.array(values, dtype=np.float64)
        if table.ndim != 1 or table.size < 1:
            raise IdmFastError(f"Schedule: alphas_cumprod must be a list [N >= 1], got shape {list(table.shape)}")
        inside = bool(np.all(np.isfinite(table)) and table[0] < 1 and table[-1] >= 0)
        if not inside or bool(np.any(np.diff(table) >= 0)):
            raise IdmFastError(
                "Schedule: alphas_cumprod must fall strictly inside [0, 1), "
                f"got {table[0]:g} .. {table[-1]:g} over {table.size} entries"
            )
        return cls._from_table(table, conditioning)

    @classmethod
    def continuous_cosine(cls, *, t_max: float = 1.0, conditioning: Conditioning = "t1000") -> Schedule:
        """alpha = cos(pi t/2), sigma = sin(pi t/2). ``t_max`` < 1 keeps alpha above 0, which eps prediction needs."""
        return cls._checked("cosine", conditioning, t_max=t_max)

    @classmethod
    def vp_sde(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, *, t_max: float = 1.0, conditioning: Conditioning = "t1000"
    ) -> Schedule:
        """log alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2 (score SDE, 2011.13456, eq. 33)."""
        if not 0 < beta_min <= beta_max < np.inf:
            raise IdmFastError(f"Schedule: betas must satisfy 0 < beta_min <= beta_max, got {beta_min}, {beta_max}")
        return cls._checked("vp_sde", conditioning, beta_min=beta_min, beta_max=beta_max, t_max=t_max)

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Schedule:
        """The schedule that a model's settings name."""
        if config.schedule == "cosine_continuous":
            return cls.continuous_cosine(conditioning="noise_level" if config.noise_level else "t1000")
        if config.schedule == "vp_sde":
            told: Conditioning = "noise_level" if config.noise_level else "t1000"
            return cls.vp_sde(config.beta_start, config.beta_end, conditioning=told)
        conditioning: Conditioning = "t1000" if config.rescale_timesteps else "index"
        if config.noise_level:
            conditioning = "noise_level"
        if config.schedule == "table":
            return cls.from_alphas_cumprod(config.alphas_cumprod, conditioning=conditioning)
        if config.schedule == "cosine":
            return cls.cosine(config.train_steps, conditioning=conditioning)
        if config.schedule == "linear":
            return cls.linear(config.beta_start, config.beta_end, config.train_steps, conditioning=conditioning)
        if config.schedule == "scaled_linear":
            return cls.scaled_linear(config.beta_start, config.beta_end, config.train_steps, conditioning=conditioning)
        raise IdmFastError(f"Schedule: schedule must be one of DiffusionConfig's, got {config.schedule!r}")

    @classmethod
    def _from_betas(cls, betas: Array, conditioning: Conditioning) -> Schedule:
        if not bool(np.all((betas > 0) & (betas < 1))):
            raise IdmFastError(f"Schedule: betas must be inside (0, 1), got {betas.min():g} .. {betas.max():g}")
        return cls._from_table(np.cumprod(1 - betas, dtype=np.float64), conditioning)

    @classmethod
    def _from_table(cls, table: Array, conditioning: Conditioning) -> Schedule:
        table.setflags(write=False)
        return cls._checked("discrete", conditioning, alphas_cumprod=table)

    @classmethod
    def _checked(cls, kind: Kind, conditioning: Conditioning, **fields: Any) -> Schedule:
        if conditioning not in CONDITIONINGS:
            raise IdmFastError(f"Schedule: conditioning must be one of {CONDITIONINGS}, got {conditioning!r}")
        if conditioning == "index" and kind != "discrete":
            raise IdmFastError("Schedule: conditioning 'index' needs a table, got a continuous schedule")
        if not 0 < fields.get("t_max", 1.0) <= 1:
            raise IdmFastError(f"Schedule: t_max must be inside (0, 1], got {fields['t_max']}")
        return cls(kind, conditioning, **fields)

    # ---- reading -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int | None:
        """N of a discrete schedule, None of a continuous one."""
        return None if self.alphas_cumprod is None else self.alphas_cumprod.size

    def alpha_sigma(self, t: Times) -> tuple[Array, Array]:
        """(alpha_t, sigma_t), each of the shape of ``t``."""
        t = self._times(t)
        if self.kind == "cosine":
            # The sine of the complement is exactly 0 at t = 1, where cos(pi/2) in floating point is not.
            return np.sin(np.pi / 2 * (1 - t)), np.sin(np.pi / 2 * t)
        if self.kind == "vp_sde":
            log_alpha = -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2
            return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        table = self._table()
        low = np.floor(t).astype(np.int64)
        alpha_bar, rest = table[low], 1 - table[low]
        part = t - low
        if bool(np.any(part > 0)):
            ends = _log_snr(table[low], rest), _log_snr(*_pair(table[np.minimum(low + 1, table.size - 1)]))
            with np.errstate(invalid="ignore"):  # 0 * inf of a table that ends at alpha = 0; not selected below
                between = (1 - part) * ends[0] + part * ends[1]
                alpha_bar = np.where(part > 0, np.exp(-np.logaddexp(0, -between)), alpha_bar)
                rest = np.where(part > 0, np.exp(-np.logaddexp(0, between)), rest)
        return np.sqrt(alpha_bar), np.sqrt(rest)

    def log_snr(self, t: Times) -> Array:
        """log(alpha_t^2 / sigma_t^2); +inf at a clean end, -inf where alpha = 0. (DPM-Solver's lambda is half.)"""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * _log_snr(alpha, sigma)

    def t_of_log_snr(self, log_snr: Times) -> Array:
        """The time at which log_snr(t) is the given value: the inverse of ``log_snr``, held to the valid range."""
        value = np.asarray(log_snr, dtype=np.float64)
        if self.kind == "cosine":
            with np.errstate(over="ignore"):
                return np.minimum(2 / np.pi * np.arctan(np.exp(-value / 2)), self.t_max)
        if self.kind == "vp_sde":
            # 2 log alpha = -q solves (beta_max - beta_min)/2 t^2 + beta_min t = q; this root form never cancels.
            # Held before it is solved, since pure noise asks for an infinite q.
            widest = (self.beta_max - self.beta_min) / 2 * self.t_max**2 + self.beta_min * self.t_max
            q = np.minimum(np.logaddexp(0, -value), widest)
            root = np.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * q)
            return np.minimum(2 * q / (self.beta_min + root), self.t_max)
        table = self._table()
        return np.asarray(np.interp(-value, -_log_snr(*_pair(table)), np.arange(table.size)), dtype=np.float64)

    def t_of_angle(self, angle: Times) -> Array:
        """The time at which alpha = cos(angle), sigma = sin(angle); angle in [0, pi/2], held to the valid range."""
        angle = np.asarray(angle, dtype=np.float64)
        # The sine of the complement is 0 at pi/2, where cos is not.
        return self.t_of_log_snr(2 * _log_snr(np.sin(np.pi / 2 - angle), np.sin(angle)))

    def network_time(self, t: Times) -> Array:
        """What the network receives for time ``t`` (see ``conditioning``)."""
        if self.conditioning == "noise_level":
            return self.alpha_sigma(t)[0]
        t = self._times(t)
        if self.conditioning == "index":
            return t
        return t * 1000 if self.size is None else t * (1000 / self.size)

    def t_of_uniform(self, u: Times) -> Array:
        """Training time from u in [0, 1): the index floor(u N), or u t_max kept above 1e-5 (sigma > 0)."""
        u = np.asarray(u, dtype=np.float64)
        if self.size is not None:
            return np.asarray(np.minimum(np.floor(u * self.size), self.size - 1), dtype=np.float64)
        return np.maximum(u * self.t_max, 1e-5)

    def timesteps(self, steps: int, spacing: Spacing = "trailing", start: float = 1.0) -> Array:
        """[steps] falling times at which to evaluate; ``start`` in (0, 1] is the part of the range that is walked.

        All ``steps`` lie inside that part (image-to-image "strength": begin at an intermediate noise level).
        Spacings as in ``idm_fast.diffusion.spacing``. The step after the last always ends on the clean image.
        """
        if self.size is not None:
            return _spacing.discrete(self.size, steps, spacing, start)
        if spacing == "angle":
            times = _spacing.continuous(self.t_max, steps, "uniform", start)
            alpha, sigma = self.alpha_sigma(times[0])
            times[1:] = self.t_of_angle(np.arctan2(sigma, alpha) * times[1:] / times[0])
            return times
        return _spacing.continuous(self.t_max, steps, spacing, start)

    def _table(self) -> Array:
        assert self.alphas_cumprod is not None  # the class methods build nothing else
        return self.alphas_cumprod

    def _times(self, t: Times) -> Array:
        times = np.asarray(t, dtype=np.float64)
        top = self.t_max if self.size is None else self.size - 1
        if not bool(np.all((times >= 0) & (times <= top))):
            raise IdmFastError(f"Schedule: t must be inside [0, {top:g}], got {times.min():g} .. {times.max():g}")
        return times


def _count(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise IdmFastError(f"Schedule: n must be an integer >= 1, got {n!r}")
    return n


def _pair(alpha_bar: Array) -> tuple[Array, Array]:
    return alpha_bar, 1 - alpha_bar


def _log_snr(signal: Array, noise: Array) -> Array:
    with np.errstate(divide="ignore"):  # the ends of a schedule are allowed to be infinite
        return np.log(signal) - np.log(noise)
