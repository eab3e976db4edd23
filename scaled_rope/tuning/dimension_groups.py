"""DPE's probe: how coarse may positions be for each group of pairs of dimensions?

DPE (arXiv 2504.18857) is Self-Extend with a group size g of its own for each group of pairs: beyond a window of w
tokens, T tokens are seen as w + (T - w)/g. A group of pairs works up to some distance, its effective length, and reads
positions the more sharply the smaller its g is. The probe finds g group by group. All groups have the same g, one that
keeps far within the trained length; then one group at a time gets each of a list of others, and facts that are hidden
in long texts are asked for. The g under which most is found is that group's.

The constants are those of the paper's code (https://github.com/LuLuLuyi/DPE, `effective_length_detection`), written as
ratios: eight groups, a window of L/8 (1024 of 8192), 2·s for the groups that are not probed, and powers of two from 1
up to T/w, at which all of the text lies within two windows (as in its commit c32fd56; in a93eaf8 there are seven sizes
around 2·s, of which some are larger). Different here: the score is up to the caller, where the code counts needles that
are found; between equal scores the g nearest to that of the others is taken, where the code leaves the choice to its
reader. What the paper does besides, moving only the pairs with the largest norms of queries and keys, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

GROUPS = 8
"""Groups of pairs."""
WINDOW = 8
"""L over the window w."""
REFERENCE = 2
"""The g of the groups that are not probed, over the ratio of lengths s."""

Grouping = tuple[int, ...]
"""g of each group, from the pairs that turn fastest."""


@dataclass(frozen=True)
class GroupProbe:
    """The groupings that a probe reads a model under.

    Attributes:
        groups: the number of groups.
        window: w, in tokens.
        reference: g of the groups that are not probed.
        sizes: the values of g that each group is tried with, ascending, the reference among them.
    """

    groups: int
    window: int
    reference: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, original: int, target: int, pairs: int) -> GroupProbe:
        """The probe for texts of `target` tokens.

        Args:
            original: L in tokens, at least 8.
            target: above L.
            pairs: number of pairs of dimensions that are rotated, at least 2; fewer than `GROUPS` are a group each.

        Raises:
            ValueError: lengths or pairs outside of these bounds.
        """
        if original < WINDOW or target <= original or pairs < 2:
            raise ValueError(f"no probe from {original} to {target} tokens with {pairs} pairs")
        window = original // WINDOW
        reference = REFERENCE * math.ceil(target / original)
        powers = [2**power for power in range((target // window).bit_length())]
        return cls(min(GROUPS, pairs), window, reference, tuple(sorted({reference, *powers})))

    def with_size(self, group: int, size: int) -> Grouping:
        """The reference, but for one group."""
        return tuple(size if index == group else self.reference for index in range(self.groups))

    def groupings(self) -> list[Grouping]:
        """All groupings to read, the reference first, each once."""
        found = [self.with_size(0, self.reference)]
        for group in range(self.groups):
            found += [self.with_size(group, size) for size in self.sizes if size != self.reference]
        return found

    def spec(self, grouping: Grouping) -> str:
        """A grouping as `--scaling` takes it."""
        return f"dpe,groups={'+'.join(map(str, grouping))},window={self.window}"

    def choose(self, scores: Mapping[Grouping, float]) -> Grouping:
        """g of each group: the one with the highest score; between equal ones that nearest to the reference.

        scores: of all `groupings`.
        """

        def best(group: int) -> int:
            def order(size: int) -> tuple[float, float, int]:
                return -scores[self.with_size(group, size)], abs(math.log(size / self.reference)), size

            return min(self.sizes, key=order)

        return tuple(best(group) for group in range(self.groups))

    def find(self, score: Callable[[Grouping], float]) -> Grouping:
        """Read all groupings, and choose.

        score: how well a model does under a grouping; the higher, the better.
        """
        return self.choose({grouping: score(grouping) for grouping in self.groupings()})

    def effective_length(self, size: int, target: int) -> int:
        """The distance in tokens that a group sees between the ends of a text, rounded up."""
        return self.window + -(-(target - self.window) // size)
