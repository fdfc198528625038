"""A conversion of one's own: the weights that are small for their row and for their column become zero."""

from dataclasses import dataclass

from contextlab import register
from contextlab.convert.sparse.base import Scored


@register("conversion", "relative_size", family="sparse", cases=({}, {"pattern": "2:4"}))
@dataclass(frozen=True)
class RelativeSize(Scored):
    """The weights become zero that are the smallest share of their row and of their column together.

    share: of the weights that become zero; default 0.5, or what the pattern says.
    pattern: n:m, such as 2:4: n of each m neighbours in a row stay.
    layers: names of the linear layers, with * for any part.
    packed: store the numbers that are left and a bit for each place.
    """

    def scores(self, weight, moment):
        size = weight.abs()  # [O, I]; what is returned, too: the higher, the sooner it is kept
        return size / size.sum(0, keepdim=True) + size / size.sum(1, keepdim=True)
