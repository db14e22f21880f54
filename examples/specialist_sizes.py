"""What specialists weigh: full layers against one shared layer with a LoRA adapter for each (`specialist_adapter`).

    python examples/specialist_sizes.py                                    # the shape of a Llama-3-8B
    python examples/specialist_sizes.py --target TARGET --ranks 8 32       # of a folder or Hub name; config alone

Models are made on the `meta` device: nothing is downloaded but a config, and no memory is needed.
"""

import argparse

import peft
import torch
import transformers
from transformers import AutoConfig, LlamaConfig

from hf_poss import PosSConfig, PosSModel


LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)


def parameters(target: transformers.PreTrainedConfig, n: int, k: int, rank: int | None) -> tuple[int, int]:
    """Specialists, and parameters of a drafter of PosS-`n` with `k` draft positions; full layers if `rank` is None."""
    adapter = None if rank is None else {"r": rank}
    config = PosSConfig.from_target_config(
        target, positions_per_specialist=n, num_draft_positions=k, fc_bias=False, specialist_adapter=adapter
    )
    with torch.device("meta"):
        return config.num_specialists, PosSModel(config).num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a target's folder or Hub name (default: the shape of a Llama-3-8B)")
    parser.add_argument("--positions_per_specialist", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--num_draft_positions", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    args = parser.parse_args()
    target = LLAMA_3_8B if args.target is None else AutoConfig.from_pretrained(args.target)

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    print(f"hidden size {target.get_text_config().hidden_size}, {args.num_draft_positions} draft positions")
    print("| Drafter | Specialists | Parameters (M) | bfloat16 (MB) | of full layers |")
    print("|---|---|---|---|---|")
    for n in args.positions_per_specialist:
        full = None
        for rank in (None, *args.ranks):
            specialists, count = parameters(target, n, args.num_draft_positions, rank)
            full = full or count
            kind = "full layers" if rank is None else f"LoRA, r = {rank}"
            size = count * torch.bfloat16.itemsize / 1e6
            print(f"| PosS-{n}, {kind} | {specialists} | {count / 1e6:.1f} | {size:.0f} | {count / full:.0%} |")


if __name__ == "__main__":
    main()
