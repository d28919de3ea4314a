"""Where numbers lie, by powers of two, and what of them float16 can hold."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

LARGEST = 65504.0  # of float16
SMALLEST_NORMAL = -14  # powers of two from here on have all ten bits
SMALLEST = -24  # the smallest subnormal; what is below becomes 0


@dataclasses.dataclass(frozen=True)
class Window:
    """Loss scales, powers of two, from the smallest to the largest.

    Example:
    >>> Window(2.0**-3, 2.0**7)
    Window(smallest=0.125, largest=128.0)
    >>> str(Window(2.0**-3, 2.0**7)), str(Window(4.0, 2.0))
    ('2^-3 to 2^7', 'none')
    """

    smallest: float
    largest: float

    @property
    def is_empty(self) -> bool:
        """Whether no scale does."""
        return self.smallest > self.largest

    def __str__(self) -> str:
        if self.is_empty:
            return "none"
        low, high = (math.log2(s) for s in (self.smallest, self.largest))
        return f"2^{low:.0f}" if low == high else f"2^{low:.0f} to 2^{high:.0f}"

    def nearest(self, scale: float) -> float:
        """The scale itself if it is within, else the end that is nearer."""
        return min(max(scale, self.smallest), self.largest)


@dataclasses.dataclass(frozen=True)
class Range:
    """Magnitudes of some numbers; of several tensors after `merged`.

    Attributes:
        num_values: How many there were.
        num_zeros: Those that are zero.
        num_infinite: Those that are infinite.
        num_nan: Those that are NaN.
        num_over: Those beyond float16's 65504, infinite ones included.
        largest: Largest finite magnitude; 0.0 if there is none but 0.
        smallest: Smallest magnitude that is finite and not 0; 0.0 if none is.
        exponents: How many finite numbers have each `floor(log2(|x|))`.
    """

    num_values: int
    num_zeros: int
    num_infinite: int
    num_nan: int
    num_over: int
    largest: float
    smallest: float
    exponents: Mapping[int, int]

    @property
    def num_nonzero(self) -> int:
        """What the shares are of: all but zeros and NaN."""
        return self.num_values - self.num_zeros - self.num_nan

    @property
    def is_finite(self) -> bool:
        """Whether there is neither infinity nor NaN."""
        return not (self.num_infinite or self.num_nan)

    @property
    def share_below_normal(self) -> float:
        """Of nonzero numbers, those below 2**-14: float16 has few bits."""
        return self._share(self._num_below(SMALLEST_NORMAL))

    @property
    def share_below_smallest(self) -> float:
        """Of nonzero numbers, those below 2**-24: 0 in float16."""
        return self.share_lost(1.0)

    @property
    def share_over(self) -> float:
        """Of nonzero numbers, those beyond 65504: infinite in float16."""
        return self._share(self.num_over)

    def share_lost(self, scale: float) -> float:
        """Of nonzero numbers, those below 2**-24 once they are scaled.

        Args:
            scale: A power of two.
        """
        return self._share(self._num_below(SMALLEST - round(math.log2(scale))))

    @property
    def sum(self) -> float:
        """Of all magnitudes, each as the power of two below it."""
        return math.fsum(math.ldexp(n, e) for e, n in self.exponents.items())

    def sum_lost(self, scale: float) -> float:
        """Of `sum`, the part of those below 2**-24 once they are scaled.

        Args:
            scale: A power of two.
        """
        limit = SMALLEST - round(math.log2(scale))
        lost = math.fsum(
            math.ldexp(n, e) for e, n in self.exponents.items() if e < limit
        )
        return lost / self.sum if lost else 0.0

    @property
    def window(self) -> Window | None:
        """Scales at which none overflows and none becomes 0; None: no number.

        Empty if the numbers span more than float16's 40 powers of two.
        """
        if not self.largest:
            return None
        return Window(2.0 ** (SMALLEST - min(self.exponents)), self.ceiling)

    @property
    def ceiling(self) -> float:
        """The largest scale, a power of two, at which none overflows."""
        fraction, exponent = math.frexp(self.largest)
        fits = fraction * 2.0**16 <= LARGEST
        return 2.0 ** (16 - exponent - (not fits)) if self.largest else math.inf

    def merged(self, other: "Range") -> "Range":
        """The range of the numbers of both."""
        exponents = dict(self.exponents)
        for exponent, count in other.exponents.items():
            exponents[exponent] = exponents.get(exponent, 0) + count
        smallest = [r.smallest for r in (self, other) if r.smallest]
        return Range(
            num_values=self.num_values + other.num_values,
            num_zeros=self.num_zeros + other.num_zeros,
            num_infinite=self.num_infinite + other.num_infinite,
            num_nan=self.num_nan + other.num_nan,
            num_over=self.num_over + other.num_over,
            largest=max(self.largest, other.largest),
            smallest=min(smallest, default=0.0),
            exponents=dict(sorted(exponents.items())),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the shares and the window included."""
        window = self.window
        return {
            **{f: getattr(self, f) for f in _PLAIN},
            "exponents": {str(e): n for e, n in self.exponents.items()},
            "loss_scales": window
            and [float(window.smallest), float(window.largest)],
        }

    def _share(self, count: int) -> float:
        return count / self.num_nonzero if self.num_nonzero else 0.0

    def _num_below(self, exponent: int) -> int:
        return sum(n for e, n in self.exponents.items() if e < exponent)


_PLAIN = (
    "num_values",
    "num_zeros",
    "num_infinite",
    "num_nan",
    "largest",
    "smallest",
    "share_below_normal",
    "share_below_smallest",
    "share_over",
)


def range_of(values: Any) -> Range:
    """The range of an array in float32.

    Example:
    >>> found = range_of([0.0, 1.0, -1.5, 3.0, 1e6])
    >>> found.largest, found.smallest, found.share_over
    (1000000.0, 1.0, 0.25)
    >>> found.exponents
    {0: 2, 1: 1, 19: 1}
    """
    magnitudes = np.abs(np.asarray(values, np.float32)).ravel()
    is_finite = np.isfinite(magnitudes)
    nonzero = magnitudes[is_finite & (magnitudes > 0)]
    exponents = np.frexp(nonzero)[1] - 1  # frexp's fraction is in [0.5, 1)
    found, counts = np.unique(exponents, return_counts=True)
    num_nan = int(np.isnan(magnitudes).sum())
    num_infinite = int(magnitudes.size - is_finite.sum()) - num_nan
    return Range(
        num_values=magnitudes.size,
        num_zeros=magnitudes.size - num_nan - num_infinite - nonzero.size,
        num_infinite=num_infinite,
        num_nan=num_nan,
        num_over=int((magnitudes > LARGEST).sum()),
        largest=float(nonzero.max(initial=0.0)),
        smallest=float(nonzero.min()) if nonzero.size else 0.0,
        exponents={int(e): int(n) for e, n in zip(found, counts, strict=True)},
    )
