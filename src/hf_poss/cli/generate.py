"""`hf-poss generate`: a prompt, a target and its specialists."""

import argparse


__all__ = ["add_arguments", "add_model_arguments", "load_target", "run"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="folder or Hub name of the target")
    parser.add_argument("--dtype", default="auto", help="of the target: float32, bfloat16... (default: as stored)")
    parser.add_argument("--device", help="cpu, cuda... (default: an accelerator if there is one)")


def load_target(args: argparse.Namespace):
    """The target and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = args.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype).to(device).eval()
    return target, AutoTokenizer.from_pretrained(args.target)


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
    parser.add_argument("--depth", type=int, help="draft positions a round (default: all that were trained)")
    parser.add_argument("--top_k", type=int, help="branches a node; 1 is a chain")
    parser.add_argument("--total_tokens", type=int, help="nodes verified a round")
    parser.add_argument("--compare", action="store_true", help="time it against plain generate, three paired runs")


def run(args: argparse.Namespace) -> int:
    import statistics

    import transformers

    from ..evaluation import compare_speed
    from ..modeling_poss import PosSModel
    from ..statistics import collect_statistics
    from .display import colored_text, describe_authors, describe_statistics, legend, uses_color

    transformers.utils.logging.disable_progress_bar()
    target, tokenizer = load_target(args)
    given = (
        {} if args.positions_per_specialist is None else {"positions_per_specialist": args.positions_per_specialist}
    )
    poss = PosSModel.from_pretrained(args.poss, **given).to(target.device).eval()
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
