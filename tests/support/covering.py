"""Which combinations of a matrix run every time: few, with every value of every argument among them."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence


def covering(combinations: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """The places of the combinations to keep.

    A combination says which value each argument has. Every value of every argument is in at least one of the kept; a
    single argument keeps all. The next to be kept is always the first of those that add most values, and of these one
    whose values were kept least often, so that no argument stays at its first value.
    """
    missing = {value for combination in combinations for value in combination.items()}
    used: Counter[tuple[str, Hashable]] = Counter()
    kept = []

    def gain(place: int) -> tuple[int, int]:
        values = combinations[place].items()
        return len(missing & values), -sum(used[value] for value in values)

    while missing:
        best = max(range(len(combinations)), key=gain)
        kept.append(best)
        missing -= combinations[best].items()
        used.update(combinations[best].items())
    return sorted(kept)
