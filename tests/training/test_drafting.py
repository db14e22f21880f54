"""Drafting for real between steps."""

import random

import numpy as np
import pytest
import torch
from conftest import drafter_for, small_target
from transformers import BloomConfig

from hf_poss import collect_statistics
from hf_poss.training.drafting import draft_from, evaluation_prompts, longest_prompt, preserved_random_state


@pytest.mark.parametrize(
    ("sample", "prompt"),
    [
        ({"input_ids": [5, 6, 7, 8, 9]}, [5, 6]),
        ({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}, [5, 6]),
        ({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}, [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, [5, 6, 7]),
        ({"input_ids": [5, 6]}, [5]),
        ({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "segment_ids": [1, 1, 1, 2, 2]}, [5, 6]),
        ({"input_ids": [5, 6, 7, 8, 9], "segment_ids": [1, 1, 1, 1, 2]}, [5, 6]),
        ({"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([-100, -100, -100, 8])}, [5, 6, 7]),
    ],
)
def test_prompts_end_where_answers_begin(sample, prompt):
    assert evaluation_prompts([sample] * 3, 2) == [prompt] * 2


def test_prompts_leave_room_for_the_text(llama):
    """The llama has 512 positions."""
    room = longest_prompt(llama.config, 500)
    assert room == 12
    sample = {"input_ids": list(range(20)), "labels": [-100] * 18 + [18, 19]}
    assert evaluation_prompts([sample], 1, room) == [list(range(6, 18))]
    assert evaluation_prompts([{"input_ids": [5, 6, 7, 8]}], 1, room) == [[5, 6]]
    assert longest_prompt(llama.config, 600) == 1
    assert longest_prompt(BloomConfig(), 600) is None  # ALiBi


def test_a_stream_is_read_no_further_than_needed():
    def stream():
        yield {"input_ids": [5, 6, 7, 8]}
        raise AssertionError("read on")

    assert evaluation_prompts(stream(), 1) == [[5, 6]]


def test_counts_are_those_of_generate():
    target = small_target()
    poss = drafter_for(target, "chain")
    prompts = [[5, 6, 7], [8, 3, 4, 9, 10, 6], [4, 4]]
    statistics = draft_from(target, poss, prompts, max_new_tokens=12, batch_size=2)
    with collect_statistics() as expected:
        for prompt in prompts:
            target.generate(torch.tensor([prompt]), assistant_model=poss, max_new_tokens=12, do_sample=False)
    assert [call.rounds for call in statistics.calls] == [call.rounds for call in expected.calls]
    assert (statistics.tokens, statistics.accepted) == (expected.tokens, expected.accepted)
    assert statistics.tokens == 3 * 11 and sum(statistics.accepted) > 0


def test_sampling_defaults_of_the_target_do_not_count():
    target = small_target()
    target.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    poss = drafter_for(target, "chain")
    runs = [draft_from(target, poss, [[5, 6, 7]], max_new_tokens=12).accepted for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


def test_random_states_go_on_as_before():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    expected = draws()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    with preserved_random_state(torch.device("cpu")):
        inside = draws()
    assert inside == expected
    assert draws() == expected
