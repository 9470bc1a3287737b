"""Which bytes a copy between two strided tensors moves, as few and as long runs as possible.

Knows sizes and strides only: nothing here touches a tensor, the library or PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import List, Sequence, Tuple


@dataclass(frozen=True)
class Dimension:
    """``count`` steps, and how many elements each of them is on either side."""

    count: int
    dst: int
    src: int


@dataclass(frozen=True)
class Runs:
    """A copy of runs of ``elements`` neighbouring elements, repeated over ``outer``.

    Without ``outer`` it is one run; outer dimensions are sorted, the widest step of ``dst`` first.
    """

    elements: int
    outer: Tuple[Dimension, ...]

    @property
    def count(self) -> int:
        return prod(dimension.count for dimension in self.outer)


def runs(shape: Sequence[int], dst: Sequence[int], src: Sequence[int]) -> Runs:
    """How to copy ``shape`` elements (none of them zero) from strides ``src`` to strides ``dst``.

    Dimensions may be visited in any order, so both may lie in memory in any, as long as it is the
    same: two tensors in channels-last order are one run.
    """
    merged: List[Dimension] = []
    # The narrowest step first; of two equal steps the shorter dimension.
    dimensions = [Dimension(*each) for each in zip(shape, dst, src) if each[0] != 1]
    for each in sorted(dimensions, key=lambda each: (each.dst, each.src, each.count)):
        last = merged[-1] if merged else None
        if last and (each.dst, each.src) == (last.count * last.dst, last.count * last.src):
            merged[-1] = Dimension(last.count * each.count, last.dst, last.src)
        else:
            merged.append(each)
    elements = 1
    if merged and (merged[0].dst, merged[0].src) == (1, 1):
        elements = merged.pop(0).count
    return Runs(elements, tuple(reversed(merged)))


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two places of a tensor may be one element of memory; true if it is not plain."""
    reach = 0
    for stride, count in sorted((stride, count) for count, stride in zip(shape, strides)):
        if count == 1:
            continue
        if stride <= reach:
            return True
        reach += stride * (count - 1)
    return False


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one that a tensor without zero sizes touches."""
    return 1 + sum((count - 1) * stride for count, stride in zip(shape, strides))
