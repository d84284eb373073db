"""Rendezvous hashing: which name a key prefers. No I/O: keys, names and weights only."""

from __future__ import annotations

import math
from functools import lru_cache
from hashlib import blake2b
from typing import Final

_BITS: Final = 64


@lru_cache(maxsize=1024)
def ranking(key: str, weights: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """
    Return the names in the order in which a key prefers them, the same in every process.

    Keys are shared out in proportion to the weights. The order of two names does not depend on the
    others, so a name that is missing moves only the keys that preferred it (weighted rendezvous
    hashing, https://www.ietf.org/archive/id/draft-ietf-bess-weighted-hrw-00.html).
    """
    scores = {name: weight / -math.log(_uniform(key, name)) for name, weight in weights if weight}
    return tuple(sorted(scores, key=scores.__getitem__, reverse=True))


def _uniform(key: str, name: str) -> float:
    """Return a number between 0 and 1, both excluded, from a hash."""
    text = f"{name}\0{key}".encode(errors="surrogatepass")
    digest = int.from_bytes(blake2b(text, digest_size=_BITS // 8).digest(), "big")
    # Fewer bits than a float has, so that the result is below 1.
    return ((digest >> 12) + 0.5) / float(1 << (_BITS - 12))
