"""The places that a top-k payload from another rank names: they index memory, so they are checked before they do.

Places ascend within [0, n). A sampled payload may have two ascending runs, of which the second lies before the first:
the scan has passed the end of the vector. Slots at the end may be empty: a zero at place 0. So no place occurs twice,
and additions there have no order that could differ between ranks.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_I32 = npt.NDArray[np.int32]


def first_misplaced(values: npt.NDArray[Any], mask: int, places: _I32, n: int, runs: int) -> Optional[int]:
    """Return the first slot of a payload in the host's memory whose place is not allowed, or None.

    Args:
        values: bits of the values sent, as integers.
        mask: selects all of their bits but the sign, so that -0.0 is a zero.
        places: their places.
        n: length of the flat vector.
        runs: how many ascending runs are allowed, 1 or 2.
    """
    begins = np.flatnonzero(places[1:] <= places[:-1]) + 1
    used = len(places)
    if len(begins):
        filled = np.flatnonzero((places != 0) | ((values & mask) != 0))
        used = int(filled[-1]) + 1 if len(filled) else 0
        begins = begins[begins < used]
    borders: list[int] = [0, *begins[:runs].tolist(), used][: runs + 1]
    for begin, end in zip(borders, borders[1:]):
        # What ascends is out of range at its ends first.
        limit = n if begin == 0 else min(n, int(places[0]))
        if begin < end and not (places[begin] >= 0 and places[end - 1] < limit):
            part = places[begin:end]
            wrong = (part < 0) | (part >= limit)
            return int(begin) + int(np.argmax(wrong))
    return int(begins[runs - 1]) if len(begins) >= runs else None


def misplaced(values: Tensor, places: Tensor, n: int, runs: int) -> Tensor:
    """Return for each payload whether a place in it is not allowed: what ``first_misplaced`` finds, on any device.

    Args:
        values: (payloads, k).
        places: int32 (payloads, k).
        n: length of the flat vectors.
        runs: how many ascending runs are allowed, 1 or 2.

    Returns:
        bool (payloads); the host need not wait for it.
    """
    filled = (places != 0) | (values != 0)
    k = places.shape[1]
    slots = torch.arange(1, k + 1, device=places.device)
    used = (filled * slots).amax(dim=1, keepdim=True)
    # Places that ascend from the first slot are no empty slots, even if the first of them has a zero.
    falls = (places[:, 1:] <= places[:, :-1]) & (slots[1:] <= used)
    last = places.gather(1, used.sub(1).clamp_(min=0)).squeeze(1)
    wrapped = falls.sum(dim=1)
    outside = ((places < 0) | (places >= n)).any(dim=1)
    return outside | (wrapped >= runs) | ((wrapped > 0) & (last >= places[:, 0]))
