"""`hf-poss demo`: the shipped pair completes code that it has never seen, with and without specialists."""

import argparse
import statistics
import sys


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=6, help="number of held-out prompts (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens a prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timed pairs a prompt (default: %(default)s)")
    parser.add_argument("--folder", help="another pair: a folder with target/ and poss/")


def run(args: argparse.Namespace) -> int:
    import torch
    import transformers
    from tqdm.auto import tqdm

    from ..demo import demo_prompts, load_demo_pair
    from ..evaluation import compare_speed
    from ..hub.provenance import describe_processor
    from .display import colored_text, describe_authors, describe_statistics, legend, uses_color

    transformers.utils.logging.disable_progress_bar()
    target, poss, tokenizer = load_demo_pair(args.folder)
    prompts = demo_prompts(args.prompts)
    color = uses_color()
    print(
        f"target: {target.config.num_hidden_layers} layers of width {target.config.hidden_size}, "
        f"{_millions(target)}; drafter: {poss.config.num_specialists} specialists for "
        f"{poss.config.num_draft_positions} positions, {_millions(poss)}"
    )
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {describe_processor()}, float32, greedy"
    )
    if color:
        print(f"written by: {legend(poss.config.num_specialists)}")

    comparisons = []
    with tqdm(
        total=len(prompts) * (2 + 2 * args.repeats), desc="runs", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        for title, prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            comparison = compare_speed(
                target,
                poss,
                dict(inputs),
                args.repeats,
                bar.update,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
            )
            comparisons.append(comparison)
            new_tokens = comparison.poss_output[comparison.prompt_length :].tolist()
            bar.clear()
            print(f"\n--- {title} ---")
            dim, reset = ("\033[2m", "\033[0m") if color else ("", "")
            print("\n".join(f"{dim}{line}{reset}" for line in prompt.split("\n")), end="")
            print(colored_text(tokenizer, new_tokens, comparison.statistics.calls[0], color))
            same = "identical" if comparison.identical else "DIFFERENT"
            print(f"[{same} to the text without specialists; tau {comparison.statistics.tau:.2f}]")

    stats = comparisons[0].statistics
    for comparison in comparisons[1:]:
        stats.records.extend(comparison.statistics.records)
    ratios = [ratio for comparison in comparisons for ratio in comparison.ratios]
    identical = sum(comparison.identical for comparison in comparisons)
    print(f"\noutputs identical: {identical} of {len(comparisons)}")
    print(describe_statistics(stats))
    print(describe_authors(stats))
    print(f"without specialists: {statistics.median(c.plain_rate for c in comparisons):.1f} tokens/s")
    print(f"with specialists:    {statistics.median(c.poss_rate for c in comparisons):.1f} tokens/s")
    print(
        f"speed-up: {statistics.median(ratios):.2f}x, median of {len(ratios)} paired runs "
        f"(lowest {min(ratios):.2f}, highest {max(ratios):.2f})"
    )
    return 0 if identical == len(comparisons) else 1


def _millions(model) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters"
