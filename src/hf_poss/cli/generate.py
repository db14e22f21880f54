"""`hf-poss generate`: a prompt, a target and its specialists."""

import argparse
import json
import os
from typing import Any


__all__ = [
    "add_arguments",
    "add_model_arguments",
    "check_folder",
    "check_loading",
    "draft_size",
    "load_assistant",
    "load_target",
    "run",
    "target_names",
]


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--target", required=required, help="folder or Hub name of the target")
    parser.add_argument("--revision", help="branch, tag or commit of the target's repository")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the target")
    parser.add_argument("--dtype", default="auto", help="of the target: float32, bfloat16... (default: as stored)")
    parser.add_argument("--attn_implementation", help="of the target: sdpa, eager, flash_attention_2...")
    parser.add_argument("--load_in_4bit", action="store_true", help="pack the target's weights (NF4, bitsandbytes)")
    parser.add_argument("--device", help="cpu, cuda... (default: an accelerator if there is one)")
    parser.add_argument(
        "--device_map", help="spreads the target over the devices of one process: auto, balanced... or JSON"
    )


def add_drafter_arguments(parser: argparse.ArgumentParser) -> None:
    """Of commands that set drafters side by side."""
    parser.add_argument(
        "--poss",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="specialists (PosS, EAGLE or HASS): folders or Hub names; NAME=PATH,PATH for several training seeds",
    )
    parser.add_argument("--demo", action="store_true", help="the pair that ships with the package (the default)")


def target_names(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say which target it is."""
    return {"revision": args.revision, "trust_remote_code": args.trust_remote_code}


def check_loading(args: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, what [`load_target`] could not do here.

    Raises:
        FileNotFoundError: if the target is a folder that is not there.
        ValueError: if torch does not know the dtype or the machine has no such device, bitsandbytes is asked for and
            absent, or each of several processes would take all devices.
    """
    import torch
    from transformers.utils import is_bitsandbytes_available

    check_folder(args.target)
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f"`--dtype {args.dtype}` is unknown; expected auto, float32, bfloat16 or float16.")
    if args.device is not None:
        _check_device(args.device)
    if args.device_map and args.device_map[0] == "{":
        try:
            json.loads(args.device_map)
        except json.JSONDecodeError as error:
            raise ValueError(f'`--device_map` is no JSON: {error}. It reads like \'{{"": "cpu"}}\'.') from error
    if args.load_in_4bit and not is_bitsandbytes_available():
        raise ValueError(
            "`--load_in_4bit` needs bitsandbytes and a device that it supports. Install it (pip install "
            "bitsandbytes), or load the target in bfloat16: `--dtype bfloat16`."
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.device_map and processes > 1:
        raise ValueError(
            f"`--device_map {args.device_map}` spreads the target over all devices of a process, and {processes} "
            "processes were launched. Leave it out: each then loads the target on a device of its own; or start one "
            "process with python."
        )


def check_folder(name: str) -> None:
    """Refuses a name that can only be a local folder and is none, which the Hub would take for a bad name.

    Raises:
        FileNotFoundError: naming it.
    """
    if name.startswith(("/", ".", "~")) and not os.path.isdir(name):
        raise FileNotFoundError(f"There is no folder {name}.")


def _check_device(name: str) -> None:
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"`--device {name}` is unknown; expected cpu, cuda, cuda:1, mps...") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind not in ("cpu", accelerator and accelerator.type):
        found = "has no accelerator" if accelerator is None else f"has {accelerator.type}"
        raise ValueError(f"`--device {name}`: this machine {found}. Leave it out for what there is.")


def load_target(args: argparse.Namespace, device: Any = None) -> tuple[Any, Any]:
    """The target and its tokenizer. Each of several processes loads it whole, on a device of its own.

    Args:
        args: of [`add_model_arguments`].
        device: where to put it, if `args` does not say.

    Raises:
        FileNotFoundError, ValueError: see [`check_loading`].
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import is_accelerate_available

    check_loading(args)
    options = {**target_names(args), "dtype": args.dtype, "attn_implementation": args.attn_implementation}
    if args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    device = torch.device(args.device or device or _local_device())
    if args.device_map:
        options["device_map"] = json.loads(args.device_map) if args.device_map[0] == "{" else args.device_map
    elif device.type != "cpu" and is_accelerate_available():
        options["device_map"] = {"": device}  # read right onto the device, not by way of the host's memory
    target = AutoModelForCausalLM.from_pretrained(args.target, **options)
    if "device_map" not in options:
        target = target.to(device)
    return target.eval(), AutoTokenizer.from_pretrained(args.target, **target_names(args))


def load_assistant(name: str, target: Any) -> Any:
    """A smaller language model in the dtype of `target`, on its device."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype).to(target.device).eval()


def _local_device() -> Any:
    """The accelerator of this process, of several on a machine; the CPU where there is none."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--poss", required=True, help="folder or Hub name of the specialists")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the target's chat template")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--positions_per_specialist", type=int, help="for published checkpoints that do not say it")
    parser.add_argument(
        "--depth", type=draft_size, help="draft positions a round, or auto (default: all that were trained)"
    )
    parser.add_argument("--top_k", type=int, help="branches a node; 1 is a chain")
    parser.add_argument("--total_tokens", type=draft_size, help="nodes verified a round, or auto")
    parser.add_argument(
        "--cache_implementation", choices=("dynamic", "static"), help="static: fixed shapes, compiled on a GPU"
    )
    parser.add_argument("--compare", action="store_true", help="time it against plain generate, three paired runs")


def draft_size(value: str) -> int | str:
    """An integer, or "auto".

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if value != "auto" and not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is neither an integer nor auto")
    return value if value == "auto" else int(value)


def run(args: argparse.Namespace) -> int:
    import statistics

    import transformers

    from ..evaluation import compare_speed
    from ..modeling_poss import PosSModel, placement
    from ..statistics import collect_statistics
    from .display import colored_text, describe_authors, describe_statistics, legend, uses_color

    transformers.utils.logging.disable_progress_bar()
    target, tokenizer = load_target(args)
    given = (
        {} if args.positions_per_specialist is None else {"positions_per_specialist": args.positions_per_specialist}
    )
    poss = PosSModel.from_pretrained(args.poss, **given).to(placement(target)[0]).eval()
    for knob, value in (
        ("num_assistant_tokens", args.depth),
        ("draft_top_k", args.top_k),
        ("draft_total_tokens", args.total_tokens),
    ):
        if value is not None:
            setattr(poss.generation_config, knob, value)

    if args.chat:
        messages = [{"role": "user", "content": args.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(target.device) for name in ("input_ids", "attention_mask")}
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    knobs = {"max_new_tokens": args.max_new_tokens, **(sampling if args.temperature else {"do_sample": False})}
    if args.cache_implementation is not None:
        knobs["cache_implementation"] = args.cache_implementation

    transformers.set_seed(args.seed)
    with collect_statistics() as stats:
        output = target.generate(**inputs, **knobs, assistant_model=poss)[0].tolist()
    new_tokens = output[inputs["input_ids"].shape[1] :]
    color = uses_color()
    print(args.prompt + colored_text(tokenizer, new_tokens, stats.calls[0], color))
    if color:
        print(f"\nwritten by: {legend(poss.config.num_specialists)}")
    print("\n" + describe_statistics(stats))
    print(describe_authors(stats))
    if args.compare:
        comparison = compare_speed(target, poss, inputs, **knobs)
        if not args.temperature:
            print(f"output identical to plain generate: {'yes' if comparison.identical else 'no'}")
        print(f"without specialists: {comparison.plain_rate:.1f} tokens/s")
        print(f"with specialists:    {comparison.poss_rate:.1f} tokens/s")
        print(f"speed-up: {statistics.median(comparison.ratios):.2f}x, median of {len(comparison.ratios)} paired runs")
    return 0
