"""Gathers the runs of the study into one JSON file, from which `analyse.py` makes every table and figure.

python examples/study/collect.py runs/study/stories examples/results/study_stories.json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    results = collect(args.folder)
    args.output.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    runs = sum(len(condition["seeds"]) for condition in results["conditions"].values())
    print(f"{runs} runs of {len(results['conditions'])} conditions")


if __name__ == "__main__":
    main()
