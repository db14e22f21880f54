"""The example for lm-evaluation-harness, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_eval_harness.py"


def test_scores_and_texts_are_those_of_the_target(tmp_path):
    """Prompts differ in length, so batches are padded; stop strings end rows at different times."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--batch_size", "3", "--limit", "5"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    alone, drafted = re.findall(r"similarity (\d\.\d+)", result.stdout)
    assert alone == drafted
    assert 0 < float(alone) < 1
    assert float(re.search(r"tau (\d+\.\d+)", result.stdout)[1]) > 1.5
    assert "5 of 5 texts are equal" in result.stdout
