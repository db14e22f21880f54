"""What the draft phase of a round costs, beside what it cost in an earlier version of this package.

    git worktree add ../before f5176bb
    python examples/draft_phase.py --baseline ../before --draft_vocab_size 4000 --json draft_phase.json

A random target of 32 layers, hidden size 512 and 32k tokens, a random prompt, six draft positions; both versions run
in turns, each in a process of its own. Nothing is accepted, which a draft phase does not depend on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a round's draft phase and verification, by the version that Python imports."""
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_poss import PosSModel, collect_statistics

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    target = LlamaForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    poss = PosSModel.from_target(target, positions_per_specialist=2, num_draft_positions=6).eval()
    if args.draft_vocab_size is not None:
        poss.set_draft_vocabulary(torch.arange(config.vocab_size, 0, -1), args.draft_vocab_size)
    prompt = torch.randint(0, config.vocab_size, (1, args.context))
    knobs = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}

    def run(new_tokens: int) -> Any:
        with collect_statistics() as stats:
            target.generate(prompt, assistant_model=poss, max_new_tokens=new_tokens, **knobs)
        return stats

    run(4)
    # The prompt is in the long runs too: what a short run takes is taken off.
    long, short = run(args.new_tokens), run(2)
    rounds = long.rounds - short.rounds
    return {
        "drafting": 1e3 * (long.drafting_seconds - short.drafting_seconds) / rounds,
        "verifying": 1e3 * (long.verifying_seconds - short.verifying_seconds) / rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", help="checkout of the earlier version, which drafts from all tokens")
    parser.add_argument("--draft_vocab_size", type=int, help="tokens that this version drafts from (default: all)")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=24, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return

    here = Path(__file__).resolve().parents[1]
    vocabulary = [] if args.draft_vocab_size is None else ["--draft_vocab_size", str(args.draft_vocab_size)]
    versions = {"now": (here, vocabulary)}
    if args.baseline:
        versions["baseline"] = (Path(args.baseline).resolve(), [])
    times: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for _ in range(args.repeats):
        for name, (checkout, options) in versions.items():
            command = [sys.executable, __file__, "--worker", "--context", str(args.context), *options]
            environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
            done = subprocess.run(
                [*command, "--new_tokens", str(args.new_tokens)], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"The version in {checkout} failed:\n{done.stderr}")
            times[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {part: statistics.median(run[part] for run in runs) for part in runs[0]} for name, runs in times.items()
    }

    from hf_poss.hub.provenance import command_line, describe_hardware, package_versions

    result = {
        "command": command_line(),
        "hardware": describe_hardware(),
        "versions": package_versions(),
        "milliseconds_a_round": medians,
        "runs": times,
    }
    if args.baseline:
        result["drafting_share_of_baseline"] = medians["now"]["drafting"] / medians["baseline"]["drafting"]
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}, indent=2))


if __name__ == "__main__":
    main()
