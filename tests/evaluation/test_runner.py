"""An evaluation's run: texts, counts, turns, batches, seeds, and what is measured beside them."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import drafter_for, make_target
from tiny_chat import word_tokenizer

from hf_poss import collect_statistics
from hf_poss.demo import load_demo_pair
from hf_poss.evaluation.decoding_settings import DecodingSettings, padding_token
from hf_poss.evaluation.dialogues import dialogue_maker
from hf_poss.evaluation.drafters import (
    DrafterSpec,
    assistant_drafter,
    plain_drafter,
    prompt_lookup_drafter,
    specialists_drafter,
)
from hf_poss.evaluation.drift import feature_drift
from hf_poss.evaluation.questions import Question, QuestionSet
from hf_poss.evaluation.records import EvaluationFolder, QuestionRecord
from hf_poss.evaluation.runner import EvaluationRun, fitting_questions, make_units


CPU = torch.device("cpu")
NEW_TOKENS = 24
ENDS = [2, 14, 30]  # several, so that some texts end by themselves
TURNS = (["w7 w8 w9"], ["w10 w11 w12 w13 w14", "w15"], ["w16 w17", "w18 w19", "w20"], ["w21"])


@pytest.fixture(scope="module")
def target():
    target = make_target("llama", seed=4, scale=10.0)
    target.generation_config.eos_token_id = ENDS
    return target


@pytest.fixture(scope="module")
def poss(target):
    return drafter_for(target, "tree")


@pytest.fixture
def questions() -> QuestionSet:
    records = ({"turns": list(turns), "category": f"c{len(turns)}"} for turns in TURNS)
    return QuestionSet("mine", tuple(Question.of(of, index, "here") for index, of in enumerate(records)), "here")


@pytest.fixture
def run(target, poss) -> EvaluationRun:
    drafters = [plain_drafter(), specialists_drafter(DrafterSpec("poss", ("p",)), [poss], CPU, {})]
    tokenizer = word_tokenizer()
    decoding = DecodingSettings(NEW_TOKENS, ENDS, 0)
    return EvaluationRun(target, tokenizer, drafters, dialogue_maker(tokenizer, True), decoding)


@pytest.fixture
def folder(tmp_path) -> EvaluationFolder:
    return EvaluationFolder(tmp_path)


def records_of(run, folder, units) -> list[QuestionRecord]:
    with folder.writer(0) as output:
        for unit in units:
            list(run.run(unit, output))
    return list(folder.records())


def by_drafter(records) -> dict[str, dict[str, QuestionRecord]]:
    found: dict[str, dict[str, QuestionRecord]] = {}
    for record in records:
        found.setdefault(record.drafter, {})[record.question] = record
    return found


def conversation(target, tokenizer, turns: list[str], **arguments) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and new tokens of each turn: `generate` as a user calls it."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        prompt = inputs["input_ids"]
        new = target.generate(
            prompt,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **arguments,
        )[0, prompt.shape[1] :].tolist()
        yield prompt[0].tolist(), new
        answer = tokenizer.decode(new[:-1] if new[-1] in ENDS else new, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_prompts_and_counts_are_those_of_generate(run, folder, questions, target, poss, batch_size):
    units = make_units([questions], [0.0], [0], [batch_size])
    found = by_drafter(records_of(run, folder, units))
    ended = set()
    for question, turns in zip(questions.questions, TURNS, strict=True):
        with collect_statistics() as stats:
            wanted = list(conversation(target, run.tokenizer, turns, assistant_model=poss))
        plain, drafted = (found[name][question.id] for name in ("plain", "poss"))
        assert plain.category == f"c{len(turns)}"
        for one, other, (prompt, new), call in zip(plain.turns, drafted.turns, wanted, stats.calls, strict=True):
            assert one.token_ids == other.token_ids == new
            assert one.prompt_tokens == other.prompt_tokens == len(prompt)
            ended.add(new[-1] in ENDS)
            assert one.authors == [0] * len(new) and one.rounds == one.tokens == len(new) - 1
            assert one.drafted == one.reached == one.accepted == []
            for name in ("rounds", "tokens", "authors", "drafted", "reached", "accepted"):
                assert getattr(other, name) == getattr(call, name), name
            assert other.tokens == len(new) - 1 == sum(other.accepted) + other.authors[1:].count(0)
            for record in (one, other):
                kept = [token for token in new if token > 2]  # the others are special tokens
                assert record.text.split() == run.tokenizer.decode(kept).split()
                assert record.seconds > 0 and record.prompt_seconds > 0
    assert ended == {True, False}
    assert sum(sum(turn.accepted) for record in found["poss"].values() for turn in record.turns)


def test_shares_of_a_batch_add_up_to_its_call(run, folder, questions, monkeypatch):
    """Rows of a call: all four questions, then two, then one."""
    from hf_poss.evaluation import runner

    calls, timed = [], runner.timed_generate

    def spy(target, inputs, **arguments):
        output, seconds = timed(target, inputs, **arguments)
        calls.append((inputs["input_ids"].shape[0], seconds, arguments["max_new_tokens"], output))
        return output, seconds

    monkeypatch.setattr(runner, "timed_generate", spy)
    [unit] = make_units([questions], [0.0], [0], batch_sizes=[4])
    records = [record for record in records_of(run, folder, [unit]) if record.drafter == "plain"]
    whole = [call for call in calls[: len(calls) // 2] if call[2] == NEW_TOKENS]
    assert [call[0] for call in whole] == [4, 2, 1]
    for turn, (rows, seconds, _, _) in enumerate(whole):
        of_turn = [record.turns[turn] for record in records if len(record.turns) > turn]
        assert [record.rows for record in of_turn] == [rows] * rows
        assert sum(record.seconds for record in of_turn) == pytest.approx(seconds)
        steps = max(len(record.token_ids) for record in of_turn) - 1
        assert sum(record.passes for record in of_turn) == pytest.approx(steps)


def test_passes_of_a_batch_are_the_targets(run, folder, questions, target):
    seen = []
    hook = target.register_forward_pre_hook(lambda *_: seen.append(1))
    [unit] = make_units([questions], [0.0], [0], batch_sizes=[4])
    run.drift, run.drafters = False, run.drafters[1:]
    first_turns = replace(unit, questions=tuple(replace_turns(question, 1) for question in unit.questions))
    try:
        records = records_of(run, folder, [first_turns])
    finally:
        hook.remove()
    passes = sum(record.turns[0].passes for record in records)
    # The call of one token, the prompt and the rounds; older releases of transformers want the text's end cached, too.
    assert len(seen) - 2 - passes in (0, 1)
    assert max(record.turns[0].rounds for record in records) == passes


def replace_turns(question: Question, count: int) -> Question:
    return Question.of({"turns": question.texts[:count]}, question.id, "here")


def test_who_is_first_changes(run, folder, questions):
    run.drafters = [*run.drafters, prompt_lookup_drafter()]
    order = [record.drafter for record in records_of(run, folder, make_units([questions], [0.0], [0]))]
    names = ["plain", "poss", "prompt-lookup"]
    turns = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert turns == [names[first:] + names[:first] for first in (0, 1, 2, 0)]


def test_transformers_own_drafters_are_counted_by_their_passes(run, folder, target, questions):
    run.drafters = [plain_drafter(), prompt_lookup_drafter(4), assistant_drafter(copy.deepcopy(target), "itself")]
    found = by_drafter(records_of(run, folder, make_units([questions], [0.0], [0])))
    for question in questions.questions:
        plain = found["plain"][question.id]
        for name in ("prompt-lookup", "assistant"):
            for one, other in zip(plain.turns, found[name][question.id].turns, strict=True):
                assert other.token_ids == one.token_ids
                assert len(other.authors) == len(other.token_ids)
                assert other.authors.count(0) in (other.rounds, other.rounds + 1)
                assert other.tokens <= len(other.token_ids) - 1
                assert other.drafted == []
    # a target that drafts for itself is always right
    assert sum(turn.rounds for record in found["assistant"].values() for turn in record.turns) < 0.5 * sum(
        turn.rounds for record in found["plain"].values() for turn in record.turns
    )


def test_sampled_runs_repeat_by_seed_and_draw_alike(run, tmp_path, questions):
    """One row draws from one source, with and without drafts: the texts are the same."""

    def texts(name: str, seed: int, reverse: bool = False) -> dict[tuple, list[list[int]]]:
        (tmp_path / name).mkdir()
        units = make_units([questions], [1.0], [seed])
        records = records_of(run, EvaluationFolder(tmp_path / name), units[::-1] if reverse else units)
        return {
            (record.question, record.drafter): [turn.token_ids for turn in record.turns]
            for record in sorted(records, key=lambda record: record.key)
        }

    first, again, other = texts("a", 3), texts("b", 3, reverse=True), texts("c", 4)
    assert first == again and first != other
    assert all(first[question.id, "plain"] == first[question.id, "poss"] for question in questions.questions)


def test_units_are_batches_by_set_mode_and_seed(questions):
    other = QuestionSet("other", questions.questions[:1], "here")
    units = make_units([questions, other], [0.0, 1.0], [5, 6], batch_sizes=[3], breakdown_questions=2)
    assert [unit.number for unit in units] == list(range(len(units)))
    seen = [(unit.benchmark, len(unit.questions), unit.temperature, unit.seed, unit.is_broken_down) for unit in units]
    modes = [(0.0, 5), (1.0, 5), (1.0, 6)]  # seeds change nothing in greedy search
    assert seen == [
        (name, rows, temperature, seed, seed == 5 and first)
        for name, sizes in (("mine", [(3, True), (1, False)]), ("other", [(1, True)]))
        for temperature, seed in modes
        for rows, first in sizes
    ]


def test_units_have_every_batch_size(questions):
    units = make_units([questions], [0.0], [0], [1, 3])
    assert [(unit.batch_size, len(unit.questions)) for unit in units] == [*[(1, 1)] * 4, (3, 3), (3, 1)]
    assert [unit.batch for unit in units] == [0, 1, 2, 3, 0, 1]
    keys = {unit.key(question, "plain", 0) for unit in units for question in unit.questions}
    assert len(keys) == 8  # a question has a record of each


def test_batch_sizes_have_records_of_their_own_and_transformers_drafts_for_one_row(run, folder, questions, target):
    run.drafters = [*run.drafters, prompt_lookup_drafter(3)]
    units = make_units([questions], [0.0], [0], [1, 3])
    records = records_of(run, folder, units)
    found = {size: by_drafter(of for of in records if of.batch_size == size) for size in (1, 3)}
    assert set(found[1]) == {"plain", "poss", "prompt-lookup"} and set(found[3]) == {"plain", "poss"}
    for drafter in ("plain", "poss"):
        for question in questions.questions:
            one, three = (found[size][drafter][question.id].turns for size in (1, 3))
            assert [turn.token_ids for turn in one] == [turn.token_ids for turn in three]
    assert {turn.rows for of in found[1].values() for record in of.values() for turn in record.turns} == {1}
    assert [found[3]["poss"][question.id].turns[0].rows for question in questions.questions] == [3, 3, 3, 1]
    finished = {record.key for record in records}
    assert [run.missing(unit, finished) for unit in units] == [[]] * len(units)
    assert len(list(run.warm_up(units))) == 3 + 2


def test_parts_are_of_the_first_questions_and_of_specialists(run, folder, questions):
    records = records_of(run, folder, make_units([questions], [0.0], [0], breakdown_questions=1))
    told = {(record.question, record.drafter) for record in records if record.turns[0].parts is not None}
    assert told == {("0", "poss")}
    [turn] = by_drafter(records)["poss"]["0"].turns
    assert set(turn.parts) == {
        *("context", "passes", "tree", "prompt", "verification", "walk", "cache", "other"),
    }
    assert all(seconds >= 0 for seconds in turn.parts.values())
    assert turn.parts["prompt"] > 0 and turn.parts["verification"] > 0
    assert sum(turn.pass_seconds) == pytest.approx(turn.parts["passes"], rel=0.2)


def test_drift_is_that_of_the_answer_and_of_greedy_runs(run, folder, questions, target, poss):
    records = records_of(run, folder, make_units([questions], [0.0, 1.0], [0]))
    for record in records:
        for turn in record.turns:
            assert (turn.drift is not None) == (record.drafter == "poss" and not record.temperature)
    of = by_drafter(record for record in records if not record.temperature)["poss"]["0"].turns[0]
    prompt = run.begin(questions.questions[0]).prompt
    ids = torch.tensor([[*prompt, *of.token_ids]])
    answer = torch.tensor([[False] * len(prompt) + [True] * len(of.token_ids)])
    assert of.drift == feature_drift(target, poss, ids, counted=answer)
    assert of.drift.rows[0] == len(of.token_ids)


def test_only_what_is_missing_runs(run, folder, questions):
    units = make_units([questions], [0.0], [0], batch_sizes=[2])
    everything = records_of(run, folder, units)
    lost = {everything[1].key, everything[-1].key}
    finished = {record.key for record in everything} - lost
    [path] = folder.path.glob("*.jsonl")
    kept = [
        line for line in path.read_text().splitlines() if QuestionRecord.from_dict(json.loads(line)).key in finished
    ]
    path.write_text("\n".join(kept) + "\n")
    ran = []
    with folder.writer(0) as output:
        for unit in units:
            ran += [(unit.number, name) for name in run.run(unit, output, finished)]
    assert len(ran) == 2
    again = list(folder.records())
    assert {record.key for record in again[-2:]} == lost and len(again) == len(everything)
    texts = {record.key: [turn.token_ids for turn in record.turns] for record in everything}
    assert {record.key: [turn.token_ids for turn in record.turns] for record in again} == texts


def test_later_turns_without_room_are_left_out(run, folder, questions, warnings_seen):
    first = max(len(run.begin(question).prompt) for question in questions.questions)
    run.room = first
    records = records_of(run, folder, make_units([questions], [0.0], [0]))
    assert all(len(record.turns) == 1 for record in records)
    assert len([warning for warning in warnings_seen() if "turn behind the first" in warning]) == 1


def test_questions_that_do_not_fit_are_told(run, questions):
    fitting, reason = fitting_questions(questions, run.begin, room=5)
    assert [question.id for question in fitting.questions] == ["2", "3"] and fitting.skipped == 2
    assert "question 1 has 8 tokens, and 5 leave room" in reason
    fitting, reason = fitting_questions(questions, run.begin, room=None)
    assert fitting == questions and reason is None


def test_warming_up_leaves_no_records_and_takes_the_longest_prompt(run, questions, monkeypatch):
    lengths = []
    generate = EvaluationRun._generate

    def spy(self, contestant, unit, turn, prompts, new_tokens):
        lengths.append(len(prompts[0]))
        return generate(self, contestant, unit, turn, prompts, new_tokens)

    monkeypatch.setattr(EvaluationRun, "_generate", spy)
    units = make_units([questions], [0.0, 0.5, 1.0], [0])
    assert list(run.warm_up(units)) == ["plain", "poss"] * 2  # greedy and sampled
    assert set(lengths) == {max(len(run.begin(question).prompt) for question in questions.questions)}


def test_stop_strings_end_rows_of_a_batch(folder):
    """Rows that end by a string are filled up like those that end by a token."""
    target, poss, tokenizer = load_demo_pair()
    texts = ["def read(path):\n    with open(path) as file:\n", "import os\n", "class Reader:\n    def __init__"]
    questions = tuple(Question.of({"prompt": text}, index, "here") for index, text in enumerate(texts))
    drafters = [plain_drafter(), specialists_drafter(DrafterSpec("poss", ("p",)), [poss], CPU, {})]
    ends = [tokenizer.eos_token_id]
    decoding = DecodingSettings(
        NEW_TOKENS, ends, padding_token(tokenizer, ends, len(tokenizer)), {"stop_strings": ["("]}
    )
    run = EvaluationRun(target, tokenizer, drafters, dialogue_maker(tokenizer, False), decoding, drift=False)
    found = by_drafter(records_of(run, folder, make_units([QuestionSet("code", questions, "here")], [0.0], [0], [3])))
    lengths = set()
    for index, text in enumerate(texts):
        inputs = tokenizer(text, return_tensors="pt")
        alone = target.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, stop_strings=["("], tokenizer=tokenizer
        )[0, inputs["input_ids"].shape[1] :].tolist()
        lengths.add(len(alone))
        assert found["plain"][str(index)].turns[0].token_ids == found["poss"][str(index)].turns[0].token_ids == alone
    assert len(lengths) > 1
