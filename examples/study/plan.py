"""The runs of the study: what is trained, from what, on what, by which question it answers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


SEEDS = (0, 1, 2, 3, 4)
FEWER_SEEDS = (0, 1, 2)
POSITIONS = 8
PAPER_LOSS = "feature=1.0,token=0.1"
TOKEN_LOSS = "token=1.0"
LAYERS_READ = (1, 3, 5)  # of the five layers of stories260k, as EAGLE-3 reads a low, a middle and a high one


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        name: of the condition; with the seed it names the folder.
        seed: of the start's weights, the order of the data and sampling.
        method: a key of `METHODS`, "start" for the EAGLE layer that they begin from, or "go on" from `start` as it is.
        start: name of the condition that it begins from, of the same seed.
        losses: names and weights.
        data: "own:DOMAIN" or "fixed:DOMAIN"; several joined by "+" are mixed in equal parts.
        positions: K.
        steps, learning_rate: of the optimiser.
        leaky: trains with the public code's attention.
        feature_layers: that a "start" reads.
        domains: on whose prompts it is tested, beside the target's own.
        questions: of the study that it serves.
    """

    name: str
    seed: int
    method: str
    start: str | None = "start"
    losses: str = TOKEN_LOSS
    data: str = "own:home"
    positions: int = POSITIONS
    steps: int = 300
    learning_rate: float = 1e-3
    leaky: bool = False
    feature_layers: tuple[int, ...] | None = None
    domains: tuple[str, ...] = ()
    questions: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        return _folder(self.name, self.seed)

    @property
    def start_folder(self) -> str | None:
        """Of the run that it begins from, None for fresh weights."""
        return None if self.start is None else _folder(self.start, self.seed)


def _folder(name: str, seed: int) -> str:
    return f"{name.replace('/', '-')}/seed{seed}"


OTHERS = ("code", "maths", "chat")


START = Run("start", 0, "start", None, losses=PAPER_LOSS, positions=1, steps=1000, learning_rate=2e-3, questions=(1,))


def main_runs() -> Iterator[Run]:
    """Questions 1 and 4 (the feature loss), and the ground of most others."""
    for loss, losses in (("token", TOKEN_LOSS), ("paper", PAPER_LOSS)):
        for method in ("eagle", "hass", "poss1", "poss2", "poss3"):
            domains = OTHERS if loss == "token" and method in ("eagle", "hass", "poss2") else ()
            yield Run(f"{loss}/{method}", 0, method, losses=losses, domains=domains, questions=(1, 4, 6, 7, 8))


def control_runs() -> Iterator[Run]:
    """Question 2: parameters, compute, adapters. HASS runs as many positions a step as PosS; EAGLE runs one, so it has
    as many steps more here."""
    yield Run("token/wide", 0, "wide", questions=(2,))
    yield Run("token/lora2", 0, "lora2", questions=(2,))
    yield Run("token/eagle-compute", 0, "eagle", steps=300 * POSITIONS, questions=(2,))


def attention_runs() -> Iterator[Run]:
    """Question 3."""
    for method in ("hass", "poss2"):
        yield Run(f"leaky/{method}", 0, method, losses=PAPER_LOSS, leaky=True, questions=(3,))


def loss_runs() -> Iterator[Run]:
    """Question 4."""
    for method in ("hass", "poss2"):
        yield Run(f"topk/{method}", 0, method, losses=f"{PAPER_LOSS},topk=1.0", questions=(4,))
        yield Run(f"acceptance/{method}", 0, method, losses="acceptance=1.0", questions=(4,))


def fused_runs() -> Iterator[Run]:
    """Question 4: features of three layers, from a start of their own."""
    yield replace(START, name="fused-start", feature_layers=LAYERS_READ, questions=(4,))
    for method in ("hass", "poss2"):
        yield Run(f"fused/{method}", 0, method, start="fused-start", questions=(4,))


def data_runs() -> Iterator[Run]:
    """Question 5: real text as it is against what the target writes behind the same beginnings."""
    for kind in ("own", "fixed"):
        yield Run(f"{kind}-chat/poss2", 0, "poss2", data=f"{kind}:chat", domains=("chat",), questions=(5,))


def forgetting_runs() -> Iterator[Run]:
    """Question 6: another domain afterwards, and both mixed over as many steps in all."""
    for method in ("hass", "poss2"):
        yield Run(
            f"then-code/{method}", 0, "go on", f"token/{method}", data="own:code", domains=("code",), questions=(6,)
        )
        yield Run(
            f"mixed-code/{method}", 0, method, data="own:home+own:code", steps=600, domains=("code",), questions=(6,)
        )


def sensitivity_runs() -> Iterator[Run]:
    """Questions 7 and 8: learning rate, K, n, and spans of two specialists."""
    for method in ("hass", "poss2"):
        for rate in (3e-4, 3e-3):
            yield Run(f"rate{rate:g}/{method}", 0, method, learning_rate=rate, questions=(7,))
        for positions in (4, 6):
            yield Run(f"K{positions}/{method}", 0, method, positions=positions, questions=(7, 8))
    yield Run("token/poss4", 0, "poss4", questions=(8,))
    yield Run("K6/poss3", 0, "poss3", positions=6, questions=(8,))
    yield Run("long/hass", 0, "hass", steps=900, questions=(7,))
    yield Run("long/poss2", 0, "poss2", steps=900, questions=(7,))


def stories_runs() -> list[Run]:
    """All runs on stories260k, what others begin from first."""
    conditions = [
        START,
        *main_runs(),
        *control_runs(),
        *attention_runs(),
        *loss_runs(),
        *fused_runs(),
        *data_runs(),
        *forgetting_runs(),
        *sensitivity_runs(),
    ]
    return [replace(run, seed=seed) for run in conditions for seed in _seeds(run)]


def _seeds(run: Run) -> tuple[int, ...]:
    return FEWER_SEEDS if run.name.startswith(("rate", "long")) else SEEDS


def demo_runs() -> list[Run]:
    """Question 1 on the demo target, which is deep enough for drafts to pay, with the wide layer of question 2; and
    question 5 on its own domain."""
    methods = ("hass", "poss1", "poss2", "poss3", "eagle", "wide")
    conditions = [
        START,
        *(Run(f"token/{method}", 0, method, questions=(1,)) for method in methods),
        Run("fixed/poss2", 0, "poss2", data="fixed:home", questions=(5,)),
    ]
    return [replace(run, seed=seed) for run in conditions for seed in SEEDS]


def family_runs() -> list[Run]:
    """Question 6 on a target of another family."""
    conditions = [
        START,
        *(Run(f"token/{method}", 0, method, questions=(6,)) for method in ("eagle", "hass", "poss2")),
    ]
    return [replace(run, seed=seed) for run in conditions for seed in SEEDS]


PLANS = {"stories": stories_runs, "demo": demo_runs, "family": family_runs}
