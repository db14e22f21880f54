"""Trains and measures the runs of the study; goes on where it stopped.

    python examples/study/run.py --plan stories --target STORIES260K --corpora CORPORA --output runs/study/stories
    python examples/study/run.py --plan demo --output runs/study/demo

Several of these may run at once on the same output: each takes runs that no other holds. `collect.py` gathers what
they wrote. With `--recorded RESULTS`, which `collect.py` wrote before, only the other runs are made, and those of the
recorded ones that they begin from.
"""

import argparse
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from drafting import CHAIN, TREE, Suite, measure
from plan import PLANS, Run
from results import Results
from texts import Texts, TextSource
from tqdm.auto import tqdm
from training import HELD_OUT, SAMPLES, samples, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_poss import PosSModel
from hf_poss.demo import demo_folder


HOMES = {"stories": "stories", "demo": "python", "family": "stories"}


def suites(run: Run, plan: str) -> dict[str, Suite]:
    """What a run is tested by."""
    tests = {"chain": CHAIN, "tree": TREE}
    if run.method == "start":
        return {"chain": CHAIN}
    if plan == "stories" and run.name in ("token/eagle", "token/hass", "token/poss2"):
        tests["chain, T = 1"] = dataclasses.replace(CHAIN, temperature=1.0)
        tests["chain, long"] = dataclasses.replace(CHAIN, prompt_length=256, prompts=32)
        for depth in range(1, 8):
            tests[f"chain, depth {depth}"] = dataclasses.replace(CHAIN, depth=depth, total_tokens=depth + 1)
    if plan == "stories" and run.name in ("token/hass", "token/poss2"):
        for total in (8, 12, 30, 60):
            tests[f"tree, {total} nodes"] = dataclasses.replace(TREE, total_tokens=total)
    for domain in run.domains:
        tests[f"chain, {domain}"] = dataclasses.replace(CHAIN, domain=domain)
    return tests


def recorded_folders(results: Results, plan: str, runs: list[Run]) -> set[str]:
    """Folders of the runs of which `results` hold all measurements."""
    return {
        run.folder
        for run in runs
        if all(str(run.seed) in results.measured(run.name, suite) for suite in suites(run, plan))
    }


def still_to_make(runs: list[Run], recorded: set[str]) -> list[Run]:
    """The runs that are not recorded, and all that these begin from, in their order."""
    needed = {run.folder for run in runs if run.folder not in recorded}
    for run in reversed(runs):  # what others begin from comes before them
        if run.folder in needed and run.start is not None:
            needed.add(run.start_folder)
    return [run for run in runs if run.folder in needed]


class Study:
    """The runs of a plan on one target.

    Args:
        plan: name of the plan.
        output: folder of all runs.
        source: of texts.
        recorded: folders of runs whose measurements are there already; of these only greedy chains are measured, as
            a check that they are the same again.
    """

    def __init__(self, plan: str, output: Path, source: TextSource, recorded: set[str] = frozenset()):
        self.plan, self.output, self.source, self.recorded = plan, output, source, recorded
        self._samples: dict[str, list] = {}
        self._prompts: dict[tuple[str, int, int], Texts] = {}

    def suites(self, run: Run) -> dict[str, Suite]:
        return {"chain": CHAIN} if run.folder in self.recorded else suites(run, self.plan)

    def cached(self, name: str, make) -> list:
        """Texts are written once for all processes and resumptions."""
        path = self.output / "texts" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                made = json.dumps(make())
                path.with_suffix(".unfinished").write_text(made)
                path.with_suffix(".unfinished").replace(path)
            return json.loads(path.read_text())

    def samples(self, data: str, held_out: bool) -> list:
        count = HELD_OUT if held_out else SAMPLES
        name = f"{data.replace(':', '-')}-{'held-out' if held_out else 'train'}"
        if name not in self._samples:
            self._samples[name] = self.cached(name, lambda: samples(self.source, data, count, held_out))
        return self._samples[name]

    def prompts(self, suite: Suite) -> Texts:
        domain = self.source.home if suite.domain == "home" else suite.domain
        name = f"prompts-{domain}-{suite.prompts}x{suite.prompt_length}"
        return self.cached(name, lambda: self.source.prompts(domain, suite.prompts, suite.prompt_length))

    def finish(self, run: Run) -> None:
        """Does what is left of a run."""
        folder = self.output / run.folder
        if not (folder / "training.json").is_file():
            train(run, self.source, self.samples(run.data, False), self.samples(run.data, True), self.output)
        path = folder / "measured.json"
        measured = json.loads(path.read_text()) if path.is_file() else {}
        missing = {name: suite for name, suite in self.suites(run).items() if name not in measured}
        if missing:
            poss = PosSModel.from_pretrained(folder / "drafter", dtype="float32").to(self.source.target.device).eval()
            for name, suite in missing.items():
                measured[name] = measure(self.source.target, poss, self.prompts(suite), suite, run.seed)
                path.write_text(json.dumps(measured))
        (folder / "run.json").write_text(json.dumps(dataclasses.asdict(run)))

    def is_done(self, run: Run) -> bool:
        folder = self.output / run.folder
        if not (folder / "run.json").is_file():
            return False
        return set(self.suites(run)) <= set(json.loads((folder / "measured.json").read_text()))

    def is_ready(self, run: Run) -> bool:
        """Whether what it begins from is there."""
        return run.start is None or (self.output / run.start_folder / "training.json").is_file()

    @contextmanager
    def held(self, run: Run) -> Iterator[bool]:
        """Whether this process may work on a run; no other does while the block lasts."""
        folder = self.output / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def work(self, runs: list[Run]) -> None:
        with tqdm(total=len(runs), desc=self.plan) as bar:
            while left := [run for run in runs if not self.is_done(run)]:
                bar.n = len(runs) - len(left)
                bar.refresh()
                for run in left:
                    if not self.is_ready(run):
                        continue
                    with self.held(run) as mine:
                        if mine and not self.is_done(run):
                            self.finish(run)
                            break
                else:
                    time.sleep(5)  # others hold all that could be done now
            bar.n = len(runs)
            bar.refresh()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--target", default=str(demo_folder() / "target"))
    parser.add_argument("--corpora", type=Path, default=Path("corpora"), help="folder of real text, see texts.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--length", type=int, default=64, help="tokens of a training text")
    parser.add_argument("--only", nargs="+", help="conditions whose name begins so")
    parser.add_argument("--seeds", type=int, nargs="+", help="these alone")
    parser.add_argument("--recorded", type=Path, help="results whose runs are not made again")
    args = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32").to(device).eval()
    target.config.name_or_path = Path(args.target).name
    source = TextSource(
        target, AutoTokenizer.from_pretrained(args.target), args.corpora, HOMES[args.plan], args.length
    )
    runs = PLANS[args.plan]()
    if args.only:
        runs = [run for run in runs if run.name.startswith(tuple(args.only))]
    if args.seeds:
        runs = [run for run in runs if run.seed in args.seeds]
    recorded = set() if args.recorded is None else recorded_folders(Results.read(args.recorded), args.plan, runs)
    Study(args.plan, args.output, source, recorded).work(still_to_make(runs, recorded))


if __name__ == "__main__":
    main()
