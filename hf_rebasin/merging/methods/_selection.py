"""The k largest entries of tensors that are read piece by piece, exactly and in bounded memory.

A sample of the entries brackets the k-th largest value between two entries. A pass over the tensor then counts the
entries above, at and below both ends, and collects those between them, among which the k-th is looked up. If it lies
outside of the bracket, or too many entries lie inside, the search goes on in the part that contains it. So a tensor of
n entries is read once and a quarter, and some n^(2/3) entries are kept in memory. Entries that occur very often, as in
differences of half-precision numbers, are ends of the bracket and only counted.

Of equal entries the first ones count as larger: this makes the choice independent of machines and of piece sizes. It
takes another pass up to the last of them if they were counted only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..pieces import Piece, Pieces

FEW = 1 << 17  # so many entries are collected without a bracket
DEVIATIONS = 4.0  # half the width of the bracket, in standard deviations of the rank in the sample
SAMPLED_PIECES = 4  # at first the sample is drawn from one of so many pieces
GOLDEN = 0.6180339887498949  # its multiples spread evenly, so that sampled positions follow no pattern of the tensor


@dataclass(frozen=True)
class Cutoff:
    """What separates the k largest entries of a tensor from the rest.

    Args:
        value: larger entries are among the k largest, smaller ones are not.
        end: entries equal to `value` are among them if their flat position in the tensor is below `end`. If `value` is
            0 this holds for all of them, so that zeros, which add nothing to a sum, need not be told apart.
    """

    value: float
    end: int = 0

    def select(self, scores: Tensor, offset: int = 0) -> Tensor:
        """Return a mask of the entries of a piece that are among the k largest.

        Args:
            scores: the piece.
            offset: flat position of its first entry in the tensor.

        Example: the 2 largest of (5, 4, 4, 1) have the cutoff value 4 and end 2; the mask is (1, 1, 0, 0).
        """
        flat = scores.reshape(-1)
        mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
        before = min(max(self.end - offset, 0), flat.numel())
        torch.ge(flat[:before], self.value, out=mask[:before])
        torch.gt(flat[before:], self.value, out=mask[before:])
        return mask.reshape(scores.shape)


ALL, NONE = Cutoff(-math.inf), Cutoff(math.inf)


def select_largest(
    pieces: Pieces, scores: Callable[[Piece], Sequence[Tensor]], counts: Sequence[Sequence[int]]
) -> list[list[Cutoff]]:
    """Find the cutoffs of the k largest entries of tensors.

    Args:
        pieces: pieces of the tensors that `scores` reads.
        scores: returns a piece of every tensor to choose from: no negative numbers, no NaN.
        counts: for every tensor the numbers k that are asked for; 0 is nothing, and the size or more everything.

    Returns:
        For every tensor a cutoff per number k.

    Example: of (3, 1, 2, 2) the largest two are 3 and the first 2: value 2, end 3.
    """
    searches = [[_Search(k, pieces.numel) for k in ks] for ks in counts]
    by_tensor = [(i, search) for i, row in enumerate(searches) for search in row]

    def read(
        readers: Sequence[tuple[int, _Search]], step: Callable[[_Search, Tensor, int], bool], every: int = 1
    ) -> None:
        for piece in pieces.every(every) if readers else ():
            flat = [tensor.reshape(-1) for tensor in scores(piece)]
            unfinished = [step(search, flat[i], piece.offset) for i, search in readers]
            if not any(unfinished):
                break

    while active := [(i, search) for i, search in by_tensor if search.value is None]:
        sampling = [(i, search) for i, search in active if search.between > FEW]
        first = all(search.low is None and search.high is None for _, search in sampling)
        read(sampling, _Search.sample, SAMPLED_PIECES if first else 1)  # a bracket that misses is seen, and mended
        for _, search in sampling:
            search.set_bracket()
        read(active, _Search.count)
        for _, search in active:
            search.narrow()
    read([(i, search) for i, search in by_tensor if search.end is None], _Search.find_end)
    return [[Cutoff(search.value or 0.0, search.end or 0) for search in row] for row in searches]


class _Search:
    """The search for the k-th largest entry, which lies in an interval without its ends (None: no limit)."""

    def __init__(self, k: int, size: int):
        self.k, self.size = k, size
        self.low: float | None = None
        self.high: float | None = None
        self.above, self.between = 0, size  # entries at or above `high`, and inside of the interval
        self.value: float | None = None  # the k-th largest entry
        self.equal = 0  # so many of the entries equal to it are among the k largest
        self.end: int | None = 0  # None while it is not known
        if k >= size:
            self.value = ALL.value
        elif k <= 0:
            self.value = NONE.value
        self.limit = FEW + 16 * int(size ** (2 / 3))
        self._start()

    def _start(self) -> None:
        self.strata = max(2 * int(self.between ** (2 / 3)), 1)
        self.passed = 0
        self.sampled: list[Tensor] = []
        self.bracket: tuple[float | None, float | None] = (None, None)
        self.at_low_end = self.inside = self.at_high_end = self.above_bracket = 0
        self.values: list[Tensor] = []
        self.positions: list[Tensor] = []

    def sample(self, scores: Tensor, offset: int) -> bool:
        """Take an entry from each of many strata of equal numbers of entries."""
        if self.low is not None:
            scores = scores[scores > self.low]
        if self.high is not None:
            scores = scores[scores < self.high]
        length, first = self.between / self.strata, self.passed
        self.passed += scores.numel()
        strata = torch.arange(int(first / length), int(self.passed / length) + 1, dtype=torch.float64)
        positions = ((strata + (strata * GOLDEN).frac()) * length).long() - first
        positions = positions[(positions >= 0) & (positions < scores.numel())]
        self.sampled.append(scores[positions.to(scores.device)])
        return True

    def set_bracket(self) -> None:
        """Choose two sampled entries between which the k-th largest one probably lies."""
        sample = torch.cat(self.sampled).sort().values
        share = 1 - (self.k - self.above) / self.between
        middle, half = share * len(sample), DEVIATIONS * math.sqrt(len(sample) * share * (1 - share)) + 1
        first, last = math.floor(middle - half), math.ceil(middle + half)
        low = float(sample[first]) if first >= 0 else None
        self.bracket = low, float(sample[last]) if last < len(sample) else None

    @property
    def _inside(self) -> tuple[float | None, float | None]:
        """The interval inside of the bracket."""
        low, high = self.bracket
        return self.low if low is None else low, self.high if high is None else high

    def count(self, scores: Tensor, offset: int) -> bool:
        """Count the entries above, at and below the ends of the bracket; collect the entries inside."""
        low_end, high_end = self.bracket
        if high_end is not None:
            at_least = int(torch.count_nonzero(scores >= high_end))
            above = int(torch.count_nonzero(scores > high_end))
            self.above_bracket += above
            self.at_high_end += at_least - above
        if low_end is not None and low_end == high_end:
            return True
        if low_end is not None:
            self.at_low_end += int(torch.count_nonzero(scores == low_end))
        low, high = self._inside
        inside = torch.ones_like(scores, dtype=torch.bool) if low is None else scores > low
        if high is not None:
            inside &= scores < high
        positions = inside.nonzero().squeeze(1)
        self.inside += positions.numel()
        if self.inside <= self.limit:
            self.values.append(scores[positions])
            self.positions.append(positions + offset)
        else:
            self.values, self.positions = [], []
        return True

    def narrow(self) -> None:
        """Find the k-th largest entry, or the part of the interval that contains it."""
        low_end, high_end = self.bracket
        above = self.above if high_end is None else self.above_bracket
        inside_from = above + self.at_high_end
        low_end_from = inside_from + self.inside
        below_from = low_end_from + self.at_low_end
        everything = self.above + self.between
        if self.k <= above:
            self.low, self.between = high_end, above - self.above
        elif self.k <= inside_from:
            self._settle(high_end, self.k - above, self.at_high_end)
        elif self.k <= low_end_from and self.values:
            values = torch.cat(self.values)
            value = values.kthvalue(len(values) - (self.k - inside_from) + 1).values
            equal = self.k - inside_from - int(torch.count_nonzero(values > value))
            positions = torch.cat(self.positions)[values == value]
            self._settle(float(value), equal, len(positions))
            self.end = int(positions[equal - 1]) + 1
        elif self.k <= low_end_from:  # too many to collect
            self.low, self.high = self._inside
            self.above, self.between = inside_from, self.inside
        elif self.k <= below_from:
            self._settle(low_end, self.k - low_end_from, self.at_low_end)
        else:
            self.high, self.above, self.between = low_end, below_from, everything - below_from
        self._start()

    def _settle(self, value: float | None, equal: int, total: int) -> None:
        self.value, self.equal = value, equal
        self.end = self.size if equal == total or value == 0 else None

    def find_end(self, scores: Tensor, offset: int) -> bool:
        """Look for the last entry equal to the k-th largest one that is kept; False when it is known."""
        if self.end is None:
            positions = torch.eq(scores, self.value or 0.0).nonzero()
            if self.equal <= len(positions):
                self.end = offset + int(positions[self.equal - 1]) + 1
            self.equal -= len(positions)
        return self.end is None
