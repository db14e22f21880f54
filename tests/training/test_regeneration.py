"""Answers of a tiny target against its own `generate`, and what decides them."""

import pytest
import torch
from conftest import EOS, make_poss, make_target
from scipy import stats
from tiny_chat import word_tokenizer

from hf_poss.training.record_files import RecordFile
from hf_poss.training.regeneration import Sampling, answer, end_tokens, regenerate
from hf_poss.training.requests import request_maker
from hf_poss.training.row_sampling import RowSampling, draws


PROMPTS = [[11, 5, 60], [33, 8, 71, 29, 4, 50, 9], [20], [14, 15, 16, 17, 18]]
PLACES = [(0, 0), (5, 1), (2, 0), (3, 0)]
SAMPLED = Sampling(max_new_tokens=24, temperature=1.5, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def target():
    return make_target("llama", scale=3.0)


def test_greedy_answers_are_those_of_generate(target):
    knobs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = []
    for prompt in PROMPTS:
        written = target.generate(torch.tensor([prompt]), **knobs)[0, len(prompt) :].tolist()
        end = written.index(EOS) if EOS in written else len(written)
        expected.append((written[:end], EOS in written))
    assert answer(target, PROMPTS, Sampling(max_new_tokens=24), PLACES, [EOS]) == expected


def test_answers_end_where_the_target_ends_them(target):
    whole = answer(target, PROMPTS, Sampling(max_new_tokens=24), PLACES, [])
    end = whole[0][0][10]
    cut = answer(target, PROMPTS, Sampling(max_new_tokens=24), PLACES, [EOS, end])
    for (tokens, finished), (shorter, ended) in zip(whole, cut, strict=True):
        ends = [tokens.index(token) for token in (EOS, end) if token in tokens]
        assert not finished and ended == bool(ends)
        assert shorter == tokens[: min(ends, default=None)]
    assert cut[0][1]


def test_sampled_answers_do_not_depend_on_the_batch(target):
    together = answer(target, PROMPTS, SAMPLED, PLACES, [EOS])
    alone = [answer(target, [p], SAMPLED, [place], [EOS])[0] for p, place in zip(PROMPTS, PLACES, strict=True)]
    backwards = answer(target, PROMPTS[::-1], SAMPLED, PLACES[::-1], [EOS])[::-1]
    assert together == alone == backwards
    greedy = answer(target, PROMPTS, Sampling(max_new_tokens=24), PLACES, [EOS])
    assert all(one != other for one, other in zip(together, greedy, strict=True))


@pytest.mark.parametrize("places", [[(0, 1), (5, 0), (2, 1), (3, 1)], [(9, 0), (8, 1), (7, 0), (6, 0)]])
def test_records_and_turns_draw_on_their_own(target, places):
    one, other = (answer(target, PROMPTS, SAMPLED, at, [EOS]) for at in (PLACES, places))
    assert all(first != second for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=24), SAMPLED], ids=["greedy", "sampled"])
def test_specialists_change_no_text(target, sampling):
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=4)
    plain = answer(target, PROMPTS, sampling, PLACES, [EOS])
    assert answer(target, PROMPTS, sampling, PLACES, [EOS], poss) == plain


def test_settings_of_the_target_s_own_sampling_are_not_applied(target):
    plain = answer(target, PROMPTS, SAMPLED, PLACES, [EOS])
    sampler = make_target("llama", scale=3.0)
    sampler.generation_config.update(do_sample=True, temperature=0.3, top_k=2, top_p=0.5)
    assert answer(sampler, PROMPTS, SAMPLED, PLACES, [EOS]) == plain


def test_tokens_have_the_probabilities_of_the_scores():
    """A chi-square test over many rows; a token without probability never comes."""
    rows = 20000
    scores = torch.tensor([0.5, -1.0, 2.0, float("-inf"), 1.0])
    sampling = RowSampling(torch.stack([draws(1, 0, row) for row in range(rows)]), prompt_length=2)
    chosen = sampling(torch.zeros(rows, 2, dtype=torch.long), scores.repeat(rows, 1)).argmax(-1)
    observed = torch.bincount(chosen, minlength=5).double()
    expected = rows * scores.double().softmax(-1)
    assert observed[3] == 0
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval_take_tokens_with_probability(number):
    scores = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    chosen = RowSampling(torch.tensor([[number]]), 1)(torch.zeros(1, 1, dtype=torch.long), scores).argmax(-1)
    assert chosen.item() == (1 if number == 0.0 else 2)


def test_end_tokens_are_the_target_s_else_the_tokenizer_s(target):
    other = make_target("llama")
    other.generation_config.eos_token_id = [5, 6]
    assert end_tokens(other, word_tokenizer()) == [5, 6]
    other.generation_config.eos_token_id = None
    assert end_tokens(other, word_tokenizer()) == [EOS]


def test_conversations_are_answered_turn_by_turn(target, tmp_path):
    """Of several turns, in batches of two, each answer is what the target says behind its own earlier answers."""
    tokenizer = word_tokenizer()
    chats = [
        [role for turn in range(turns) for role in (("user", f"w{10 * row + turn + 7}"), ("assistant", "w90"))]
        for row, turns in enumerate((3, 1, 2, 1, 3))
    ]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    make = request_maker(["messages"], tokenizer)
    sampling = Sampling(max_new_tokens=6)
    with RecordFile(tmp_path / "records.jsonl") as output:
        requests = [make(number, row) for number, row in enumerate(rows)]
        done = list(regenerate(target, requests, output, sampling, [EOS], batch_size=2))
    assert sorted(request.index for request in done) == list(range(len(rows)))
    for request in done:
        messages = request.record()["messages"]
        assert [m["role"] for m in messages] == [m["role"] for m in rows[request.index]["messages"]]
        for place in range(1, len(messages), 2):
            prompt = tokenizer.apply_chat_template(
                messages[:place], add_generation_prompt=True, return_dict=True, add_special_tokens=False
            )["input_ids"]
            [(written, _)] = answer(target, [prompt], sampling, [(0, 0)], [EOS])
            assert tokenizer.encode(messages[place]["content"]) == [t for t in written if t > EOS]


def test_prompts_that_are_too_long_are_not_answered(target, tmp_path):
    make = request_maker(["prompt"], word_tokenizer())
    requests = [make(0, {"prompt": "w7 w8 w9 w10"}), make(1, {"prompt": "w7 w8 w9"})]
    with RecordFile(tmp_path / "records.jsonl") as output:
        done = list(regenerate(target, requests, output, Sampling(max_new_tokens=5), [EOS], max_length=8))
    assert {request.index: request.turn for request in done} == {0: 0, 1: 1}
    assert "4 tokens" in done[0].record()["skipped"]


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
