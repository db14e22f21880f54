"""Gathers the runs of the study into one JSON file, from which `analyse.py` makes every table and figure.

    python examples/study/collect.py runs/study/stories examples/results/study_stories.json

Runs that the file holds already stay in it. Those that were made again are compared with it, count by count.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_poss.hub.provenance import describe_hardware


def collect(folder: Path) -> dict[str, Any]:
    """Conditions with their runs by seed: settings, training and counts. Runs that are not done are left out."""
    conditions: dict[str, Any] = {}
    for path in sorted(folder.glob("*/seed*/run.json")):
        run = json.loads(path.read_text())
        name, seed = run.pop("name"), run.pop("seed")
        condition = conditions.setdefault(name, {"settings": run, "seeds": {}})
        training = json.loads((path.parent / "training.json").read_text())
        measured = json.loads((path.parent / "measured.json").read_text())
        condition["seeds"][str(seed)] = {"training": training, "measured": measured}
    return {
        "hardware": describe_hardware(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "conditions": conditions,
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` and what `old` alone holds. A run that both hold keeps its old record, with the new suites added."""
    conditions = dict(new["conditions"])
    for name, condition in old["conditions"].items():
        seeds = dict(conditions.get(name, condition)["seeds"])
        for seed, run in condition["seeds"].items():
            measured = {**seeds.get(seed, run)["measured"], **run["measured"]}
            seeds[seed] = {**run, "measured": measured}
        conditions[name] = {**condition, "seeds": dict(sorted(seeds.items()))}
    return {**new, "conditions": dict(sorted(conditions.items()))}


def repeated(old: dict[str, Any], new: dict[str, Any]) -> list[bool]:
    """Of each measurement that both hold, whether all its counts are the same."""
    same = []
    for name, condition in new["conditions"].items():
        for seed, run in condition["seeds"].items():
            before = old["conditions"].get(name, {"seeds": {}})["seeds"].get(seed, {"measured": {}})["measured"]
            same += [before[suite] == counts for suite, counts in run["measured"].items() if suite in before]
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    results = collect(args.folder)
    if args.output.is_file():
        old = json.loads(args.output.read_text())
        same = repeated(old, results)
        print(f"{len(same)} measurements made again, {sum(same)} of them with the same counts")
        results = merged(old, results)
    args.output.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    runs = sum(len(condition["seeds"]) for condition in results["conditions"].values())
    print(f"{runs} runs of {len(results['conditions'])} conditions")


if __name__ == "__main__":
    main()
