"""Times of passes: how many of each, and what the pair is when it has fewer specialists."""

import pytest
import torch
from conftest import drafter_for, make_poss

from hf_poss.candidate_generator import DraftSettings
from hf_poss.evaluation.latency import (
    fewer_specialists,
    measure_times,
    round_costs,
    specialist_traffic,
    verification_sizes,
)
from hf_poss.evaluation.rehearsal import RoundRehearsal
from hf_poss.specialist_adapters import SharedLayer


SETTINGS = DraftSettings(4, 3, 10)


@pytest.fixture
def poss(llama):
    return make_poss(llama, positions_per_specialist=1, num_draft_positions=4)


def test_every_part_is_timed_as_often_as_was_asked(llama, poss):
    turns = []
    plain, times = measure_times(
        llama,
        {"four": (poss, SETTINGS), "one": (fewer_specialists(poss, 1), SETTINGS)},
        rows=2,
        context=8,
        repeats=3,
        prompt_repeats=2,
        on_run=lambda: turns.append(1),
    )
    assert len(turns) == 5
    assert len(plain.prompt) == 2 and len(plain.step) == 3
    for of in times.values():
        assert len(of.prompt) == len(of.prompt_context) == 2 and len(of.whole) == 3
        assert [len(seconds) for seconds in of.passes] == [3] * 4
        assert set(of.parts) == {"context", "tree", "verification", "walk", "cache"}
        assert all(len(seconds) == 3 for seconds in (*of.parts.values(), *of.verification.values()))
        assert list(of.verification) == verification_sizes(SETTINGS) == [1, 2, 4, 8, 10]
    figures = times["four"].to_dict()
    assert figures["round"]["count"] == 3 and figures["round"]["median"] > 0
    costs = round_costs(plain, times["four"])
    assert costs.plain == sorted(plain.step)[1]
    assert costs.of_round(2, 10) < costs.of_round(4, 10)


def test_fewer_specialists_share_weights_and_the_last_goes_on(llama, poss):
    twin = fewer_specialists(poss, 2)
    assert [twin.specialist(position) for position in (1, 2, 3, 4)] == [
        *poss.layers[:2],
        poss.layers[1],
        poss.layers[1],
    ]
    assert twin.fc is poss.fc and twin.device == poss.device
    assert fewer_specialists(poss, 4).config.num_specialists == 4
    prompt = torch.randint(3, 90, (1, 12))
    arguments = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(llama.generate(prompt, **arguments, assistant_model=twin), llama.generate(prompt, **arguments))


def test_fewer_lora_specialists_and_draft_vocabularies(llama):
    adapted = make_poss(llama, num_draft_positions=4, specialist_adapter={"r": 2, "lora_alpha": 4})
    assert isinstance(adapted.shared_layer, SharedLayer)
    twin = fewer_specialists(adapted, 1)
    assert twin.layers[0] is adapted.layers[0] and twin.device == adapted.device
    chosen = drafter_for(llama, "tree", draft_vocab_size=20)
    chosen.set_draft_vocabulary(torch.arange(chosen.config.vocab_size, 0, -1))
    assert torch.equal(fewer_specialists(chosen, 1).draft_vocabulary, chosen.draft_vocabulary)


@pytest.mark.parametrize("count", [0, 5])
def test_specialists_that_are_not_there_are_refused(poss, count):
    with pytest.raises(ValueError, match="There are 4 specialists"):
        fewer_specialists(poss, count)


@pytest.mark.parametrize("count", [1, 4])
def test_traffic_is_that_of_the_specialists_that_serve(llama, poss, count):
    """By hand: every pass reads its specialist but for keys and values, and these of all that will be read."""
    config, context, accepted = poss.config, 8, 2
    with RoundRehearsal(llama, fewer_specialists(poss, count), SETTINGS, 1, context, 32, accepted) as call:
        call.read_prompt()
        call.round()
        found = specialist_traffic(call)
    attention, mlp = poss.layers[0].self_attn, poss.layers[0].mlp
    keys_values = attention.k_proj.weight.nbytes + attention.v_proj.weight.nbytes
    layer = sum(parameter.nbytes for parameter in poss.layers[0].parameters()) - keys_values
    assert layer > sum(parameter.nbytes for parameter in mlp.parameters())
    assert found["distinct_weights"] == count * (layer + keys_values)
    # The context's keys and values are made once for all; those of the frontier of position k > 1 for those from its
    # own specialist on.
    served = [min(position, count) for position in range(1, 5)]
    made = count + sum(count - (serving - 1) for serving in served[1:])
    assert found["weights"] == 4 * layer + made * keys_values
    entry = 2 * config.num_key_value_heads * config.head_dim * 4
    read = sum(context + accepted + 1 + SETTINGS.depth * SETTINGS.top_k for _ in served) * entry
    written = (accepted + 1) * count + SETTINGS.top_k * (made - count)
    assert found["caches"] == read + written * entry
