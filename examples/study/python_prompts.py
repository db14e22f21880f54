"""Beginnings of held-out Python, as a prompt set of `hf-poss evaluate` for the demo target.

python examples/study/python_prompts.py runs/study/python.jsonl
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from hf_poss.demo import held_out_sources


CHARACTERS = 400
PLACES = (0.3, 0.7)  # of a module, as shares of its length


def prompts() -> Iterator[dict[str, str]]:
    """Whole lines of each module that lead up to each of `PLACES`."""
    for name, source in held_out_sources().items():
        for place in PLACES:
            end = source.index("\n", int(place * len(source))) + 1
            start = source.rfind("\n", 0, max(end - CHARACTERS, 0)) + 1
            yield {"id": f"{name} {place}", "prompt": source[start:end]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts()))


if __name__ == "__main__":
    main()
