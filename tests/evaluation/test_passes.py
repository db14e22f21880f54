"""What the passes of transformers' own drafters emit."""

import pytest
import torch
from conftest import make_prompt, small_target
from transformers.generation.streamers import BaseStreamer

from hf_poss.evaluation.passes import emitted_tokens, target_passes


class Emissions(BaseStreamer):
    """How many tokens the loop hands on at a time; the prompt is the first."""

    def __init__(self):
        self.counts = []

    def put(self, value):
        self.counts.append(value.numel())

    def end(self):
        pass


@pytest.mark.parametrize("drafting", ["prompt lookup", "assistant", "nothing"])
def test_emissions_are_those_that_are_streamed(drafting):
    target = small_target()
    ids = make_prompt(9).repeat(1, 2)
    arguments = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": small_target()},
        "nothing": {},
    }[drafting]
    streamer = Emissions()
    with target_passes(target) as cached:
        output = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            streamer=streamer,
            **arguments,
        )
    emitted = emitted_tokens(cached, ids.shape[1], output.shape[1] - ids.shape[1])
    assert emitted == streamer.counts[1:]
    assert sum(emitted) == 30
    assert (max(emitted) > 1) == (drafting != "nothing")
    assert not target._forward_pre_hooks


def test_a_first_pass_may_emit_all():
    assert emitted_tokens([0], 5, 3) == [3]
    assert emitted_tokens([0, 7], 5, 4) == [3, 1]
