"""Dead specialists: ones that their neighbours outdo at their own draft positions."""

import torch

from ...configuration_poss import PosSConfig
from ..significance import bootstrap_ratio_interval
from .findings import Finding, Verdict
from .roll_outs import RollOuts


__all__ = ["specialists"]

_LEVEL = 0.99  # of all comparisons together
_FEWEST = 100  # rows that chains reach


def specialists(roll_outs: RollOuts, config: PosSConfig) -> Finding:
    """Each specialist against each neighbour in its place: the share of drafts that are right at its own positions, of
    the rows that chains reach there, on the same rows with the same input (PosS, section 3).

    Intervals are of the difference, by bootstrap over texts, at 99% for all comparisons together (Bonferroni).
    """
    name = "specialists"
    if config.num_specialists == 1:
        return Finding(name, Verdict.OK, "There is one specialist, which has no neighbour.")
    sums: dict[tuple[int, int], torch.LongTensor] = {}  # [texts, 3] by specialist and neighbour
    for (position, neighbour), of_position in roll_outs.swaps.items():
        key = config.specialist_index(position) + 1, neighbour
        sums[key] = sums.get(key, 0) + of_position
    level = 1 - (1 - _LEVEL) / len(sums)
    compared, dead, untold = [], [], []
    for (specialist, neighbour), of_texts in sorted(sums.items()):
        rows, own, theirs = of_texts.sum(0).tolist()
        entry = {
            "specialist": specialist,
            "neighbour": neighbour,
            "rows": rows,
            "right": own,
            "neighbour_right": theirs,
        }
        compared.append(entry)
        reached = of_texts[of_texts[:, 0] > 0]
        difference = (reached[:, 1] - reached[:, 2]).tolist()
        interval = bootstrap_ratio_interval(difference, reached[:, 0].tolist(), level=level)
        if rows < _FEWEST or interval is None:
            untold.append(entry)
            continue
        entry |= {"difference": (own - theirs) / rows, "interval": list(interval)}
        if interval.high < 0:
            dead.append(entry)
    numbers = {"level": _LEVEL, "compared": compared}
    if dead:
        return Finding(
            name,
            Verdict.WARNING,
            "; ".join(map(_told, dead)).capitalize() + ".",
            "Such a specialist does harm. Train on (it may have seen too few steps), start all from one trained "
            "layer (`from_eagle`), or give each of them more positions.",
            numbers,
        )
    if len(untold) == len(compared):
        reason = f"Chains reach too few rows ({max(entry['rows'] for entry in compared)}) to compare specialists."
        return Finding.skipped(name, f"{reason} See what is said of acceptance, or check with more prompts.")
    told = "No specialist is significantly worse than its neighbour in its place"
    if untold:
        few = sorted({entry["specialist"] for entry in untold})
        told += f"; chains reach too few rows to tell of {', '.join(map(str, few))}"
    rest = [entry for entry in compared if "difference" in entry]
    least = min(rest, key=lambda entry: entry["difference"])
    return Finding(name, Verdict.OK, f"{told}. Closest: {_told(least)}.", numbers=numbers)


def _told(entry: dict) -> str:
    low, high = entry["interval"]
    rows = entry["rows"]
    return (
        f"specialist {entry['specialist']} drafts {entry['right'] / rows:.1%} right at its own positions, specialist "
        f"{entry['neighbour']} in its place {entry['neighbour_right'] / rows:.1%} (difference {100 * low:.1f} to "
        f"{100 * high:.1f} points, n = {rows})"
    )
