"""lm-evaluation-harness with position specialists: the same texts, the same scores.

    pip install 'lm_eval[hf]'
    python examples/lm_eval_harness.py                    # completes held-out code with the shipped pair, on a CPU

Tasks hand `generation_kwargs` on to `generate`, and a saved drafter holds the code that `custom_generate` runs, so the
harness needs no change. From a shell, with any task that generates:

    lm_eval --model hf --model_args pretrained=TARGET --tasks gsm8k --batch_size 8 \
        --gen_kwargs custom_generate=POSS,trust_remote_code=True
"""

import argparse
import difflib
import tempfile
from typing import Any

import transformers
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from hf_poss import collect_statistics
from hf_poss.demo import demo_prompts, held_out_sources, load_demo_pair


def documents(**_: Any) -> dict[str, Dataset]:
    """Code that the pair has not seen, and how it goes on."""
    rows = []
    for title, prompt in demo_prompts(12):
        source = held_out_sources()[title.removesuffix(".py")]
        end = source.index(prompt) + len(prompt)
        rows.append({"prompt": prompt, "completion": source[end : end + 200]})
    return {"test": Dataset.from_list(rows)}


def similarity(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    return {"similarity": difflib.SequenceMatcher(None, doc["completion"], results[0], autojunk=False).ratio()}


TASK = {
    "task": "complete_code",
    "custom_dataset": documents,
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": lambda doc: doc["prompt"],
    "doc_to_target": lambda doc: doc["completion"],
    "process_results": similarity,
    "metric_list": [{"metric": "similarity", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False},
}


def evaluate(lm: HFLM, **kwargs: Any) -> tuple[float, list[str]]:
    """Score and texts of one evaluation."""
    results = simple_evaluate(lm, tasks=[TASK], bootstrap_iters=0, **kwargs)
    texts = [sample["filtered_resps"][0] for sample in results["samples"][TASK["task"]]]
    return results["results"][TASK["task"]]["similarity,none"], texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--limit", type=int, help="documents (default: all 12)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    target, poss, tokenizer = load_demo_pair()
    lm = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=args.batch_size, device="cpu")

    plain_score, plain_texts = evaluate(lm, limit=args.limit)
    with tempfile.TemporaryDirectory() as folder, collect_statistics() as stats:
        poss.save_pretrained(folder)
        with_poss = {"custom_generate": folder, "trust_remote_code": True}
        score, texts = evaluate(lm, limit=args.limit, gen_kwargs=with_poss)

    print(f"target alone: similarity {plain_score:.4f}")
    print(f"with PosS:    similarity {score:.4f}, tau {stats.tau:.2f}")
    print(f"{sum(a == b for a, b in zip(plain_texts, texts, strict=True))} of {len(texts)} texts are equal")


if __name__ == "__main__":
    main()
