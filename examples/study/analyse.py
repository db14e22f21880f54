"""Every table and figure of docs/study.md, from the committed results.

python examples/study/analyse.py                       # prints the tables
python examples/study/analyse.py --write docs/study.md # replaces those in the page, and draws the figures
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from costs import memory_table, read, speed_comparisons, speed_table
from figures import draw_curves, draw_depths, draw_pos_acc
from results import Results
from tables import (
    NOT_MEASURED,
    against,
    curve_table,
    depth_table,
    pos_acc_table,
    position_differences,
    slope_table,
    suite_differences,
    tau_table,
)

from hf_poss.evaluation.profile_tables import break_even_table, switching_table


RESULTS = Path(__file__).parent.parent / "results"
DRAFTERS = ("eagle", "hass", "poss1", "poss2", "poss3")
SUITES = {"chain": "tau, chain of 8", "tree": "tau, tree of 20 nodes"}
OTHERS = ("code", "maths", "chat")


def names(loss: str, drafters: tuple[str, ...] = DRAFTERS) -> list[str]:
    return [f"{loss}/{drafter}" for drafter in drafters]


def rivals(loss: str) -> list[tuple[str, str]]:
    """PosS-n against one layer with the same roll-out, and that against EAGLE."""
    return [
        *((f"{loss}/poss{n}", f"{loss}/hass") for n in (1, 2, 3)),
        (f"{loss}/hass", f"{loss}/eagle"),
    ]


def cost_blocks(results: Path) -> dict[str, Callable[[], str]]:
    """Tables of time and memory by name."""
    named = ("speed", "speed_depth4", "profile", "memory_8b")
    speed, shallow, profile, large = (read(results / f"study_{of}.json") for of in named)
    specialists = ("PosS-1", "PosS-2", "PosS-3")
    one_layer = [(name, layer) for layer in ("HASS", "EAGLE") for name in specialists]
    pairs = [("HASS", "EAGLE"), *one_layer, ("wide", "EAGLE"), ("wide", "PosS-2")]
    return {
        "speed": lambda: speed_table(speed),
        "against-speed": lambda: speed_comparisons(speed, pairs),
        "speed-of-4": lambda: speed_table(speed, 4),
        "against-speed-of-4": lambda: speed_comparisons(speed, pairs, 4),
        "speed-depth-4": lambda: speed_table(shallow),
        "against-speed-depth-4": lambda: speed_comparisons(shallow, pairs),
        "memory": lambda: memory_table(profile),
        "memory-8b": lambda: memory_table(large, "GiB"),
        "switching": lambda: NOT_MEASURED if profile is None else switching_table(profile["cases"]),
        "break-even": lambda: NOT_MEASURED if profile is None else break_even_table(profile["break_even"]),
    }


def blocks(stories: Results, demo: Results, family: Results) -> dict[str, Callable[[], str]]:
    """Tables of tau and pos-acc by name."""
    both = ("hass", "poss2")
    made: dict[str, Callable[[], str]] = {}

    def compare(name: str, results: Results, pairs: list[tuple[str, str]]) -> None:
        """By chains, and by trees."""
        made[f"against-{name}"] = lambda: against(results, pairs)
        made[f"against-{name}-tree"] = lambda: against(results, pairs, "tree")

    for loss in ("token", "paper"):
        made[f"tau-{loss}"] = lambda loss=loss: tau_table(stories, ["start", *names(loss)], SUITES)
        made[f"pos-acc-{loss}"] = lambda loss=loss: pos_acc_table(stories, ["start", *names(loss)])
        made[f"slopes-{loss}"] = lambda loss=loss: slope_table(stories, names(loss))
        compare(loss, stories, rivals(loss))
    made["first-positions"] = lambda: position_differences(stories, rivals("token"), (1, 2, 3, 4))
    made["depths"] = lambda: depth_table(stories, names("token", ("eagle", *both)))
    controls = ["token/hass", "token/poss2", "token/wide", "token/lora2", "token/eagle-compute", "token/eagle"]
    made["controls"] = lambda: tau_table(stories, controls, SUITES)
    others = [name for name in controls if name not in ("token/poss2", "token/eagle")]
    compare("controls", stories, [("token/poss2", name) for name in others])
    made["leaky"] = lambda: against(stories, [(f"paper/{of}", f"leaky/{of}") for of in both])
    made["leaky-tau"] = lambda: tau_table(
        stories, [f"{loss}/{of}" for of in both for loss in ("paper", "leaky")], SUITES
    )
    losses = ("token", "paper", "topk", "acceptance", "fused")
    made["losses"] = lambda: tau_table(stories, [f"{loss}/{of}" for loss in losses for of in both], SUITES)
    compare("losses", stories, [(f"token/{of}", f"{loss}/{of}") for of in both for loss in losses if loss != "token"])
    made["specialists-by-loss"] = lambda: against(stories, [(f"{loss}/poss2", f"{loss}/hass") for loss in losses])
    made["data"] = lambda: against(stories, [("own-chat/poss2", "fixed-chat/poss2")], "chain, chat")
    made["domains"] = lambda: tau_table(
        stories,
        names("token", ("eagle", *both)),
        {
            "chain": "stories",
            **{f"chain, {of}": of for of in OTHERS},
            "chain, long": "prompts of 256 tokens",
            "chain, T = 1": "T = 1",
        },
    )
    for suite in ("chain, T = 1", "chain, long", *(f"chain, {of}" for of in OTHERS)):
        key = re.sub(r"\W+", "-", suite)
        made[f"against-{key}"] = lambda suite=suite: against(
            stories, [("token/poss2", "token/hass"), ("token/hass", "token/eagle")], suite
        )
    made["forgetting"] = lambda: tau_table(
        stories,
        [f"{name}/{of}" for of in both for name in ("token", "then-code", "mixed-code")],
        {"chain": "stories", "chain, code": "code"},
    )
    forgetting = [(f"then-code/{of}", f"{name}/{of}") for of in both for name in ("token", "mixed-code")]
    made["against-forgetting-stories"] = lambda: against(stories, forgetting, "chain")
    made["against-forgetting-code"] = lambda: against(stories, forgetting, "chain, code")
    elsewhere = [*(f"chain, {of}" for of in OTHERS), "chain, long", "chain, T = 1"]
    made["elsewhere"] = lambda: suite_differences(stories, "token/poss2", elsewhere, "chain")
    made["convergence"] = lambda: curve_table(stories, [*names("token"), *names("paper"), "long/hass", "long/poss2"])
    rates = [f"{rate}/{of}" for of in both for rate in ("rate0.0003", "token", "rate0.003")]
    made["rates"] = lambda: tau_table(stories, rates, SUITES)
    made["against-rates"] = lambda: against(
        stories,
        [
            *((f"{rate}/poss2", f"{rate}/hass") for rate in ("rate0.0003", "token", "rate0.003")),
            *((f"rate0.003/{of}", f"token/{of}") for of in both),
        ],
    )
    made["steps"] = lambda: tau_table(stories, [f"{name}/{of}" for of in both for name in ("token", "long")], SUITES)
    made["against-steps"] = lambda: against(
        stories, [("long/poss2", "long/hass"), *((f"long/{of}", f"token/{of}") for of in both)]
    )
    made["against-positions"] = lambda: against(
        stories, [(f"token/{of}", f"{name}/{of}") for of in both for name in ("K4", "K6")]
    )
    made["positions"] = lambda: tau_table(
        stories, [f"{name}/{of}" for of in both for name in ("K4", "K6", "token")], SUITES
    )
    spans = ["token/hass", "token/poss4", "K6/poss3", "K4/poss2", "token/poss3", "token/poss2", "token/poss1"]
    made["spans"] = lambda: tau_table(stories, spans, SUITES)
    compare("spans", stories, [("K6/poss3", "token/poss4"), ("K4/poss2", "token/poss4"), ("K4/poss2", "K6/poss3")])
    made["against-more-memory"] = lambda: against(
        stories, [("token/poss1", "token/poss2"), ("token/poss2", "token/poss3"), ("token/poss2", "K4/poss2")], "tree"
    )
    trees = ("tree, 8 nodes", "tree, 12 nodes", "tree", "tree, 30 nodes", "tree, 60 nodes")
    made["trees"] = lambda: tau_table(stories, names("token", both), {suite: suite for suite in ("chain", *trees)})
    for name, results in (("demo", demo), ("family", family)):
        conditions = ["start", *names("token"), "token/wide"]
        made[f"tau-{name}"] = lambda results=results, of=conditions: tau_table(results, of, SUITES)
        made[f"pos-acc-{name}"] = lambda results=results, of=conditions: pos_acc_table(results, of)
        compare(name, results, [*rivals("token"), ("token/poss2", "token/wide")])
    made["data-demo"] = lambda: against(demo, [("token/poss2", "fixed/poss2")])
    return made


def replaced(page: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with every table between `<!-- study:NAME -->` and `<!-- end -->` made anew.

    Raises:
        KeyError: if the page names a table that there is not.
    """

    def made(match: re.Match) -> str:
        return f"<!-- study:{match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- study:(\S+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    measured = {}
    for plan in ("stories", "demo", "family"):
        path = args.results / f"study_{plan}.json"
        measured[plan] = Results.read(path) if path.is_file() else Results({}, "", {})
    tables = blocks(**measured) | cost_blocks(args.results)
    if args.write is None:
        for name, make in tables.items():
            print(f"\n## {name}\n\n{make()}")
        return
    args.write.write_text(replaced(args.write.read_text(), tables))
    stories = measured["stories"]
    draw_pos_acc(stories, {"token": names("token"), "paper": names("paper")}, args.results / "study_pos_acc.png")
    draw_depths(stories, names("token", ("eagle", "hass", "poss2")), args.results / "study_depth.png")
    draw_curves(
        stories, ["token/hass", "token/poss2", "long/hass", "long/poss2"], args.results / "study_convergence.png"
    )


if __name__ == "__main__":
    main()
