"""Which tree pays on this machine: decoding speed of the demo pair (or another) over shapes of its drafts, and what
"auto" makes of it.

    python examples/sweep_trees.py                         # the shipped pair
    python examples/sweep_trees.py --batch_size 4 --json examples/results/sweep_trees_batch4.json
    python examples/sweep_trees.py --folder runs/demo --shapes 1x7x6 6x20x6 auto

A shape is TOP_K x TOTAL_TOKENS x DEPTH; "auto" chooses the last two in every round. All shapes and plain `generate`
take turns on every batch of prompts. Figures are ratios of runs side by side, medians over batches and repeats.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from hf_poss import collect_statistics
from hf_poss.demo import demo_prompts, load_demo_pair
from hf_poss.hub.provenance import command_line, describe_hardware, package_versions


SHAPES = ["1x5x4", "1x7x6", "4x8x5", "4x12x5", "6x8x6", "6x16x5", "6x20x6", "6x20x8", "8x24x8", "10x60x6"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a folder with target/ and poss/ (default: the shipped pair)")
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "auto"])
    parser.add_argument("--prompts", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts a call (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=96, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    target, poss, tokenizer = load_demo_pair(args.folder)
    target.generation_config.eos_token_id = None  # all texts of one length
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    target.generation_config.pad_token_id = tokenizer.pad_token_id
    texts = [prompt for _, prompt in demo_prompts(args.prompts)]
    batches = [
        tokenizer(texts[start : start + args.batch_size], return_tensors="pt", padding=True)
        for start in range(0, len(texts), args.batch_size)
    ]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]

    def write(shape: str | None, inputs: dict) -> torch.Tensor:
        assistant = {}
        if shape is not None:
            top_k, total, depth = (None, "auto", "auto") if shape == "auto" else map(int, shape.split("x"))
            knobs = poss.generation_config
            knobs.draft_top_k, knobs.draft_total_tokens, knobs.num_assistant_tokens = top_k, total, depth
            assistant = {"assistant_model": poss}
        return target.generate(**inputs, **assistant, max_new_tokens=args.max_new_tokens, do_sample=False)

    def seconds(shape: str | None, inputs: dict) -> float:
        start = time.perf_counter()
        write(shape, inputs)
        return time.perf_counter() - start

    identical, taus = {}, {}
    plain = [write(None, inputs) for inputs in batches]
    for shape in args.shapes:
        with collect_statistics() as stats:
            texts = [write(shape, inputs) for inputs in batches]
        identical[shape] = all(map(torch.equal, texts, plain))
        taus[shape] = stats.tau
    ratios: dict[str, list[float]] = {shape: [] for shape in args.shapes}
    for repeat in tqdm(range(args.repeats), desc="repeats"):
        for inputs in batches:
            base = seconds(None, inputs)
            order = args.shapes[repeat:] + args.shapes[:repeat]
            for shape in order:
                ratios[shape].append(base / seconds(shape, inputs))

    medians = {shape: statistics.median(runs) for shape, runs in ratios.items()}
    fixed = {shape: value for shape, value in medians.items() if shape != "auto"}
    best = max(fixed, key=fixed.get) if fixed else None
    about = {
        "command": command_line(),
        "hardware": describe_hardware(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "batch_size": args.batch_size,
        "shapes": {
            shape: {
                "tau": taus[shape],
                "identical": identical[shape],
                "speed_up": medians[shape],
                "lowest": min(ratios[shape]),
                "highest": max(ratios[shape]),
                "runs": len(ratios[shape]),
            }
            for shape in args.shapes
        },
        "best_fixed": best,
        # Ratios of runs side by side, so that a machine that slows down in between does not count.
        "auto_over_best": statistics.median(
            one / other for one, other in zip(ratios["auto"], ratios[best], strict=True)
        )
        if best is not None and "auto" in ratios
        else None,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{about['hardware']}, {about['threads']} threads, {about['versions']}", file=sys.stdout)
    print("| top-k x total x depth | tau | speed-up, median | lowest | highest | identical |")
    print("|---|---|---|---|---|---|")
    for shape, figures in about["shapes"].items():
        cells = [f"{figures[name]:.2f}" for name in ("tau", "speed_up", "lowest", "highest")]
        print(f"| {shape} | {' | '.join(cells)} | {'yes' if figures['identical'] else 'no'} |")
    if about["auto_over_best"] is not None:
        print(f"auto over the best fixed shape ({best}): {about['auto_over_best']:.2f}")


if __name__ == "__main__":
    main()
