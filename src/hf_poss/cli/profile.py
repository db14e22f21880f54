"""`hf-poss profile`: memory and latency of specialists, predicted and measured, and what pays."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generate import add_drafter_arguments, add_model_arguments, check_loading, load_target, target_names


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..candidate_generator import DraftSettings
    from ..configuration_poss import PosSConfig
    from ..evaluation.drafters import DrafterSpec
    from ..evaluation.profile import LoadedPair, Plan


__all__ = ["add_arguments", "run"]

_CONTEXTS, _POSITIONS = (128, 512, 2048), 6
_ASSUMED = "4.83"  # tau that PosS reports (arXiv 2506.03566)
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..evaluation.shapes import SHAPES

    add_model_arguments(parser, required=False)
    add_drafter_arguments(parser)
    parser.add_argument("--shape", help=f"random weights at the sizes of {', '.join(SHAPES)}, or of a config.json")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help=f"tokens of a prompt (default: {' '.join(map(str, _CONTEXTS))})"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="prompts a call (default: 1 4)")
    parser.add_argument("--new_tokens", type=int, default=128, help="room of a call (default: %(default)s)")
    parser.add_argument("--depth", type=int, help="draft positions a round (default: all that were trained)")
    parser.add_argument("--top_k", type=int, help="branches a node; 1 is a chain")
    parser.add_argument("--total_tokens", type=int, help="nodes verified a round")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that are timed (default: %(default)s)")
    parser.add_argument(
        "--predict_only", action="store_true", help="memory from the configs alone: no weights are loaded or made"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    parser.add_argument("--output", help="JSON file, written anew after every batch; a PNG of its name beside it")
    parser.add_argument("--resume", action="store_true", help="go on from the batches in `--output`")
    shape = parser.add_argument_group("with --shape")
    shape.add_argument(
        "--positions_per_specialist", type=int, nargs="+", default=[1, 2, 3], help="PosS-n for each (default: 1 2 3)"
    )
    shape.add_argument("--num_draft_positions", type=int, default=_POSITIONS, help="K (default: %(default)s)")
    shape.add_argument("--draft_vocab_size", type=int, help="tokens that are drafted from (default: all)")
    accepted = parser.add_argument_group("what drafts are accepted, for what pays")
    accepted.add_argument(
        "--acceptance", help=f"tau, or rates by draft position: 0.92,0.83,0.77 (default: tau {_ASSUMED}, assumed)"
    )
    accepted.add_argument("--results", help="results.json of `hf-poss evaluate`, with drafters of the same names")
    accepted.add_argument("--prompts", help="JSON lines to measure it on, greedily (default with --demo: its own)")
    accepted.add_argument("--chat", action="store_true", help="wrap prompts in the target's chat template")
    accepted.add_argument("--num_prompts", type=int, default=4, help="the first ones only (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    import transformers
    from tqdm.auto import tqdm

    from ..evaluation.profile import measure_case, memory_predictions

    specs = _check(args)
    transformers.utils.logging.disable_progress_bar()
    plan = _plan(args, specs)
    about = _about(args, plan)
    measured = _resumed(args, about)
    left = plan.cases[len(measured) :]
    steps = (len(plan.drafters) + 1) + (0 if args.predict_only else len(left) * (len(plan.drafters) + 2))
    result = {**about, "predictions": {}, "cases": measured}
    with tqdm(desc="predicting", total=steps, leave=False, disable=not sys.stderr.isatty()) as bar:
        try:
            result["predictions"] = memory_predictions(plan, bar.update)
            if not args.predict_only:
                bar.set_description("loading")
                pair, acceptance = _load(args, plan, specs)
                result["acceptance"] = acceptance
                for case in left:
                    bar.set_description(f"{case.rows} x {case.context} tokens")
                    measured.append(measure_case(plan, pair, case, args.repeats, bar.update))
                    _write(args, plan, result)
        except KeyboardInterrupt:
            if not result["predictions"]:
                raise
            bar.close()
            print(f"hf-poss profile: interrupted after {len(measured)} of {len(plan.cases)} batches", file=sys.stderr)
            _write(args, plan, result)
            _show(result)
            return _INTERRUPTED
    _write(args, plan, result)
    _show(result)
    return 0


def _check(args: argparse.Namespace) -> list["DrafterSpec"]:
    """The specialists that are asked for; refuses, before anything is loaded, what does not go together.

    Raises:
        FileNotFoundError, ValueError: naming it.
    """
    from ..demo import demo_folder
    from ..evaluation.drafters import parse_drafters
    from .generate import check_folder

    sources = [name for name in ("target", "shape") if getattr(args, name)] + ["demo"] * args.demo
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(f'`--{name}`' for name in sources)} were given; expected one of them.")
    if bool(args.target) != bool(args.poss):
        raise ValueError("`--target` and `--poss` go together; leave both out for the pair that ships here.")
    if args.shape:
        for name in ("prompts", "results", "chat", "load_in_4bit", "device_map"):
            if getattr(args, name):
                raise ValueError(f"`--{name}` goes with trained models; `--shape` has random weights.")
    if sum(bool(getattr(args, name)) for name in ("acceptance", "results", "prompts")) > 1:
        raise ValueError("`--acceptance`, `--results` and `--prompts` all say what is accepted; expected one of them.")
    for name, least in (("new_tokens", 2), ("repeats", 1), ("num_prompts", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name} {getattr(args, name)}`; expected {least} or more.")
    for name in ("contexts", "batch_sizes", "positions_per_specialist"):
        if any(value < 1 for value in getattr(args, name) or ()):
            raise ValueError(f"`--{name} {' '.join(map(str, getattr(args, name)))}`; expected numbers of 1 or more.")
    if args.resume and not args.output:
        raise ValueError("`--resume` goes on from the file of `--output`; name it.")
    if args.target is None and args.shape is None:
        args.demo, args.target, args.poss = True, str(demo_folder() / "target"), [f"poss={demo_folder() / 'poss'}"]
        args.dtype = "float32" if args.dtype == "auto" else args.dtype
    check_loading(argparse.Namespace(**{**vars(args), "target": args.target or ""}))
    specs = parse_drafters(args.poss)
    for spec in specs:
        if len(spec.checkpoints) > 1:
            raise ValueError(f"{spec.name} has {len(spec.checkpoints)} checkpoints; memory and time need one of them.")
        check_folder(spec.checkpoints[0])
    return specs


def _plan(args: argparse.Namespace, specs: list["DrafterSpec"]) -> "Plan":
    """What is profiled, from configs.

    Raises:
        ValueError: if a context and its new tokens do not fit the target, or a knob is impossible.
    """
    import torch
    from transformers import AutoConfig

    from ..configuration_poss import PosSConfig
    from ..evaluation.profile import Case, Plan
    from ..evaluation.shapes import shape_config

    device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    if args.shape:
        config = shape_config(args.shape)
        kinds = {"EAGLE": args.num_draft_positions, **{f"PosS-{n}": n for n in args.positions_per_specialist}}
        drafters = {
            name: PosSConfig.from_target_config(
                config,
                positions_per_specialist=n,
                num_draft_positions=args.num_draft_positions,
                draft_vocab_size=args.draft_vocab_size,
            )
            for name, n in kinds.items()
        }
    else:
        config = AutoConfig.from_pretrained(args.target, **target_names(args))
        drafters = {spec.name: _poss_config(spec.checkpoints[0]) for spec in specs}
    return Plan(
        target=config,
        drafters=drafters,
        settings={name: _settings(of, device, args) for name, of in drafters.items()},
        cases=[Case(context, rows) for context in _contexts(args, config) for rows in sorted(set(args.batch_sizes))],
        new_tokens=args.new_tokens,
        device=device,
        dtype=_dtype(args, config, device),
        attn_implementation=args.attn_implementation,
        unpredictable=_unpredictable(args),
    )


def _contexts(args: argparse.Namespace, config: "PreTrainedConfig") -> list[int]:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    room = positions - args.new_tokens
    if args.contexts is None:
        args.contexts = [context for context in _CONTEXTS if context <= room] or [max(room, 1)]
    if max(args.contexts) > room:
        raise ValueError(
            f"A context of {max(args.contexts)} tokens and {args.new_tokens} new ones do not fit into the {positions} "
            "positions of the target. Shorten `--contexts` or `--new_tokens`."
        )
    return sorted(set(args.contexts))


def _poss_config(path: str) -> "PosSConfig":
    """Of a saved drafter, or of a published one, whose number of layers is told by its weights' file."""
    from ..checkpoints import is_published_layout, read_published, reading
    from ..configuration_poss import PosSConfig

    with reading(path):
        return read_published(path, {})[0] if is_published_layout(path, {}) else PosSConfig.from_pretrained(path)


def _settings(config: "PosSConfig", device: "torch.device", args: argparse.Namespace) -> "DraftSettings":
    """Shape of the drafts, told without the drafter."""
    from types import SimpleNamespace

    from ..candidate_generator import DraftSettings

    knobs = SimpleNamespace(
        num_assistant_tokens=args.depth, draft_top_k=args.top_k, draft_total_tokens=args.total_tokens
    )
    return DraftSettings.of(SimpleNamespace(generation_config=knobs, config=config), device)


def _dtype(args: argparse.Namespace, config: "PreTrainedConfig", device: "torch.device") -> "torch.dtype":
    import torch

    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    if args.shape:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def _unpredictable(args: argparse.Namespace) -> str | None:
    if args.load_in_4bit:
        return "`--load_in_4bit` packs weights as they are loaded, and what of them is packed is not told by configs."
    if args.device_map:
        return "`--device_map` spreads the target over devices by what each has free."
    return None


def _load(args: argparse.Namespace, plan: "Plan", specs: list["DrafterSpec"]) -> tuple["LoadedPair", dict[str, Any]]:
    """The models, and what is accepted of their drafts."""
    import transformers

    from ..evaluation.drafters import load_specialists
    from ..evaluation.profile import LoadedPair
    from ..evaluation.shapes import random_poss, random_target

    transformers.set_seed(args.seed)
    tokenizer = None
    if args.shape:
        target = random_target(plan.target, plan.device, plan.dtype, args.attn_implementation)
        drafters = {
            name: random_poss(
                target,
                positions_per_specialist=config.positions_per_specialist,
                num_draft_positions=config.num_draft_positions,
                draft_vocab_size=config.draft_vocab_size,
            )
            for name, config in plan.drafters.items()
        }
    else:
        target, tokenizer = load_target(args)
        drafters = {spec.name: load_specialists(target, spec.checkpoints[0]) for spec in specs}
    pair = LoadedPair(target, drafters)
    return pair, _acceptance(args, plan, pair, tokenizer)


def _acceptance(args: argparse.Namespace, plan: "Plan", pair: "LoadedPair", tokenizer: Any) -> dict[str, Any]:
    """Acceptance by drafter, see [`~hf_poss.measures.continuation`], and where it is from.

    Raises:
        ValueError: if the results do not have a drafter.
    """
    from ..demo import demo_prompts
    from ..evaluation.acceptance import Acceptance
    from ..evaluation.profile import measured_acceptance
    from ..evaluation.prompts import batches, read_prompts
    from ..measures import continuation

    if args.results:
        pooled = json.loads(Path(args.results).read_text())["decodings"][0]["pooled"]
        missing = [name for name in plan.drafters if not pooled.get(name, {}).get("rounds")]
        if missing:
            raise ValueError(
                f"{args.results} has no acceptance of {', '.join(missing)}; it has {', '.join(pooled)}. Call the "
                "drafters as they are called there: `--poss NAME=PATH`."
            )
        rates = {name: continuation(pooled[name]["accepted"], pooled[name]["rounds"]) for name in plan.drafters}
        return {"from": args.results, "rates": rates}
    if args.prompts or (args.demo and not args.acceptance):
        texts = read_prompts(args.prompts)[: args.num_prompts] if args.prompts else demo_prompts(args.num_prompts)
        prompts = batches(texts, tokenizer, 1, pair.target.device, args.chat)
        rates = {
            name: measured_acceptance(pair.target, poss, plan.settings[name], prompts, args.new_tokens)
            for name, poss in pair.drafters.items()
        }
        return {"from": f"{len(texts)} prompts, greedy, {args.new_tokens} new tokens each", "rates": rates}
    rates = {
        name: Acceptance.of(args.acceptance or _ASSUMED, settings.depth).rates
        for name, settings in plan.settings.items()
    }
    return {"from": f"assumed: {args.acceptance or f'tau {_ASSUMED}'}", "rates": rates}


def _about(args: argparse.Namespace, plan: "Plan") -> dict[str, Any]:
    """Where the figures come from."""
    from dataclasses import asdict

    import torch

    from ..hub.provenance import command_line, describe_hardware, describe_processor, package_versions

    of = plan.target.get_text_config()
    return {
        "command": command_line(),
        "hardware": describe_hardware(),
        "processor": describe_processor(),
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "settings": {
            name: value
            for name, value in vars(args).items()
            if name not in ("command", "output", "resume") and value is not None
        },
        "target": {
            "name": args.shape or plan.target.name_or_path,
            "type": of.model_type,
            "layers": of.num_hidden_layers,
            "hidden_size": of.hidden_size,
            "vocab_size": of.vocab_size,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "weights": "random" if args.shape else "trained",
        },
        "drafters": {
            name: {
                "specialists": config.num_specialists,
                "positions_per_specialist": config.positions_per_specialist,
                "num_draft_positions": config.num_draft_positions,
                "draft_vocab_size": config.draft_vocab_size,
                "depth": plan.settings[name].depth,
                "top_k": plan.settings[name].top_k,
                "total_tokens": plan.settings[name].total_tokens,
            }
            for name, config in plan.drafters.items()
        },
        "planned": [asdict(case) for case in plan.cases],
    }


def _resumed(args: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches that `--output` holds already.

    Raises:
        ValueError: if they were measured with other settings, or on another machine.
    """
    from ..training.settings import check_same_settings

    if not args.resume or not Path(args.output).is_file():
        return []
    before = json.loads(Path(args.output).read_text())
    deciding = ("settings", "hardware", "device", "versions", "threads")
    check_same_settings(
        {name: before[name] for name in deciding}, {name: about[name] for name in deciding}, args.output
    )
    return before["cases"]


def _write(args: argparse.Namespace, plan: "Plan", result: dict[str, Any]) -> None:
    """Completes the result by what pays, and writes it."""
    from ..evaluation.profile import break_even
    from ..evaluation.profile_figure import plot_profile
    from ..training.settings import write_json

    if result["cases"] and "acceptance" in result:  # an interrupted run may not have got to it
        result["break_even"] = break_even(plan, result["cases"], result["acceptance"]["rates"])
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
        plot_profile(Path(args.output).with_suffix(".png"), result)


def _show(result: dict[str, Any]) -> None:
    from ..evaluation.profile_tables import break_even_table, latency_table, memory_table, switching_table

    target = result["target"]
    print(
        f"target: {target['name']}, {target['layers']} layers of width {target['hidden_size']}, {target['dtype']}, "
        f"{target['weights']} weights"
    )
    print(f"{result['hardware']}; {', '.join(f'{name} {version}' for name, version in result['versions'].items())}")
    print(f"$ {result['command']}")
    print(f"\n## Memory\n\n{memory_table(result['planned'], result['predictions'], result['cases'])}")
    for name, of in result["predictions"].items():
        if "reason" in of:
            print(f"{name}: not predicted. {of['reason']}")
    if not result["cases"]:
        return
    print(f"\n## Latency\n\n{latency_table(result['cases'])}")
    if switching := switching_table(result["cases"]):
        print(f"\n## Switching specialists\n\n{switching}")
    if "break_even" not in result:
        return
    print(f"\n## What pays\n\n{break_even_table(result['break_even'])}")
    print(f"\nAcceptance: {result['acceptance']['from']}.")
