"""Evaluations that nobody ran: folders of records whose rates are known."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_poss.configuration_poss import specialist_index
from hf_poss.evaluation.drafters import takes_rows
from hf_poss.evaluation.records import QuestionRecord, TurnRecord
from hf_poss.measures import DriftSums


STEP = 0.01  # seconds of a plain step
PROMPT = 0.02  # seconds of a pass over a prompt


@dataclass
class MadeUp:
    """A drafter whose position k is accepted with probability `rates[k - 1]`, in chains of as many positions."""

    name: str
    rates: list[float]
    n: int = 2
    rho: float = 1.5
    checkpoints: int = 1
    kind: str = "poss"

    @property
    def about(self) -> dict[str, Any]:
        has_specialists = self.kind == "poss"
        return {
            "name": self.name,
            "kind": self.kind,
            "checkpoints": [f"{self.name}-{index}" for index in range(self.checkpoints)] if has_specialists else [],
            "parameters": 1_000_000 if has_specialists else None,
            "positions_per_specialist": self.n if has_specialists else None,
            "num_specialists": -(-len(self.rates) // self.n) if has_specialists else None,
            "num_draft_positions": len(self.rates) if has_specialists else None,
            "depth": len(self.rates),
            "top_k": 1,
            "total_tokens": len(self.rates) + 1,
        }


PLAIN = MadeUp("plain", [], rho=1.0, kind="plain")


@dataclass
class MadeUpEvaluation:
    """An evaluation of `drafters`, plain decoding first, on `sets` (questions by name), of `categories` in turns."""

    drafters: list[MadeUp]
    sets: dict[str, int] = field(default_factory=lambda: {"mt_bench": 6, "gsm8k": 4})
    temperatures: tuple[float, ...] = (0.0,)
    seeds: tuple[int, ...] = (0,)
    batch_sizes: tuple[int, ...] = (1,)
    tokens: int = 40
    turns: int = 1
    categories: tuple[str, ...] = ("made up",)
    words: tuple[str, ...] = (" the", " a", " story", "\n", "</script><b>", " &amp;", " 'quoted' ", "\u4f60\u597d")

    def about(self) -> dict[str, Any]:
        return {
            "command": "hf-poss evaluate --target target --poss PosS-2=poss2",
            "hardware": "1 thread on a made-up processor",
            "versions": {"python": "3.11.0", "torch": "2.13.0"},
            "target": {"name": "me/<target>", "parameters": 12_000_000, "dtype": "float32"},
            "drafters": [drafter.about for drafter in [PLAIN, *self.drafters]],
            "benchmarks": [
                {"name": name, "questions": count, "turns": self.turns, "source": "made up", "license": "none"}
                for name, count in self.sets.items()
            ],
            "temperatures": list(self.temperatures),
            "seeds": list(self.seeds),
            "batch_sizes": list(self.batch_sizes),
            "max_new_tokens": self.tokens,
            "chat": False,
            "generate": {},
            "processes": 1,
        }

    def records(self) -> list[QuestionRecord]:
        return [
            self._record(drafter, name, question, checkpoint, temperature, seed, batch_size)
            for batch_size in self.batch_sizes
            for temperature in self.temperatures
            for seed in self.seeds
            for name, count in self.sets.items()
            for question in range(count)
            for drafter in [PLAIN, *self.drafters]
            if takes_rows(drafter.kind, batch_size)
            for checkpoint in range(drafter.checkpoints)
        ]

    def write(self, folder: Path, files: int = 1) -> Path:
        """Writes the folder; records are dealt to `files` files in turns."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(self.about()), encoding="utf-8")
        for index in range(files):
            lines = [json.dumps(record.to_dict()) for record in self.records()[index::files]]
            (folder / f"records-{index:05d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def _record(self, drafter, benchmark, question, checkpoint, temperature, seed, batch_size) -> QuestionRecord:
        turns = []
        for turn in range(self.turns):
            text = random.Random(f"{benchmark} {question} {turn} {seed if temperature else ''}")
            length = self.tokens - text.randrange(self.tokens // 2)
            token_ids = [text.randrange(len(self.words)) for _ in range(length)]
            luck = random.Random(f"{drafter.name} {checkpoint} {benchmark} {question} {turn} {temperature} {seed}")
            turns.append(self._turn(drafter, token_ids, luck, batch_size))
        category = self.categories[question % len(self.categories)]
        place = benchmark, str(question), category, drafter.name, checkpoint, temperature, seed, batch_size
        return QuestionRecord(*place, question // batch_size, turns)

    def _turn(self, drafter: MadeUp, token_ids: list[int], luck: random.Random, batch_size: int) -> TurnRecord:
        depth = len(drafter.rates)
        authors, drafted, reached, accepted, rounds = [0], [0] * depth, [0] * depth, [0] * depth, 0
        while len(authors) < len(token_ids):
            rounds += 1
            drafted = [count + 1 for count in drafted]
            left = len(token_ids) - len(authors)
            for position, rate in enumerate(drafter.rates, start=1):
                if position > left:
                    break
                reached[position - 1] += 1
                if luck.random() >= rate:
                    break
                accepted[position - 1] += 1
                authors.append(position)
            if len(authors) < len(token_ids):
                authors.append(0)
        # More rows cost more, and rounds of theirs more than plain steps: 10% a row.
        step = STEP * (1 + 0.2 * (batch_size - 1))
        rho = drafter.rho * (1 + 0.1 * (batch_size - 1) * (drafter.kind != "plain"))
        seconds = PROMPT + rounds * rho * step * luck.uniform(0.95, 1.05)
        has_specialists = drafter.kind == "poss"
        parts = {"context": 0.1, "passes": 0.3, "tree": 0.05, "prompt": 9.0, "verification": 0.5, "walk": 0.03}
        return TurnRecord(
            prompt_tokens=7,
            token_ids=token_ids,
            pieces=[self.words[token] for token in token_ids],
            authors=authors if has_specialists else [0] * len(token_ids),
            seconds=seconds,
            prompt_seconds=PROMPT,
            rows=batch_size,
            rounds=rounds,
            passes=float(rounds),
            tokens=len(token_ids) - 1,
            drafted=drafted if has_specialists else [],
            reached=reached if has_specialists else [],
            accepted=accepted if has_specialists else [],
            drift=_drift(drafter, len(token_ids)) if has_specialists else None,
            parts={part: share * rounds * drafter.rho * STEP for part, share in parts.items()}
            if has_specialists
            else None,
            pass_seconds=[0.05 * rounds * drafter.rho * STEP] * depth if has_specialists else None,
        )


def _drift(drafter: MadeUp, rows: int) -> DriftSums:
    positions = range(1, len(drafter.rates) + 1)
    spans = [specialist_index(k, drafter.n, -(-len(drafter.rates) // drafter.n)) for k in positions]
    return DriftSums(
        [rows] * len(drafter.rates),
        [rows * (0.95 - 0.02 * k - 0.01 * span) for k, span in zip(positions, spans, strict=True)],
        [rows * (1 - 0.03 * k) for k in positions],
    )
