"""The benchmark of the roll-out: both formulations are the same mathematics."""

import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_roll_out.py"
SIZES = "--hidden_size 32 --intermediate_size 48 --num_attention_heads 4 --num_key_value_heads 2 --vocab_size 61"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(benchmark, formulation: str, *more: str) -> dict[str, float]:
    options = [*SIZES.split(), "--formulation", formulation, "--tokens", "150", "--steps", "1", *more]
    return benchmark.measure(benchmark.parse(options))


def test_formulations_agree(benchmark):
    naive, ours = (measured(benchmark, name, "--batch_size", "2") for name in ("naive", "hf_poss"))
    assert ours["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    assert ours["gradient"] == pytest.approx(naive["gradient"], rel=1e-4)


def test_table_has_a_row_a_length(benchmark, capsys, tmp_path):
    options = [*SIZES.split(), "--lengths", "24", "40", "--repeats", "1", "--steps", "1"]
    benchmark.main([*options, "--json", str(tmp_path / "figures.json")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 24 |", "| 40 |"))]
    assert len(rows) == 2 and all(row.endswith("x |") for row in rows)
    assert (tmp_path / "figures.json").is_file()
