"""A draft vocabulary: tau that is lost against time that is won, by size.

    python examples/draft_vocabulary.py                                   # the shipped pair
    python examples/draft_vocabulary.py --target TARGET --poss SPECIALISTS    # and a pair of your own

The tokens of the shipped pair are counted in its training text, and its prompts are held out of that; those of another
pair in texts that the target writes, and its prompts begin other ones. Plain `generate` and all sizes take turns on
every prompt, and the tokens that each writes are compared with plain `generate`'s. The time of the head alone, one
draft pass of `--branches` nodes, is measured on random weights of larger shapes too.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from hf_poss import PosSConfig, PosSModel, collect_statistics
from hf_poss.corpus_counts import corpus_counts
from hf_poss.demo import demo_prompts, load_demo_pair, training_sources
from hf_poss.draft_vocabulary import DraftHead
from hf_poss.hub.provenance import command_line, describe_hardware, package_versions
from hf_poss.modeling_poss import TargetReference


PROMPT_TOKENS = 16  # of a text that a target wrote


def own_texts(target: PreTrainedModel, count: int, length: int, seed: int) -> list[list[int]]:
    """Texts that the target writes, drawn from its distribution from the beginning on."""
    set_seed(seed)
    texts = []
    for _ in tqdm(range(0, count, 64), desc="texts of the target"):
        first = torch.full((64, 1), target.config.bos_token_id, device=target.device)
        knobs = {"do_sample": True, "top_k": 0, "max_new_tokens": length - 1, "pad_token_id": 0}
        texts += target.generate(first, attention_mask=torch.ones_like(first), **knobs).tolist()
    return texts[:count]


def seconds_of(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start, result


def measure_pair(
    name: str,
    target: PreTrainedModel,
    poss: PosSModel,
    counts: torch.LongTensor,
    prompts: list[torch.LongTensor],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Sizes of a pair's draft vocabulary, all tokens first, with the times of every repeat."""
    vocab_size = poss.config.vocab_size
    sizes = [round(vocab_size * share) for share in args.shares]
    knobs = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens, "do_sample": False}

    def write(size: int | None, prompt: torch.LongTensor) -> torch.LongTensor:
        assistant = {"assistant_model": drafters[size]} if size is not None else {}
        return target.generate(prompt, attention_mask=torch.ones_like(prompt), **assistant, **knobs)

    drafters = {size: copy.deepcopy(poss).set_draft_vocabulary(None) for size in sizes}
    for size in sizes:
        if size < vocab_size:
            drafters[size].set_draft_vocabulary(counts, size)

    written = [write(None, prompt) for prompt in prompts]
    new = torch.cat([text[0, prompt.shape[1] :] for text, prompt in zip(written, prompts, strict=True)]).cpu()
    rows = {}
    for size in sizes:
        with collect_statistics() as stats:
            texts = [write(size, prompt) for prompt in prompts]
        kept = torch.arange(vocab_size) if size == vocab_size else drafters[size].draft_vocabulary.cpu()
        rows[size] = {
            "size": size,
            "covered": float(counts[kept].sum() / counts.sum()),
            "covered_of_the_text": float(torch.isin(new, kept).double().mean()),
            "tau": stats.tau,
            "rounds": stats.rounds,
            "identical": all(torch.equal(one, other) for one, other in zip(texts, written, strict=True)),
            "seconds": [],
        }
    plain_seconds = []
    for repeat in tqdm(range(args.repeats), desc=name):
        turns = [None, *sizes]
        turns = turns[repeat % len(turns) :] + turns[: repeat % len(turns)]
        totals = dict.fromkeys(turns, 0.0)
        for prompt, text in zip(prompts, written, strict=True):
            for size in turns:
                seconds, found = seconds_of(lambda size=size, prompt=prompt: write(size, prompt), target.device)
                totals[size] += seconds
                if size is not None:
                    rows[size]["identical"] &= torch.equal(found, text)
        plain_seconds.append(totals.pop(None))
        for size, seconds in totals.items():
            rows[size]["seconds"].append(seconds)
    for row in rows.values():
        ratios = [plain / own for plain, own in zip(plain_seconds, row["seconds"], strict=True)]
        row["round_milliseconds"] = 1e3 * statistics.median(row["seconds"]) / row["rounds"]
        row["speed_up"], row["lowest"], row["highest"] = statistics.median(ratios), min(ratios), max(ratios)
    return {
        "pair": name,
        "vocabulary": vocab_size,
        "hidden_size": poss.config.hidden_size,
        "counted_tokens": int(counts.sum()),
        "prompts": len(prompts),
        "new_tokens": args.max_new_tokens,
        "plain_seconds": plain_seconds,
        "sizes": list(rows.values()),
    }


def measure_head(shape: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The k best tokens of one draft pass by size of the draft vocabulary, at random weights."""
    hidden, vocab_size = map(int, shape.split("x"))
    dtype = getattr(torch, args.head_dtype)
    config = PosSConfig(vocab_size=vocab_size, hidden_size=hidden, num_attention_heads=1)
    head = torch.nn.Linear(hidden, vocab_size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    features = torch.randn(1, args.branches, hidden, device=device, dtype=dtype)
    order = torch.randperm(vocab_size, device=device)
    vocabularies = {round(vocab_size * share): order[: round(vocab_size * share)] for share in args.shares}
    heads = {
        size: DraftHead(TargetReference(None, head, config), None if size == vocab_size else vocabulary)
        for size, vocabulary in vocabularies.items()
    }
    times: dict[int, list[float]] = {size: [] for size in heads}
    for _ in range(args.head_repeats + 2):
        for size, cut in heads.items():
            times[size].append(seconds_of(lambda cut=cut: cut.top(features, args.branches), device)[0])
    milliseconds = {size: 1e3 * statistics.median(runs[2:]) for size, runs in times.items()}
    return {"hidden_size": hidden, "vocabulary": vocab_size, "dtype": args.head_dtype, "milliseconds": milliseconds}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", help="folder or Hub name of another pair's target")
    parser.add_argument("--poss", help="folder or Hub name of its specialists")
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--sources", type=int, help="files of the shipped pair's training text to count (default: all)"
    )
    parser.add_argument("--texts", type=int, default=1024, help="that another pair's target writes to be counted")
    parser.add_argument("--heads", nargs="*", default=["512x32000", "4096x128256"], metavar="HIDDENxVOCABULARY")
    parser.add_argument("--head_dtype", default="bfloat16")
    parser.add_argument("--head_repeats", type=int, default=20)
    parser.add_argument("--branches", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("runs/draft_vocabulary.json"))
    args = parser.parse_args(argv)
    if (args.target is None) != (args.poss is None):
        parser.error("--target and --poss make a pair: give both or none.")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    target, poss, tokenizer = load_demo_pair()
    sources = list(training_sources().values())[: args.sources]
    counts = corpus_counts(sources, poss.config.vocab_size, tokenizer)
    prompts = [tokenizer(text, return_tensors="pt").input_ids.to(device) for _, text in demo_prompts(args.prompts)]
    pairs = [measure_pair("demo", target.to(device), poss.to(device), counts, prompts, args)]
    if args.target is not None:
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32").to(device).eval()
        poss = PosSModel.from_pretrained(args.poss, dtype="float32").to(device).eval()
        counts = corpus_counts(own_texts(target, args.texts, 128, seed=0), poss.config.vocab_size)
        beginnings = own_texts(target, args.prompts, PROMPT_TOKENS, seed=1)
        prompts = [torch.tensor([text], device=device) for text in beginnings]
        pairs.append(measure_pair(Path(args.poss).name, target, poss, counts, prompts, args))
    heads = [measure_head(shape, args, device) for shape in args.heads]

    machine, versions, command = describe_hardware(), package_versions(), command_line()
    arguments = vars(args) | {"json": args.json.name}
    for name in ("target", "poss"):  # a machine's folders concern nobody else
        if arguments[name] is not None:
            arguments[name] = Path(arguments[name]).name
            command = command.replace(getattr(args, name), arguments[name])
    print(f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(command)
    for pair in pairs:
        print(
            f"\n{pair['pair']}: {pair['prompts']} prompts, {pair['new_tokens']} new tokens each, greedy, "
            f"{args.repeats} repeats\n"
        )
        print("| tokens | of the counted text | of what is written | tau | ms a round | speed-up | identical |")
        print("|---|---|---|---|---|---|---|")
        for row in pair["sizes"]:
            print(
                f"| {row['size']:,} | {row['covered']:.1%} | {row['covered_of_the_text']:.1%} | {row['tau']:.2f} | "
                f"{row['round_milliseconds']:.2f} | {row['speed_up']:.2f} ({row['lowest']:.2f} to "
                f"{row['highest']:.2f}) | {'yes' if row['identical'] else 'NO'} |"
            )
    for head in heads:
        print(
            f"\nHead of {head['hidden_size']} x {head['vocabulary']:,}, random {head['dtype']} weights: one draft "
            f"pass of {args.branches} nodes\n"
        )
        print("| tokens | ms |")
        print("|---|---|")
        for size, milliseconds in head["milliseconds"].items():
            print(f"| {size:,} | {milliseconds:.3f} |")
    record = {
        "command": command,
        "machine": machine,
        "versions": versions,
        "arguments": arguments,
        "pairs": pairs,
        "heads": heads,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
