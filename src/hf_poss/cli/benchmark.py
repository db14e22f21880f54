"""`hf-poss benchmark`: all ways to decode in turns on the same prompts, and where the time of a round goes."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from .generate import add_model_arguments, check_folder, check_loading, load_assistant


__all__ = ["add_arguments", "run"]

_DEFAULT = ["plain", "plain-compiled", "prompt-lookup", "poss-chain", "poss-tree", "poss-auto", "poss-compiled"]
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..evaluation.contestants import CONTESTANTS
    from ..evaluation.shapes import SHAPES

    add_model_arguments(parser, required=False)
    parser.add_argument("--poss", help="folder or Hub name of the specialists")
    parser.add_argument("--demo", action="store_true", help="the pair that ships with the package (the default)")
    parser.add_argument(
        "--shape",
        help=f"random weights at the sizes of {', '.join(SHAPES)}, or of a config.json; a script accepts drafts",
    )
    parser.add_argument("--assistant", help="folder or Hub name of a smaller language model to set beside them")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        metavar="NAME",
        help="; ".join(f"{name}: {text}" for name, text in CONTESTANTS.items()),
    )
    parser.add_argument("--prompts", help='JSON lines with "prompt", or "turns" of which the first counts')
    parser.add_argument(
        "--num_prompts", type=int, help="the first ones only (default: all of a file, else 6; 2 of a shape)"
    )
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the target's chat template")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts a call (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens a text (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs a prompt and contestant (default: %(default)s)"
    )
    parser.add_argument("--depth", type=int, help="draft positions a round (default: all that were trained)")
    parser.add_argument("--top_k", type=int, help="branches a node")
    parser.add_argument("--total_tokens", type=int, help="nodes verified a round")
    parser.add_argument("--prompt_lookup_num_tokens", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--output", help="JSON file, written anew after every repeat")
    parser.add_argument("--resume", action="store_true", help="go on from the repeats in `--output`")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts (default: %(default)s)")
    shape = parser.add_argument_group("with --shape")
    shape.add_argument(
        "--acceptance", default="4.83", help="tau, or rates by draft position: 0.92,0.83,0.77 (default: %(default)s)"
    )
    shape.add_argument("--context", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    shape.add_argument("--positions_per_specialist", type=int, default=2, help="n (default: %(default)s)")
    shape.add_argument("--num_draft_positions", type=int, default=6, help="K (default: %(default)s)")
    shape.add_argument("--draft_vocab_size", type=int, help="tokens that are drafted from (default: all)")


def run(args: argparse.Namespace) -> int:
    import transformers
    from tqdm.auto import tqdm

    from ..evaluation.benchmark import Benchmark
    from ..evaluation.contestants import fixed_settings, make_contestants

    _check(args)
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(args.seed)
    load = _random_pair if args.shape else _trained_pair
    target, poss, prompts, acceptance, simulated = load(args)
    settings = fixed_settings(poss, target.device, args.depth, args.top_k, args.total_tokens)
    names = args.contestants or [name for name in _DEFAULT if not (args.shape and name == "prompt-lookup")]
    names = [*names, "assistant"] if args.assistant and "assistant" not in names else names
    assistant = load_assistant(args.assistant, target) if args.assistant else None
    contestants = make_contestants(names, poss, settings, target.device, assistant, args.prompt_lookup_num_tokens)
    bar = tqdm(desc="runs", leave=False, disable=not sys.stderr.isatty())
    benchmark = Benchmark(target, poss, contestants, prompts, args.new_tokens, acceptance, on_run=bar.update)
    about = {**_about(args, target, poss), "simulated": simulated}
    done = _resumed(args, about, benchmark)
    specialists = sum(contestant.has_specialists for contestant in contestants)
    bar.total = benchmark.steps * (1 + args.repeats - done) + specialists
    roofline = None
    try:
        with bar:
            bar.set_description("warm-up")
            benchmark.warm_up()
            bar.set_description("profile")
            benchmark.profile()
            roofline = benchmark.roofline()
            while done < args.repeats:
                bar.set_description(f"repeat {done + 1}")
                benchmark.repeat(done + 1)
                done += 1
                _write(args, about, benchmark, roofline)
    except KeyboardInterrupt:
        if not done:
            raise
        print(f"hf-poss benchmark: interrupted; what follows is of {done} complete repeats", file=sys.stderr)
        benchmark.runs = [run for run in benchmark.runs if run.repeat <= done]
        _show(_result(args, about, benchmark, roofline))
        return _INTERRUPTED
    _show(_write(args, about, benchmark, roofline))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, options that do not go together, and models that cannot be loaded here.

    Raises:
        FileNotFoundError, ValueError: naming them.
    """
    sources = [name for name in ("target", "shape") if getattr(args, name)] + ["demo"] * args.demo
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(f'`--{name}`' for name in sources)} were given; expected one of them.")
    if bool(args.target) != bool(args.poss):
        raise ValueError(
            "`--target` and `--poss` go together; leave both out for the pair that ships with the package."
        )
    if args.shape:
        for name in ("prompts", "chat", "assistant", "load_in_4bit", "device_map"):
            if getattr(args, name):
                raise ValueError(f"`--{name}` goes with trained models; `--shape` has random weights and prompts.")
    elif args.draft_vocab_size is not None:
        raise ValueError("`--draft_vocab_size` goes with `--shape`; a trained drafter has its own draft vocabulary.")
    for name in ("new_tokens", "batch_size", "context", "num_prompts"):
        value = getattr(args, name)
        if value is not None and value < (2 if name == "new_tokens" else 1):
            raise ValueError(f"`--{name} {value}`; expected {2 if name == 'new_tokens' else 1} or more.")
    if args.repeats < 1:
        raise ValueError(f"`--repeats {args.repeats}`; expected 1 or more.")
    if args.resume and not args.output:
        raise ValueError("`--resume` goes on from the file of `--output`; name it.")
    for name in filter(None, (args.poss, args.assistant)):
        check_folder(name)
    check_loading(argparse.Namespace(**{**vars(args), "target": args.target or ""}))


def _trained_pair(args: argparse.Namespace) -> tuple[Any, Any, list, None, list[str]]:
    """Target, specialists and prompts of trained models; nothing is simulated."""
    from ..demo import demo_prompts, load_demo_pair
    from ..evaluation.prompts import batches, read_prompts
    from ..modeling_poss import PosSModel, placement
    from .generate import load_target

    if args.target:
        target, tokenizer = load_target(args)
        poss = PosSModel.from_pretrained(args.poss).to(placement(target)[0]).eval()
    else:
        target, poss, tokenizer = load_demo_pair()
        target, poss = target.to(args.device or "cpu"), poss.to(args.device or "cpu")
    if args.prompts:
        texts = read_prompts(args.prompts)[: args.num_prompts]
    else:
        texts = demo_prompts(args.num_prompts or 6)
    return target, poss, batches(texts, tokenizer, args.batch_size, target.device, args.chat), None, []


def _random_pair(args: argparse.Namespace) -> tuple[Any, Any, list, Any, list[str]]:
    """Target and specialists of random weights, random prompts, and the script by which drafts are accepted."""
    import torch

    from ..evaluation.acceptance import Acceptance
    from ..evaluation.shapes import shape_config
    from ..evaluation.simulation import simulated_pair

    device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    if args.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, args.dtype)
    pair = simulated_pair(
        shape_config(args.shape),
        args.shape,
        device,
        dtype,
        Acceptance.of(args.acceptance, args.depth or args.num_draft_positions),
        args.attn_implementation,
        args.seed,
        positions_per_specialist=args.positions_per_specialist,
        num_draft_positions=args.num_draft_positions,
        draft_vocab_size=args.draft_vocab_size,
    )
    prompts = pair.prompts(args.num_prompts or 2, args.batch_size, args.context, args.seed)
    return pair.target, pair.poss, prompts, pair.acceptance, pair.labels


def _about(args: argparse.Namespace, target: Any, poss: Any) -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    from ..evaluation.descriptions import describe_target
    from ..hub.provenance import command_line, describe_hardware, describe_processor, package_versions

    return {
        "command": command_line(),
        "hardware": describe_hardware(),
        "processor": describe_processor(),
        "device": str(target.device),
        "versions": package_versions(),
        "settings": {
            name: value
            for name, value in vars(args).items()
            if name not in ("command", "output", "resume", "repeats") and value is not None
        },
        "target": describe_target(target, args.shape),
        "drafter": {
            "parameters": sum(parameter.numel() for parameter in poss.parameters()),
            "specialists": poss.config.num_specialists,
            "positions_per_specialist": poss.config.positions_per_specialist,
            "num_draft_positions": poss.config.num_draft_positions,
            "draft_vocab_size": poss.config.draft_vocab_size,
            "dtype": str(poss.dtype).removeprefix("torch."),
        },
        "threads": torch.get_num_threads(),
        "decoding": "greedy",
    }


def _result(args: argparse.Namespace, about: dict[str, Any], benchmark: Any, roofline: Any) -> dict[str, Any]:
    from ..evaluation.report import figures

    return {**about, **figures(benchmark, roofline), "repeats_wanted": args.repeats}


def _write(args: argparse.Namespace, about: dict[str, Any], benchmark: Any, roofline: Any) -> dict[str, Any]:
    result = _result(args, about, benchmark, roofline)
    if args.output:
        part = Path(f"{args.output}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(part, args.output)  # never half a file
    return result


def _resumed(args: argparse.Namespace, about: dict[str, Any], benchmark: Any) -> int:
    """Repeats that `--output` holds already, whose runs the benchmark takes over.

    Raises:
        ValueError: if they were run with other settings, or on another machine.
    """
    from ..evaluation.benchmark import Run

    if not args.resume or not Path(args.output).is_file():
        return 0
    before = json.loads(Path(args.output).read_text())
    for name in ("settings", "hardware", "device", "versions", "threads"):
        if before[name] != about[name]:
            raise ValueError(
                f"{args.output} was measured with other {name}: {before[name]}, now {about[name]}. Resume with the "
                "same, or name another file."
            )
    benchmark.runs = [Run(**run) for run in before["runs"]]
    return before["repeats"]


def _show(result: dict[str, Any]) -> None:
    from ..evaluation.report import tables

    target, drafter = result["target"], result["drafter"]
    print(
        f"target: {target['name']}, {target['layers']} layers of width {target['hidden_size']}, "
        f"{target['parameters'] / 1e6:.1f}M parameters, {target['dtype']}; drafter: {drafter['specialists']} "
        f"specialists for {drafter['num_draft_positions']} positions, {drafter['parameters'] / 1e6:.1f}M parameters"
    )
    print(f"{result['hardware']}; {', '.join(f'{name} {version}' for name, version in result['versions'].items())}")
    print(f"$ {result['command']}")
    for line in result["simulated"]:
        print(f"SIMULATED {line}")
    prompts = result["prompts"]
    print(
        f"{result['repeats']} repeats on {len(prompts)} prompts of {prompts[0]['rows']} row(s), greedy, up to "
        f"{result['settings']['new_tokens']} new tokens\n"
    )
    print(tables(result))
