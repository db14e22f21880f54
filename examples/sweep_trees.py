"""Which tree pays on this machine: speed-up of the demo pair (or another) over shapes of its drafts.

    python examples/sweep_trees.py                         # the shipped pair
    python examples/sweep_trees.py --folder runs/demo --shapes 1x7x6 6x20x6

A shape is TOP_K x TOTAL_TOKENS x DEPTH. All shapes and plain `generate` take turns on every prompt.
"""

import argparse
import statistics
import time

import torch
import transformers
from tqdm.auto import tqdm

from hf_poss import collect_statistics
from hf_poss.demo import demo_prompts, load_demo_pair


SHAPES = ["1x5x4", "1x7x6", "4x12x5", "4x16x6", "6x16x5", "6x20x6", "8x24x6", "10x32x6", "10x60x6"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a folder with target/ and poss/ (default: the shipped pair)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    target, poss, tokenizer = load_demo_pair(args.folder)
    prompts = [tokenizer(prompt, return_tensors="pt") for _, prompt in demo_prompts(args.prompts)]

    def seconds(shape: str | None, inputs) -> float:
        assistant = {}
        if shape is not None:
            top_k, total, depth = map(int, shape.split("x"))
            knobs = poss.generation_config
            knobs.draft_top_k, knobs.draft_total_tokens, knobs.num_assistant_tokens = top_k, total, depth
            assistant = {"assistant_model": poss}
        start = time.perf_counter()
        target.generate(
            **inputs,
            **assistant,
            max_new_tokens=args.max_new_tokens,
            min_new_tokens=args.max_new_tokens,
            do_sample=False,
        )
        return time.perf_counter() - start

    taus, ratios = {}, {shape: [] for shape in args.shapes}
    for shape in args.shapes:
        with collect_statistics() as stats:
            for inputs in prompts:
                seconds(shape, inputs)
        taus[shape] = stats.tau
    for _ in tqdm(range(args.repeats), desc="repeats"):
        for inputs in prompts:
            plain = seconds(None, inputs)
            for shape in args.shapes:
                ratios[shape].append(plain / seconds(shape, inputs))

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    print("| top-k x total x depth | tau | speed-up, median | lowest | highest |")
    print("|---|---|---|---|---|")
    for shape in args.shapes:
        runs = ratios[shape]
        print(f"| {shape} | {taus[shape]:.2f} | {statistics.median(runs):.2f} | {min(runs):.2f} | {max(runs):.2f} |")


if __name__ == "__main__":
    main()
