"""`hf-poss benchmark` on tiny models: tables, JSON, what is simulated, and runs that go on."""

import json

import pytest
import torch
from conftest import make_poss, make_target
from tiny_chat import word_tokenizer

from hf_poss.cli import main
from hf_poss.evaluation.benchmark import Benchmark


SMALL = ["--repeats", "2", "--new_tokens", "8", "--device", "cpu"]
SHAPE = [
    "--shape",
    "tiny",
    "--context",
    "12",
    "--num_prompts",
    "1",
    "--acceptance",
    "3.5",
    "--num_draft_positions",
    "4",
]
FAST = ["--contestants", "poss-chain", "poss-tree"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = make_target("llama")
    target.save_pretrained(folder / "target")
    word_tokenizer().save_pretrained(folder / "target")
    make_poss(target, num_draft_positions=4).save_pretrained(folder / "poss")
    (folder / "prompts.jsonl").write_text('{"prompt": "w7 w8 w9"}\n{"turns": ["w10 w11", "w12"]}\n')
    return [
        *("--target", str(folder / "target"), "--poss", str(folder / "poss")),
        *("--prompts", str(folder / "prompts.jsonl")),
    ]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """Bandwidth is measured on a tensor larger than all caches; a small one is as good for these tests."""
    monkeypatch.setattr("hf_poss.evaluation.benchmark.copy_bandwidth", lambda device: 1e10)


def benchmark(capsys, *arguments: str) -> str:
    assert main(["benchmark", *arguments]) == 0
    return capsys.readouterr().out


def test_a_trained_pair_is_compared_and_nothing_is_simulated(pair, tmp_path, capsys):
    path = tmp_path / "new" / "figures.json"
    names = ["plain", "prompt-lookup", "poss-chain", "poss-tree"]
    told = benchmark(capsys, *pair, *SMALL, "--contestants", *names, "--output", str(path))
    figures = json.loads(path.read_text())
    assert list(figures["contestants"]) == names
    assert figures["simulated"] == [] and "SIMULATED" not in told
    for name, of in figures["contestants"].items():
        assert of["status"] == "ok" and of["identical"] is True
        assert of["speedup_over_plain"]["count"] == 2 * 2  # prompts and repeats
        assert f"\n| {name} | " in told
    for name in names[2:]:
        of = figures["contestants"][name]
        assert set(of["breakdown"]["parts"]) >= {"context fill", "draft passes", "verification forward"}
        assert of["rho"]["median"] > 0 and 1 <= of["tau"] <= 5
        assert of["roofline"]["share_reached"] > 0 and of["drafting_overhead"]["ratio"] > 0
    assert told.count("not counted") == 2 * 3
    for key in ("command", "hardware", "device", "versions", "threads"):
        assert figures[key]
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["repeats"] == figures["repeats_wanted"] == 2
    assert [prompt["tokens"] for prompt in figures["prompts"]] == [3, 2]


def test_batches_and_chats(pair, capsys, tmp_path):
    path = tmp_path / "figures.json"
    benchmark(capsys, *pair, *SMALL, *FAST, "--batch_size", "2", "--chat", "--output", str(path))
    figures = json.loads(path.read_text())
    assert figures["prompts"] == [{"title": "prompts.jsonl:1, prompts.jsonl:2", "rows": 2, "tokens": 6}]
    assert all(of["identical"] is True for of in figures["contestants"].values())


def test_an_assistant_takes_part_where_one_is_given(pair, capsys):
    told = benchmark(capsys, *pair, *SMALL, *FAST, "--assistant", pair[1])
    row = next(line for line in told.splitlines() if line.startswith("| assistant |"))
    assert row.endswith("| yes |")


def test_a_shape_says_what_is_simulated(capsys, tmp_path):
    path = tmp_path / "figures.json"
    told = benchmark(
        capsys, *SHAPE, *SMALL, *FAST, "--draft_vocab_size", "60", "--batch_size", "2", "--output", str(path)
    )
    figures = json.loads(path.read_text())
    about = " ".join(figures["simulated"])
    for part in ("weights", "prompts", "acceptance", "confidence", "draft vocabulary"):
        assert part in about
    assert told.count("SIMULATED") == len(figures["simulated"]) == 5
    assert all(of["identical"] == "not applicable" for of in figures["contestants"].values())
    assert figures["target"]["layers"] == 4 and figures["drafter"]["draft_vocab_size"] == 60
    assert figures["prompts"] == [{"title": "random 1", "rows": 2, "tokens": 12}]


def test_scripted_tau_is_reached(capsys, tmp_path):
    """Over a whole pattern, but for the rounds that the budget of a text cuts short."""
    path = tmp_path / "figures.json"
    sizes = ["--shape", "tiny", "--context", "8", "--num_prompts", "1", "--num_draft_positions", "4"]
    runs = ["--repeats", "1", "--new_tokens", "180", "--device", "cpu", "--contestants", "poss-chain"]
    benchmark(capsys, *sizes, *runs, "--acceptance", "3.5", "--output", str(path))
    assert json.loads(path.read_text())["contestants"]["poss-chain"]["tau"] == pytest.approx(3.5, abs=0.12)


def test_the_pair_that_ships_is_the_default(capsys, tmp_path):
    path = tmp_path / "figures.json"
    told = benchmark(
        capsys, *SMALL, "--repeats", "1", "--num_prompts", "1", "--contestants", "poss-tree", "--output", str(path)
    )
    assert json.loads(path.read_text())["contestants"]["poss-tree"]["identical"] is True
    assert "demo" in told.splitlines()[0]


def test_an_interrupted_run_leaves_its_repeats_and_is_resumed(capsys, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    arguments = [*SHAPE, *SMALL, *FAST, "--repeats", "3", "--output", str(path)]
    repeat, measure = Benchmark.repeat, Benchmark._measure

    def interrupted(self, contestant, index, repeat):
        if repeat == 3 and len(self.runs) % len(self.contestants):  # one has run already
            raise KeyboardInterrupt
        return measure(self, contestant, index, repeat)

    monkeypatch.setattr(Benchmark, "_measure", interrupted)
    assert main(["benchmark", *arguments]) == 130
    output = capsys.readouterr()
    assert "interrupted" in output.err and "2 repeats on" in output.out
    before = json.loads(path.read_text())
    assert before["repeats"] == 2 and before["repeats_wanted"] == 3

    monkeypatch.setattr(Benchmark, "_measure", measure)
    repeated = []
    monkeypatch.setattr(Benchmark, "repeat", lambda self, number: repeated.append(number) or repeat(self, number))
    benchmark(capsys, *arguments, "--resume")
    after = json.loads(path.read_text())
    assert repeated == [3] and after["repeats"] == 3
    assert after["runs"][: len(before["runs"])] == before["runs"]

    assert main(["benchmark", *arguments, "--resume", "--new_tokens", "9"]) == 1
    assert "measured with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "here"], "`--target` and `--poss` go together"),
        (["--shape", "tiny", "--demo"], "`--shape` and `--demo` were given"),
        (["--shape", "nothing"], "no shape 'nothing'"),
        (["--shape", "tiny", "--acceptance", "9"], "9 is impossible"),
        (["--shape", "tiny", "--prompts", "x.jsonl"], "`--prompts` goes with trained models"),
        (["--draft_vocab_size", "9"], "`--draft_vocab_size` goes with `--shape`"),
        (["--repeats", "0"], "`--repeats 0`; expected 1"),
        (["--new_tokens", "1"], "`--new_tokens 1`; expected 2"),
        (["--resume"], "`--resume` goes on from the file"),
        (["--prompts", "no/such.jsonl"], "no/such.jsonl"),
        (["--contestants", "assistant"], "needs a smaller language model"),
        (["--target", "/no/target", "--poss", "/no/poss"], "There is no folder /no/poss"),
        (["--dtype", "float33"], "`--dtype float33` is unknown"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, told, capsys):
    assert main(["benchmark", *arguments]) == 1
    assert told in capsys.readouterr().err
