"""`hf-poss evaluate`: the papers' experiments on a target of one's own."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from .generate import (
    add_drafter_arguments,
    add_model_arguments,
    check_folder,
    check_loading,
    draft_size,
    load_assistant,
    load_target,
    target_names,
)


__all__ = ["add_arguments", "run"]

_MAX_NEW_TOKENS, _DEMO_NEW_TOKENS = 1024, 128  # the first is the papers'
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..evaluation.drafters import BASELINES
    from ..evaluation.questions import BENCHMARKS, PAPER_BENCHMARKS

    add_model_arguments(parser, required=False)
    add_drafter_arguments(parser)
    parser.add_argument(
        "--baselines", nargs="+", choices=BASELINES, default=[], help="of transformers; plain decoding always runs"
    )
    parser.add_argument("--assistant", help="folder or Hub name of a smaller language model to set beside them")
    parser.add_argument("--prompt_lookup_num_tokens", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument(
        "--output", default="evaluation", help="folder; the same command again goes on (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="drop the records in `--output` and begin anew")

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}, paths of JSON lines files, hub:owner/name[:split]; by commas or spaces "
        f"(default: {','.join(PAPER_BENCHMARKS)})",
    )
    prompts.add_argument("--limit", type=int, help="the first questions of each set only")
    prompts.add_argument(
        "--chat", choices=("auto", "on", "off"), default="auto", help="the target's chat template (default: if any)"
    )
    prompts.add_argument("--system", help="system message")

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max_new_tokens", type=int, help=f"of an answer (default: {_MAX_NEW_TOKENS})")
    decoding.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0], help="one or several; 0 for greedy (default: 0)"
    )
    decoding.add_argument("--seeds", type=int, nargs="+", default=[0], help="of sampled runs (default: 0)")
    decoding.add_argument(
        "--generate", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="arguments of `generate`"
    )
    decoding.add_argument("--depth", type=draft_size, help="draft positions a round, or auto (default: the drafter's)")
    decoding.add_argument("--top_k", type=int, help="branches a node; 1 is a chain")
    decoding.add_argument("--total_tokens", type=draft_size, help="nodes verified a round, or auto")
    decoding.add_argument(
        "--batch_sizes",
        "--batch_size",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="questions a call, one or several numbers (default: 1)",
    )
    decoding.add_argument(
        "--cache_implementation", choices=("dynamic", "static"), help="static: fixed shapes, compiled on a GPU"
    )

    measures = parser.add_argument_group("measures")
    measures.add_argument(
        "--drift", action=argparse.BooleanOptionalAction, default=True, help="feature drift, in greedy runs"
    )
    measures.add_argument(
        "--breakdown_questions", type=int, default=2, help="of a set, for the time of a round (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    import transformers

    from ..evaluation.dialogues import dialogue_maker, uses_chat_template
    from ..evaluation.records import EvaluationFolder
    from ..evaluation.runner import make_units

    specs, knobs = _check(args)
    sets = _sets(args)
    transformers.utils.logging.disable_progress_bar()
    processes = _processes(args)
    config, tokenizer = _config_and_tokenizer(args)
    chat = uses_chat_template(tokenizer, args.chat)
    begin = dialogue_maker(tokenizer, chat, args.system)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    room = None if positions is None else positions - args.max_new_tokens
    sets = _fitting(sets, begin, room, processes.is_main_process)
    settings = _settings(args, sets, chat, tokenizer, knobs)
    folder = EvaluationFolder(args.output)
    if args.overwrite:
        if processes.is_main_process:
            folder.clear()
        processes.wait_for_everyone()
    folder.check(settings)  # what can be told before a large target is loaded

    evaluation = _evaluation(args, specs, knobs, begin, room)
    if processes.is_main_process:
        folder.begin(_about(args, settings, evaluation, processes.num_processes))
    units = make_units(sets, args.temperature, args.seeds, args.batch_sizes, args.breakdown_questions)
    finished = {record.key for record in folder.records()}
    missing = [unit for unit in units if evaluation.missing(unit, finished)]
    processes.wait_for_everyone()  # all deal out the same units, before any of them is done
    own = missing[processes.process_index :: processes.num_processes]
    try:
        _run_units(evaluation, own, finished, folder, processes)
    except KeyboardInterrupt:
        if processes.is_main_process:
            print("hf-poss evaluate: interrupted; the same command goes on. So far:", file=sys.stderr)
            _show(folder)
        return _INTERRUPTED
    processes.wait_for_everyone()
    if processes.is_main_process:
        _show(folder)
    processes.destroy_process_group()
    return 0


def _check(args: argparse.Namespace) -> tuple[list, dict[str, Any]]:
    """Methods, and arguments of `generate`; refuses, before anything is loaded, what could not run.

    Raises:
        FileNotFoundError, ValueError: naming it.
    """
    from ..evaluation.decoding_settings import parse_knobs
    from ..evaluation.drafters import ASSISTANT, parse_drafters
    from ..evaluation.html_report import check_packages

    check_packages()
    if args.demo and args.target:
        raise ValueError("`--target` and `--demo` were given; expected one of them.")
    args.demo = not args.target
    specs = parse_drafters(args.poss)
    if args.demo:
        for name in ("poss", "assistant", "revision", "load_in_4bit", "device_map"):
            if getattr(args, name):
                raise ValueError(f"`--{name}` goes with `--target`; the pair that ships with the package has its own.")
    args.baselines = list(dict.fromkeys([*args.baselines, *([ASSISTANT] if args.assistant else [])]))
    if not (specs or args.baselines or args.demo):
        raise ValueError("Nothing drafts for `--target`: name specialists with `--poss NAME=PATH`, or `--baselines`.")
    if ASSISTANT in args.baselines and not args.assistant:
        raise ValueError("`--baselines assistant` needs a smaller language model: pass `--assistant`.")
    if args.baselines and (1 not in args.batch_sizes or args.cache_implementation == "static"):
        option = "--batch_sizes 1" if 1 not in args.batch_sizes else "dynamic caches"
        raise ValueError(
            f"transformers runs {' and '.join(args.baselines)} with {option} only. Leave `--baselines` and "
            "`--assistant` out, or evaluate them to a folder of their own."
        )
    if args.max_new_tokens is None:
        args.max_new_tokens = _DEMO_NEW_TOKENS if args.demo else _MAX_NEW_TOKENS
    least = {"max_new_tokens": 2, "limit": 1, "prompt_lookup_num_tokens": 1, "breakdown_questions": 0}
    least |= {"top_k": 1, "depth": 1, "total_tokens": 2}
    for name, value in least.items():
        given = getattr(args, name)
        if isinstance(given, int) and given < value:
            raise ValueError(f"`--{name} {given}`; expected {value} or more.")
    for temperature in args.temperature:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`--temperature {temperature}`; expected 0 (greedy) or more.")
    for size in args.batch_sizes:
        if size < 1:
            raise ValueError(f"`--batch_sizes {size}`; expected 1 or more.")
    for name in ("temperature", "seeds", "batch_sizes"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    knobs = parse_knobs(args.generate)
    for path in [path for spec in specs for path in spec.checkpoints] + ([args.assistant] if args.assistant else []):
        check_folder(path)
    check_loading(argparse.Namespace(**{**vars(args), "target": args.target or ""}))
    return specs, knobs


def _sets(args: argparse.Namespace) -> list:
    from ..evaluation.questions import PAPER_BENCHMARKS, QuestionSet, demo_set, load_benchmarks

    if args.demo and not args.benchmarks:
        demo = demo_set()
        return [QuestionSet(demo.name, demo.questions[: args.limit], demo.source, demo.license)]
    return load_benchmarks(args.benchmarks or PAPER_BENCHMARKS, args.limit)


def _processes(args: argparse.Namespace) -> Any:
    """The processes that `accelerate launch` or `torchrun` started. They wait for each other at the ends only, which
    may be days apart."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError("`hf-poss evaluate` needs accelerate: pip install 'hf-poss[evaluation]'.") from error
    return PartialState(cpu=args.device == "cpu", timeout=timedelta(days=30))


def _config_and_tokenizer(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    from ..demo import demo_folder

    name, options = (demo_folder() / "target", {}) if args.demo else (args.target, target_names(args))
    return AutoConfig.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name, **options)


def _fitting(sets: Sequence, begin: Any, room: int | None, tells: bool) -> list:
    """The sets with the questions that the target takes.

    Raises:
        ValueError: if no question is left.
    """
    from transformers.utils import logging

    from ..evaluation.runner import fitting_questions

    logger, kept, reason = logging.get_logger(__name__), [], None
    for questions in sets:
        fitting, why = fitting_questions(questions, begin, room)
        if fitting.skipped and tells:
            logger.warning(f"{fitting.name}: {fitting.skipped} questions are left out; the last one: {why}.")
        kept.append(fitting)
        reason = why or reason
    if not any(questions.questions for questions in kept):
        raise ValueError(
            f"No question is left of {', '.join(questions.name for questions in kept)}: {reason}. Lower "
            "`--max_new_tokens`, or choose sets with shorter prompts."
        )
    return kept


def _settings(
    args: argparse.Namespace, sets: Sequence, chat: bool, tokenizer: Any, knobs: dict[str, Any]
) -> dict[str, Any]:
    """What `evaluation.json` says that is known before the models are loaded."""
    from ..hub.provenance import package_versions

    template = str(tokenizer.chat_template).encode()
    return {
        "versions": package_versions(),
        "revision": args.revision,
        "attn_implementation": args.attn_implementation,
        "load_in_4bit": args.load_in_4bit,
        "benchmarks": [questions.about() for questions in sets],
        "temperatures": args.temperature,
        "seeds": args.seeds,
        "batch_sizes": args.batch_sizes,
        "max_new_tokens": args.max_new_tokens,
        "chat": chat,
        "chat_template": hashlib.sha256(template).hexdigest()[:16] if chat else None,
        "system": args.system,
        "generate": knobs,
        "cache_implementation": args.cache_implementation,
        "drift": args.drift,
        "breakdown_questions": args.breakdown_questions,
    }


def _evaluation(args: argparse.Namespace, specs: Sequence, knobs: dict[str, Any], begin: Any, room: int | None) -> Any:
    """All models, and how they decode."""
    from ..demo import load_demo_pair
    from ..evaluation.decoding_settings import DecodingSettings, padding_token
    from ..evaluation.drafters import (
        PROMPT_LOOKUP,
        DrafterSpec,
        assistant_drafter,
        load_specialists,
        plain_drafter,
        prompt_lookup_drafter,
        specialists_drafter,
    )
    from ..evaluation.runner import EvaluationRun
    from ..training.regeneration import end_tokens

    drafters = [plain_drafter()]
    if args.demo:
        target, poss, tokenizer = load_demo_pair()
        target, poss = target.to(args.device or "cpu"), poss.to(args.device or "cpu")
        specs, models = [DrafterSpec("poss", ("demo-poss",))], [[poss]]
    else:
        target, tokenizer = load_target(args)
        models = [[load_specialists(target, path) for path in spec.checkpoints] for spec in specs]
    if PROMPT_LOOKUP in args.baselines:
        drafters.append(prompt_lookup_drafter(args.prompt_lookup_num_tokens))
    if args.assistant:
        drafters.append(assistant_drafter(load_assistant(args.assistant, target), args.assistant))
    sizes = {
        "num_assistant_tokens": args.depth,
        "draft_top_k": args.top_k,
        "draft_total_tokens": args.total_tokens,
    }
    drafters += [specialists_drafter(spec, of, target.device, sizes) for spec, of in zip(specs, models, strict=True)]
    ends = knobs.get("eos_token_id", end_tokens(target, tokenizer))
    ends = [ends] if isinstance(ends, int) else ends or []
    vocab_size = target.config.get_text_config().vocab_size
    others = {name: value for name, value in knobs.items() if name != "eos_token_id"}
    decoding = DecodingSettings(
        args.max_new_tokens, ends, padding_token(tokenizer, ends, vocab_size), others, args.cache_implementation
    )
    return EvaluationRun(target, tokenizer, drafters, begin, decoding, room, args.drift)


def _about(args: argparse.Namespace, settings: dict[str, Any], evaluation: Any, processes: int) -> dict[str, Any]:
    """All that `evaluation.json` says."""
    from ..evaluation.descriptions import describe_target
    from ..evaluation.drafters import weights_digest
    from ..hub.provenance import command_line, describe_hardware

    target = evaluation.target
    return {
        "command": command_line(["hf-poss", *sys.argv[1:]]),
        "hardware": describe_hardware(),
        "device": target.device.type,
        "processes": processes,
        "target": {**describe_target(target), "weights": weights_digest(target)},
        "drafters": [drafter.about() for drafter in evaluation.drafters],
        **settings,
    }


def _run_units(evaluation: Any, units: Sequence, finished: set, folder: Any, processes: Any) -> None:
    """Runs the units of this process, and shows how far they are."""
    from tqdm.auto import tqdm

    if not units:
        return
    total = sum(len(evaluation.missing(unit, finished)) for unit in units)
    with (
        folder.writer(processes.process_index) as output,
        tqdm(desc="warm-up", total=total, unit="call", disable=not processes.is_main_process) as bar,
    ):
        for name in evaluation.warm_up(units):
            bar.set_postfix_str(name)
        for unit in units:
            rows = f", batch size {unit.batch_size}" if unit.batch_size > 1 else ""
            bar.set_description(f"{unit.benchmark}, temperature {unit.temperature:g}{rows}")
            for name in evaluation.run(unit, output, finished):
                bar.set_postfix_str(name, refresh=False)
                bar.update()


def _show(folder: Any) -> None:
    """Writes tables, figures and the report of all records that there are, and prints the table."""
    from . import report

    if not any(True for _ in folder.records()):
        print(f"{folder.path}: no complete record yet.")
        return
    report.run(argparse.Namespace(folder=folder.path, output=None, title=None))
