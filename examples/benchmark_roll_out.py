"""Peak memory and tokens per second of a training step, against the naive formulation of the same roll-out.

    python examples/benchmark_roll_out.py                                   # small shapes, any machine
    python examples/benchmark_roll_out.py --hidden_size 4096 --intermediate_size 14336 --num_attention_heads 32 \
        --num_key_value_heads 8 --vocab_size 128256 --dtype bfloat16        # a Llama-3-8B's, on an accelerator

Naive: one masked softmax over all rows for each draft position, whose scores [rows, rows] wait for backward, and
logits [batch, rows, vocab] of each position. Both compute the same losses and gradients, which is checked. Every
measurement is a process of its own, the two alternate; a step is forward and backward of the drafter alone, on random
features. Memory is what a step adds to weights and gradients: of the allocator on an accelerator, else of the process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_poss import PosSConfig, PosSModel
from hf_poss.hub.provenance import describe_hardware
from hf_poss.modeling_poss import TargetReference


def naive_loss(poss: PosSModel, input_ids: torch.LongTensor, features: torch.Tensor) -> torch.Tensor:
    """Feature loss and a tenth of the soft cross-entropy, all positions, means over rows."""
    target_features, stream, tokens = features[:, 1:], features[:, :-1], input_ids[:, 1:]
    rows, reference = stream.shape[1], poss.reference
    row = torch.arange(rows, device=stream.device)
    rotary = poss.rotary(stream, row[None])
    embeddings = reference.embed(tokens, like=stream)
    target_probabilities = reference.logits(target_features).softmax(-1)
    fused, loss = [], 0.0
    for position in range(1, poss.config.num_draft_positions + 1):
        fused.append(poss.fuse(embeddings, stream))
        layer = poss.specialist(position)
        query = layer.queries(fused[-1], rotary)
        pairs = [layer.keys_values(part, rotary) for part in fused]
        keys, values = (
            torch.cat(
                [pair[part].repeat_interleave(query.shape[1] // pair[part].shape[1], dim=1) for pair in pairs], 2
            )
            for part in (0, 1)
        )  # [batch, heads, position * rows, head_dim]
        k = position - 1
        seen = [row[None] <= row[:, None] - k] + [row[None] == row[:, None] - k + j for j in range(1, position)]
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~torch.cat(seen, dim=-1), float("-inf")).softmax(-1)
        predicted = layer.complete(fused[-1], weights @ values)
        log_probabilities = reference.logits(predicted).log_softmax(-1)
        token_loss = -(target_probabilities * log_probabilities).sum(-1).mean()
        loss = loss + F.smooth_l1_loss(predicted.float(), target_features.float()) + 0.1 * token_loss
        stream = torch.cat((stream[:, :1], predicted.detach()[:, :-1]), dim=1)
    return loss


def roll_out_loss(poss: PosSModel, input_ids: torch.LongTensor, features: torch.Tensor) -> torch.Tensor:
    return poss(input_ids=input_ids, features=features, losses={"feature": 1.0, "token": 0.1}).loss


LOSSES = {"naive": naive_loss, "hf_poss": roll_out_loss}


def make_poss(args: argparse.Namespace, device: torch.device) -> PosSModel:
    torch.manual_seed(0)
    config = PosSConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        positions_per_specialist=2,
        num_draft_positions=6,
    )
    dtype = getattr(torch, args.dtype)
    head = nn.Linear(args.hidden_size, args.vocab_size, bias=False).to(device, dtype).requires_grad_(False)
    embedding = nn.Embedding(args.vocab_size, args.hidden_size).to(device, dtype).requires_grad_(False)
    poss = PosSModel(config).to(device, dtype).train()
    poss.reference = TargetReference(embedding, head, config)
    return poss


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the timed steps and bytes of a step, of one formulation at one length."""
    accelerated = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    poss = make_poss(args, device)
    loss_of = LOSSES[args.formulation]

    def step(tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(tokens)
        input_ids = torch.randint(args.vocab_size, (args.batch_size, tokens), generator=generator).to(device)
        features = torch.randn(args.batch_size, tokens, args.hidden_size, generator=generator).to(device, poss.dtype)
        loss = loss_of(poss, input_ids, features)
        loss.backward()
        return loss.detach()

    step(16)  # weights, gradients and libraries are there
    before = peak_memory(device)
    seconds = []
    for _ in range(args.steps):
        poss.zero_grad(set_to_none=False)
        synchronise(device)
        start = time.perf_counter()
        loss = step(args.tokens)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    gradient = sum(parameter.grad.double().square().sum().item() for parameter in poss.parameters()) ** 0.5
    bytes_ = peak_memory(device) - before
    return {"seconds": statistics.median(seconds), "bytes": bytes_, "loss": loss.item(), "gradient": gradient}


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, default=1408)
    parser.add_argument("--num_attention_heads", type=int, default=8)
    parser.add_argument("--num_key_value_heads", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes a formulation and length")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--formulation", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.formulation:
        print(json.dumps(measure(args)))
        return

    given = sys.argv[1:] if argv is None else argv
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    plan = [(tokens, name) for tokens in args.lengths for _ in range(args.repeats) for name in LOSSES]
    for tokens, name in tqdm(plan, desc="processes", disable=not sys.stderr.isatty()):
        command = [sys.executable, __file__, *given, "--formulation", name, "--tokens", str(tokens)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.setdefault((tokens, name), []).append(json.loads(output.splitlines()[-1]))

    print(
        f"K = 6, n = 2, batch {args.batch_size}, hidden {args.hidden_size}, vocabulary {args.vocab_size}, {args.dtype}"
    )
    print(f"torch {torch.__version__}, {describe_hardware()}\n")
    print("| T | naive MiB | hf_poss MiB | memory | naive tokens/s | hf_poss tokens/s | speed |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for tokens in args.lengths:
        naive, ours = (
            {key: statistics.median(run[key] for run in runs[tokens, name]) for key in runs[tokens, name][0]}
            for name in LOSSES
        )
        for key in ("loss", "gradient"):
            if abs(naive[key] - ours[key]) > (1e-3 if args.dtype == "float32" else 5e-2) * abs(naive[key]):
                raise ArithmeticError(f"T = {tokens}: {key} {naive[key]} (naive) and {ours[key]} differ.")
        rates = [args.batch_size * tokens / result["seconds"] for result in (naive, ours)]
        memory = ours["bytes"] / max(naive["bytes"], 1)
        rows.append(
            {"tokens": tokens, "naive": naive, "hf_poss": ours, "memory": memory, "speed": rates[1] / rates[0]}
        )
        print(
            f"| {tokens} | {naive['bytes'] / 2**20:.0f} | {ours['bytes'] / 2**20:.0f} | {memory:.2f} | "
            f"{rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f}x |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
