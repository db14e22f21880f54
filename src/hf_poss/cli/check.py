"""`hf-poss check`: is this pair of a target and its specialists sound?"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generate import add_model_arguments, check_folder, check_loading, load_target, target_names


if TYPE_CHECKING:
    from ..evaluation.check import Finding
    from ..evaluation.questions import Question


__all__ = ["add_arguments", "run"]

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, required=False)
    parser.add_argument("--poss", help="folder or Hub name of the specialists")
    parser.add_argument("--positions_per_specialist", type=int, help="for published checkpoints that do not say it")
    parser.add_argument("--demo", action="store_true", help="the pair that ships with the package (the default)")
    parser.add_argument(
        "--prompts",
        help='JSON lines with "prompt", "turns" or "messages" of which the first counts, or a prompt set of `hf-poss '
        "evaluate` (default: the first question of each of the papers' sets)",
    )
    parser.add_argument("--num_prompts", type=int, help="the first ones only (default: 6, with --fast 3)")
    parser.add_argument(
        "--chat", choices=("auto", "on", "off"), default="auto", help="the target's chat template (default: if any)"
    )
    parser.add_argument("--fast", action="store_true", help="less text: smaller faults go unnoticed")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="writes findings and their numbers there")


def run(args: argparse.Namespace) -> int:
    import dataclasses

    import transformers
    from tqdm.auto import tqdm

    from ..evaluation.check import FAST, THOROUGH, PairReport, check_pair

    _check(args)
    transformers.utils.logging.disable_progress_bar()
    misfit = None if args.demo else _misfit(args)
    if misfit is not None:
        _show(misfit)
        return _conclude(args, PairReport([misfit]), {})
    effort = FAST if args.fast else THOROUGH
    questions = _questions(args)[: args.num_prompts or effort.prompts]
    effort = dataclasses.replace(effort, prompts=len(questions))
    target, poss, tokenizer = _load(args)
    prompts = _token_ids(questions, tokenizer, args.chat)
    findings: list[Finding] = []
    with tqdm(desc="checks", leave=False, disable=not sys.stderr.isatty(), bar_format="{desc} {elapsed}") as bar:

        def found(finding: "Finding") -> None:
            findings.append(finding)
            bar.clear()
            _show(finding)

        try:
            check_pair(
                target,
                poss,
                tokenizer,
                prompts,
                drafter=args.poss,
                effort=effort,
                seed=args.seed,
                on_check=bar.set_description,
                on_finding=found,
            )
        except KeyboardInterrupt:
            print("hf-poss check: interrupted; there is no verdict", file=sys.stderr)
            return _INTERRUPTED
    return _conclude(args, PairReport(findings), _about(target, poss, questions))


def _check(args: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, options that do not go together, and models that cannot be loaded here.

    Raises:
        FileNotFoundError, ValueError: naming them.
    """
    if args.demo and args.target:
        raise ValueError("`--target` and `--demo` were given; expected one of them.")
    if bool(args.target) != bool(args.poss):
        raise ValueError(
            "`--target` and `--poss` go together; leave both out for the pair that ships with the package."
        )
    args.demo = not args.target
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"`--num_prompts {args.num_prompts}`; expected 1 or more.")
    if args.poss:
        check_folder(args.poss)
    check_loading(argparse.Namespace(**{**vars(args), "target": args.target or ""}))


def _misfit(args: argparse.Namespace) -> "Finding | None":
    """What keeps the pair from fitting, told by its configurations before the target's weights are read; None if
    nothing does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..checkpoints import is_published_layout
    from ..configuration_poss import PosSConfig
    from ..evaluation.check import Verdict
    from ..evaluation.check.fit import geometry

    if is_published_layout(args.poss, {}):  # its config is its target's: what it holds is told once it is loaded
        return None
    target_config = AutoConfig.from_pretrained(args.target, **target_names(args))
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config, trust_remote_code=args.trust_remote_code)
    finding = geometry(target, PosSConfig.from_pretrained(args.poss))
    return finding if finding.verdict is Verdict.FAILURE else None


def _questions(args: argparse.Namespace) -> "list[Question]":
    from ..evaluation.questions import PAPER_BENCHMARKS, demo_set, load_benchmark

    if args.prompts:
        return list(load_benchmark(args.prompts).questions)
    if args.demo:
        return list(demo_set(args.num_prompts or 6).questions)
    sets = [load_benchmark(name).questions for name in PAPER_BENCHMARKS]
    return [question for of_one_rank in zip(*sets, strict=False) for question in of_one_rank]


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from ..demo import load_demo_pair
    from ..modeling_poss import PosSModel, placement

    if args.demo:
        target, poss, tokenizer = load_demo_pair()
        device = args.device or "cpu"
        return target.to(device), poss.to(device), tokenizer
    given = (
        {} if args.positions_per_specialist is None else {"positions_per_specialist": args.positions_per_specialist}
    )
    poss = PosSModel.from_pretrained(args.poss, **given)  # the smaller one first: it may be no drafter at all
    target, tokenizer = load_target(args)
    device, dtype = placement(target)
    return target, poss.to(device=device, dtype=dtype).eval(), tokenizer


def _token_ids(questions: "list[Question]", tokenizer: Any, chat: str) -> list[list[int]]:
    """What the target reads of each question: its first turn.

    Raises:
        ValueError: if the chat template refuses one, or there is none and "on" asks for it.
    """
    from ..evaluation.dialogues import dialogue_maker, uses_chat_template

    begin = dialogue_maker(tokenizer, uses_chat_template(tokenizer, chat))
    dialogues = [begin(question) for question in questions]
    refused = [dialogue.refusal for dialogue in dialogues if not dialogue.prompt]
    if refused:
        raise ValueError(f"A prompt cannot be put to the target: {refused[0] or 'it holds no token'}.")
    return [dialogue.prompt for dialogue in dialogues]


def _about(target: Any, poss: Any, questions: "list[Question]") -> dict[str, Any]:
    from ..evaluation.descriptions import describe_target

    config = poss.config
    return {
        "target": describe_target(target),
        "drafter": {
            "name": config.name_or_path,
            "parameters": sum(parameter.numel() for parameter in poss.parameters()),
            "specialists": config.num_specialists,
            "positions_per_specialist": config.positions_per_specialist,
            "num_draft_positions": config.num_draft_positions,
        },
        "prompts": [question.id for question in questions],
    }


def _conclude(args: argparse.Namespace, report: Any, about: dict[str, Any]) -> int:
    """Prints the verdict and writes the file; returns the exit status."""
    from ..evaluation.check import Verdict
    from ..hub.provenance import command_line, describe_hardware, package_versions

    counts = [f"{len(report.of(verdict))} {verdict.value}" for verdict in Verdict if report.of(verdict)]
    print(f"\nverdict: {report.verdict} ({', '.join(counts)})")
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": command_line(["hf-poss", *sys.argv[1:]]),
            "hardware": describe_hardware(),
            "versions": package_versions(),
            **about,
            **report.to_dict(),
        }
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if report.is_sound else 1


def _show(finding: "Finding") -> None:
    lead = f"{finding.verdict.value:8} {finding.name:15} "
    _print(lead + finding.summary, len(lead))
    if finding.remedy:
        _print(" " * 9 + "what to do: " + finding.remedy, len(lead))


def _print(text: str, indent: int) -> None:
    """Wrapped for people; a line each for programs."""
    if sys.stdout.isatty():
        columns = max(shutil.get_terminal_size().columns, 2 * indent)
        text = textwrap.fill(text, columns, subsequent_indent=" " * indent)
    print(text, flush=True)
