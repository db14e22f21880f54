"""What a round costs as the context grows, and as drafts get deeper: a table, JSON and a plot.

    python examples/benchmark_context.py                                        # small shapes, any machine
    python examples/benchmark_context.py --shape llama-3-8b --dtype bfloat16    # at real sizes, on an accelerator

Target and specialists have random weights, and a script accepts drafts (see `hf-poss benchmark --shape`); the JSON
says so. A round's drafting is to grow with the frontier and the context that it attends to, not with the square of
anything.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_poss.evaluation.acceptance import Acceptance
from hf_poss.evaluation.benchmark import Benchmark
from hf_poss.evaluation.contestants import fixed_settings, make_contestants
from hf_poss.evaluation.report import figures
from hf_poss.evaluation.shapes import SHAPES, shape_config
from hf_poss.evaluation.simulation import SimulatedPair, simulated_pair
from hf_poss.hub.provenance import command_line, describe_hardware, package_versions


DRAFTING = ("context fill", "draft passes", "tree building")


def measure(pair: SimulatedPair, context: int, depth: int, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """The parts of a round, and a plain step beside it, all in milliseconds."""
    device = pair.target.device
    settings = fixed_settings(pair.poss, device, depth, args.top_k, args.total_tokens)
    contestants = make_contestants(["poss-tree"], pair.poss, settings, device)
    acceptance = Acceptance(pair.acceptance.rates, depth)
    prompts = pair.prompts(1, 1, context, args.seed)
    benchmark = Benchmark(pair.target, pair.poss, contestants, prompts, args.new_tokens, acceptance)
    benchmark.profile()
    if benchmark.failures:
        raise RuntimeError(f"Context {context}, depth {depth}: {benchmark.failures['poss-tree']}")
    bar.update()
    for repeat in range(1, args.repeats + 1):
        benchmark.repeat(repeat)
        bar.update()
    plain, poss = (figures(benchmark)["contestants"][name] for name in ("plain", "poss-tree"))
    breakdown = poss["breakdown"]
    # The specialists read the prompt in the first round of a call; over few rounds of a long context that is much.
    fill = breakdown["prompt_context_fill_milliseconds"] / breakdown["rounds"]
    step, round_ = 1e3 * plain["step_seconds"]["median"], 1e3 * poss["round_seconds"]["median"] - fill
    parts = {name: part["milliseconds"] for name, part in breakdown["parts"].items()}
    return {
        "context": context,
        "depth": depth,
        "tau": poss["tau"],
        "plain_step_milliseconds": step,
        "round_milliseconds": round_,
        # The time of a long prompt varies by more than a few steps take.
        "rho": round_ / step if step > 0.01 else None,
        "parts_milliseconds": parts,
        "drafting_milliseconds": sum(parts[name] for name in DRAFTING),
        "draft_pass_milliseconds": breakdown["draft_pass_milliseconds"],
        "prompt_milliseconds": breakdown["prompt_milliseconds"],
        "prompt_context_fill_milliseconds": breakdown["prompt_context_fill_milliseconds"],
        "drafting_overhead": poss["drafting_overhead"]["ratio"],
    }


def plot(path: Path, by_context: list[dict[str, Any]], by_depth: list[dict[str, Any]], title: str) -> None:
    """Milliseconds of a round's parts against context length, and of its drafting against depth, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    contexts = [row["context"] for row in by_context]
    for label, values in (
        ("drafting", [row["drafting_milliseconds"] for row in by_context]),
        ("verification forward", [row["parts_milliseconds"]["verification forward"] for row in by_context]),
        ("the rest of a round", [_rest(row) for row in by_context]),
        ("a plain step", [row["plain_step_milliseconds"] for row in by_context]),
    ):
        left.plot(contexts, values, marker="o", label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(contexts, [str(context) for context in contexts])
    left.set(xlabel="context, tokens", ylabel="ms a round", ylim=(0, None))
    left.legend(fontsize=8)
    depths = [row["depth"] for row in by_depth]
    right.plot(depths, [row["drafting_milliseconds"] for row in by_depth], marker="o", label="drafting")
    deepest = by_depth[-1]["draft_pass_milliseconds"]
    right.bar(range(1, len(deepest) + 1), deepest, color="0.8", label=f"each pass of depth {depths[-1]}")
    right.set(xlabel="draft positions", ylabel="ms a round", ylim=(0, None))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})


def _rest(row: dict[str, Any]) -> float:
    parts = row["parts_milliseconds"]
    return sum(value for name, value in parts.items() if name not in (*DRAFTING, "verification forward"))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-32x512", help=f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--layers", type=int, help="of the target, to read long prompts sooner (default: the shape's)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6, 8, 12])
    parser.add_argument("--depth", type=int, default=6, help="where the context varies (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="where the depth varies (default: %(default)s)")
    parser.add_argument("--top_k", type=int, help="branches a node")
    parser.add_argument("--total_tokens", type=int, help="nodes verified a round")
    parser.add_argument("--acceptance", default="4.83", help="tau at `--depth` (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each setting (default: %(default)s)")
    parser.add_argument("--device", help="(default: an accelerator if there is one)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to, anew after every setting")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    config = shape_config(args.shape)
    if args.layers is not None:
        config.num_hidden_layers = args.layers
    name = args.shape if args.layers is None else f"{args.shape} with {args.layers} layers"
    acceptance = Acceptance.of(args.acceptance, args.depth)
    pair = simulated_pair(config, name, device, getattr(torch, args.dtype), acceptance, seed=args.seed)
    result: dict[str, Any] = {
        "command": command_line(),
        "hardware": describe_hardware(),
        "versions": package_versions(),
        "shape": name,
        "dtype": args.dtype,
        "simulated": pair.labels,
        "by_context": [],
        "by_depth": [],
    }
    plan = [("by_context", context, args.depth) for context in args.contexts]
    plan += [("by_depth", args.context, depth) for depth in args.depths]
    with tqdm(total=(len(plan) + 1) * (1 + args.repeats), desc="runs", disable=not sys.stderr.isatty()) as bar:
        measure(pair, min(args.contexts), args.depth, args, bar)  # libraries and clocks are warm
        for kind, context, depth in plan:
            result[kind].append(measure(pair, context, depth, args, bar))
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")

    print(f"{name}, {args.dtype}; {result['hardware']}, torch {torch.__version__}")
    for label in pair.labels:
        print(f"SIMULATED {label}")
    print("\n| context | depth | plain step, ms | round, ms | rho | drafting, ms | verification, ms | overhead |")
    print("|---|---|---|---|---|---|---|---|")
    for row in result["by_context"] + result["by_depth"]:
        rho = "–" if row["rho"] is None else f"{row['rho']:.2f}"
        print(
            f"| {row['context']} | {row['depth']} | {row['plain_step_milliseconds']:.2f} | "
            f"{row['round_milliseconds']:.2f} | {rho} | {row['drafting_milliseconds']:.2f} | "
            f"{row['parts_milliseconds']['verification forward']:.2f} | {row['drafting_overhead']:.2f} |"
        )
    if args.plot:
        plot(args.plot, result["by_context"], result["by_depth"], f"{name}, {args.dtype}, {result['hardware']}")


if __name__ == "__main__":
    main()
