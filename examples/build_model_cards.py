"""Writes model_cards/: of the published PosS checkpoints, and of the demo pair's drafter.

    python examples/build_model_cards.py --output model_cards

What it tells of the published checkpoints comes from the authors' paper (arXiv 2506.03566) and code, and is marked as
theirs; the demo pair's figures were measured by the commands that its card names.
"""

import argparse
from pathlib import Path

from hf_poss import PosSConfig
from hf_poss.demo import demo_folder
from hf_poss.hub import SpeedRecord, TrainingRecord
from hf_poss.hub.card_text import CardFacts, describe_loading, draw_plot, render_card


LLAMA_3_8B = {
    "target": "meta-llama/Meta-Llama-3-8B-Instruct",
    "name": "Llama3-8B-Instruct",
    "geometry": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "positions": {1: 7, 2: 8, 3: 12},
    "baselines": "`yuhuili/EAGLE-LLaMA3-Instruct-8B`,\n  `HINT-lab/EAGLE-Llama3-8B-Instruct-Reproduce` and "
    "`HINT-lab/HASS-Llama3-8B-Instruct-Reproduce`",
}
LLAMA_2_13B = {
    "target": "meta-llama/Llama-2-13b-chat-hf",
    "name": "Llama2-13B-Chat",
    "geometry": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "max_position_embeddings": 4096,
    },
    "positions": {1: 6, 2: 6, 3: 6},
    "baselines": "`yuhuili/EAGLE-llama2-chat-13B` and\n  `HArmonizedSS/HASS-LLaMA2-Chat-13B`",
}

# pos-acc of positions 1 to 8 in percent, read off a figure in the README of the authors' repository.
README_FIGURE = {
    "EAGLE-2": (92.0, 78.4, 71.8, 67.1),
    "HASS": (91.6, 83.7, 75.9, 71.8, 70.1, 70.8, 69.7, 71.5),
    "PosS-1": (91.8, 83.6, 75.8, 73.0, 73.9, 74.5, 73.9, 75.2),
    "PosS-2": (92.1, 83.0, 76.9, 72.4, 73.4, 74.2, 73.6, 75.9),
    "PosS-3": (91.7, 83.6, 77.5, 73.1, 73.8, 71.9, 74.9, 75.2),
}

PUBLISHED = """\
## What the authors report

None of these figures was measured with hf_poss, with which this checkpoint has not been run yet.

- The paper's first version: over its targets and test sets, mean acceptance length (tau) rises from 4.62 for the best
  baseline to 4.83, speed-up from 2.97x to 3.14x.
- They drafted trees of 60 nodes, the root included, of the 10 best tokens a node and 6 levels, so that tau is at most
  7, in float16 with one prompt at a time and up to 1024 new tokens, on MT-Bench, Alpaca, GSM8K, HumanEval, Natural
  Questions and CNN/DailyMail. tau is a mean over samples.
- Their baselines for this target are {baselines}.
- pos-acc in percent, read off a figure in their repository (within 0.1; the reading does not tell for which of the two
  targets it was drawn, nor all values of EAGLE-2, which lie below 65 from position 5 on):

  | | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |
  |---|---|---|---|---|---|---|---|---|
{rows}

The settings of training above are those of their script, which was not run again either.

## Depth

`generate` drafts to the depth that was trained, {positions}, unless told otherwise. The trees of the paper:

```python
poss.generation_config.num_assistant_tokens = 6
poss.generation_config.draft_top_k = 10
poss.generation_config.draft_total_tokens = 60
```

`hf-poss convert {repo_id} FOLDER` writes the checkpoint in hf_poss's own layout,
which says how positions are dealt and holds the code for `custom_generate`.
"""

DEMO = """\
The target is the [demo target](demo-target.md); both ship with hf_poss, this one in `src/hf_poss/assets/demo/poss`.

## More on training

`python examples/build_demo_pair.py --output runs/demo`, stage `poss`, with `PosSTrainer`:

1. The target wrote 800 texts of 384 tokens, half greedy, half sampled at temperature 1, each going on from 96 tokens
   of a training text.
2. An EAGLE layer (one position): 400 steps of 8 x 384 tokens, learning rate 1e-3.
3. Specialists that start as its copies: 1600 steps of 8 x 384 tokens of the target's own texts (twice each an
   epoch) and every fourth block of the training texts, learning rate 3e-3.

This pair was not made in one go: the EAGLE layer saw the first 480 of those texts and a float32 target, and the
specialists' cosine schedule was planned for 1000 steps, run to its end, and resumed with 1600. A fresh run with the
script's defaults makes a similar drafter, not these weights.

Loss: soft cross-entropy against the target's distribution alone; no loss on features, no feature noise.

## More on the figures

Timed: 6 prompts from the middle of held-out modules, drafts in trees. Simulated: on held-out text, in chains
(`metrics.json` of the stage `poss`). There is no control with one layer for every position here, so these figures do
not say what specialists are worth. What is accepted on the repetitive text of a small target says little about large
ones.
"""


def published_card(family: dict, n: int) -> tuple[str, str]:
    """File name and text of the card of `HINT-lab/PosS{n}-...`."""
    name = f"PosS{n}-{family['name']}"
    repo_id = f"HINT-lab/{name}"
    config = PosSConfig(
        **family["geometry"],
        positions_per_specialist=n,
        num_draft_positions=family["positions"][n],
        target_name_or_path=family["target"],
    )
    record = TrainingRecord(
        base_model=family["target"],
        losses={"feature": 1.0, "token": 0.1},
        hyperparameters={
            "start": "every specialist a copy of an EAGLE layer",
            "dialogues": "ShareGPT, 68k, as they are (not written by the target)",
            "epochs": 20,
            "batch": "4 devices x 2 samples",
            "max_length": 2048,
            "optimizer": "AdamW, betas 0.9 and 0.95, gradient entries clipped at 0.5",
            "learning_rate": "3e-5, linear decay after 1% of warm-up",
            "feature_noise": "uniform, 0.2 scaled by 512 / length",
            "precision": "bfloat16",
        },
        hardware="4 GPUs",
    )
    rows = [
        f"  | {method} | {' | '.join([f'{rate:.1f}' for rate in rates] + [''] * (8 - len(rates)))} |"
        for method, rates in README_FIGURE.items()
    ]
    facts = CardFacts(
        name=name,
        config=config,
        repo_id=repo_id,
        record=record,
        loading=describe_loading(config),
        kept=PUBLISHED.format(
            baselines=family["baselines"],
            rows="\n".join(rows),
            positions=config.num_draft_positions,
            repo_id=repo_id,
        ),
    )
    return f"{name}.md", str(render_card(facts))


def demo_card(output: Path) -> tuple[str, str]:
    """File name and text of the demo drafter's card; draws its plot into `output`."""
    hardware = "two cores of an AMD EPYC"
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    accuracy = (0.54, 0.52, 0.51, 0.51, 0.51, 0.51)
    pos_acc = (0.54, 0.55, 0.57, 0.57, 0.59, 0.60)
    facts = CardFacts(
        name="The demo pair's drafter: PosS-2, six positions",
        config=PosSConfig.from_pretrained(demo_folder() / "poss"),
        repo_id="demo-poss",
        record=TrainingRecord(
            base_model="demo-target",
            license="apache-2.0",
            losses={"token": 1.0},
            hyperparameters={"steps": 1600, "batch": "8 x 384 tokens", "learning_rate": "3e-3", "seed": 0},
            metrics={
                "eval_tau": 2.20,
                **{f"eval_accuracy_{k}": value for k, value in enumerate(accuracy, start=1)},
                **{f"eval_pos_acc_{k}": value for k, value in enumerate(pos_acc, start=1)},
            },
            hardware=hardware,
            versions=versions,
        ),
        speed=SpeedRecord(
            plain_rate=121.0,
            poss_rate=177.1,
            speedup=1.53,
            lowest=1.22,
            highest=2.06,
            runs=12,
            tau=3.54,
            tokens=762,
            rounds=215,
            pos_acc=[0.96, 0.89, 0.55, 0.80, 0.71, 0.88],
            time_shares={"drafting": 0.25, "verifying": 0.70, "other": 0.04},
            prompts=6,
            identical=6,
            settings={
                "decoding": "greedy",
                "dtype": "float32",
                "new tokens": 128,
                "top-k": 6,
                "nodes": 20,
                "depth": 6,
            },
            hardware=hardware,
            versions=versions,
            command="hf-poss demo",
        ),
        usage=(
            "from hf_poss.demo import load_demo_pair\n\n"
            "target, poss, tokenizer = load_demo_pair()\n"
            'inputs = tokenizer("def main(", return_tensors="pt")\n'
            "output = target.generate(**inputs, assistant_model=poss, max_new_tokens=64)"
        ),
        kept=DEMO,
    )
    if not draw_plot(facts, output / "demo-poss.png"):
        raise SystemExit("The demo pair's card shows a plot: pip install 'hf-poss[hub]'.")
    facts.plot = "demo-poss.png"
    return "demo-poss.md", str(render_card(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards"), help="(default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    cards = [published_card(family, n) for family in (LLAMA_3_8B, LLAMA_2_13B) for n in family["positions"]]
    for name, text in [*cards, demo_card(args.output)]:
        (args.output / name).write_text(text, encoding="utf-8")
        print(args.output / name)


if __name__ == "__main__":
    main()
