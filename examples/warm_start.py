"""Warm start: specialists that begin as copies of an EAGLE layer against specialists that begin from random weights.

    python examples/warm_start.py                                  # the demo target; an EAGLE layer is trained first
    python examples/warm_start.py --target TARGET --eagle EAGLE    # a checkpoint of your own

Both learn the same samples, written by the target itself, in the same order and with the same settings, for each of
`--seeds`. Every `--eval_steps` both draft greedily on held-out prompts. The table shows the mean tau of `generate` by
step, and the step at which each run first reaches the last tau of the other start.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments
from hf_poss.demo import demo_folder
from hf_poss.hub.provenance import describe_hardware


STARTS = ("random", "EAGLE")


def own_text(target: PreTrainedModel, count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Samples that the target writes: drawn from its distribution, from the beginning of a text on."""
    set_seed(seed)
    samples = []
    for _ in tqdm(range(0, count, 64), desc="texts of the target"):
        first = torch.full((64, 1), target.config.bos_token_id, device=target.device)
        knobs = {"do_sample": True, "top_k": 0, "max_new_tokens": length - 1, "pad_token_id": 0}
        texts = target.generate(first, attention_mask=torch.ones_like(first), **knobs)
        samples += [{"input_ids": text} for text in texts.tolist()]
    return samples[:count]


def train(
    poss: PosSModel,
    target: PreTrainedModel,
    samples: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    steps: int,
    seed: int,
    args: argparse.Namespace,
) -> dict[int, float]:
    """tau of `generate` on the beginnings of `held_out`, by step."""
    arguments = PosSTrainingArguments(
        args.output,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=args.learning_rate,
        losses=args.losses,
        feature_noise=0.0,
        logging_steps=args.eval_steps,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=True,
        eval_generate_prompts=args.prompts,
        eval_generate_tokens=args.new_tokens,
        save_strategy="no",
        use_cpu=target.device.type == "cpu",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = PosSTrainer(poss, target, arguments, train_dataset=samples, eval_dataset=held_out)
    trainer.train()
    return {log["step"]: log["eval_generate_tau"] for log in trainer.state.log_history if "eval_generate_tau" in log}


def first_step(curve: dict[int, float], tau: float) -> int | None:
    return next((step for step, value in curve.items() if value >= tau), None)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default=str(demo_folder() / "target"))
    parser.add_argument("--eagle", help="checkpoint of one layer; one is trained for --eagle_steps if not given")
    parser.add_argument("--eagle_steps", type=int, default=300)
    parser.add_argument("--positions_per_specialist", type=int, default=2)
    parser.add_argument("--num_draft_positions", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval_steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--losses", default="token=1.0")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/warm_start"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32").to(device).eval()
    samples = own_text(target, args.samples, args.length, seed=0)
    held_out = own_text(target, max(64, args.prompts), args.length, seed=1)

    eagle = args.eagle
    if eagle is None:
        set_seed(0)
        layer = PosSModel.from_target(target, positions_per_specialist=1, num_draft_positions=1)
        train(layer, target, samples, held_out, args.eagle_steps, 0, args)
        eagle = args.output / "eagle"
        layer.save_pretrained(eagle)

    spans = {
        "positions_per_specialist": args.positions_per_specialist,
        "num_draft_positions": args.num_draft_positions,
    }
    curves: dict[str, list[dict[int, float]]] = {start: [] for start in STARTS}
    for seed in args.seeds:
        for start in STARTS:
            set_seed(seed)
            if start == "random":
                poss = PosSModel.from_target(target, **spans)
            else:
                poss = PosSModel.from_eagle(str(eagle), dtype="float32", **spans).to(device)
            curves[start].append(train(poss, target, samples, held_out, args.steps, seed, args))

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {describe_hardware()}")
    print(
        f"{Path(args.target).name}: K = {args.num_draft_positions}, n = {args.positions_per_specialist}, "
        f"{args.samples} samples of {args.length} tokens, batch {args.batch_size}, {args.losses}, "
        f"learning rate {args.learning_rate}, seeds {args.seeds}\n"
    )
    print("| step | " + " | ".join(f"tau, {start} start" for start in STARTS) + " |")
    print("|---|" + "---|" * len(STARTS))
    for step in curves["random"][0]:
        means = [statistics.mean(curve[step] for curve in curves[start]) for start in STARTS]
        print(f"| {step} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    for start, other in (STARTS, STARTS[::-1]):
        steps = [
            first_step(one, list(two.values())[-1]) for one, two in zip(curves[other], curves[start], strict=True)
        ]
        told = ", ".join("never" if step is None else str(step) for step in steps)
        print(f"Step at which the {other} start reaches the last tau of the {start} start, by seed: {told}")
    args.output.mkdir(parents=True, exist_ok=True)
    arguments = vars(args) | {"target": Path(args.target).name, "eagle": Path(eagle).name, "output": None}
    (args.output / "curves.json").write_text(json.dumps({"arguments": arguments, "curves": curves}, indent=1))


if __name__ == "__main__":
    main()
