"""Prompt sets: those that ship, files of one's own, data sets."""

import json
from pathlib import Path

import pytest

from hf_poss.evaluation.questions import BENCHMARKS, PAPER_BENCHMARKS, demo_set, load_benchmark, load_benchmarks


SHARED = Path(__file__).parents[3] / "shared" / "benchmarks"


def write(path: Path, *records: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return str(path)


def roles(question) -> list[str]:
    return [message["role"] for message in question.conversation.messages]


def test_the_papers_sets_have_80_questions_each_and_spec_bench_480():
    sets = {of.name: of for of in load_benchmarks(BENCHMARKS)}
    assert {name: len(of.questions) for name, of in sets.items()} == {
        **dict.fromkeys(PAPER_BENCHMARKS, 80),
        "spec_bench": 480,
    }
    assert sets["mt_bench"].turns == 160 and sets["spec_bench"].turns == 560
    assert all(of.license == "Apache-2.0" and of.source.startswith("https://") for of in sets.values())
    # the six categories of Spec-Bench: MT-Bench's eight count as one
    assert len({question.category for question in sets["spec_bench"].questions}) == 8 + 5


def test_three_sets_are_within_spec_bench():
    within = {tuple(question.texts) for question in load_benchmark("spec_bench").questions}
    for name in PAPER_BENCHMARKS:
        found = {tuple(question.texts) for question in load_benchmark(name).questions}
        assert (found <= within) == (name in ("mt_bench", "qa", "sum")), name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_ships_is_what_was_published(name):
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED} to compare with")
    published = [json.loads(line) for line in (SHARED / name / "question.jsonl").read_text().splitlines()]
    assert [(question.id, question.category, question.texts) for question in load_benchmark(name).questions] == [
        (str(record["question_id"]), record["category"], record["turns"]) for record in published
    ]


def test_a_file_of_ones_own(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"prompt": "one"},
        {"question_id": 7, "category": "a", "turns": ["two", "three"]},
        {
            "id": "x",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "four"},
                {"role": "assistant", "content": "reference"},
                {"role": "user", "content": "five"},
            ],
        },
        {
            "prompt": [
                {"role": "user", "content": "2 + 2"},
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": "3 + 3"},
            ]
        },
    )
    of = load_benchmark(path)
    assert (of.name, of.source, of.license) == ("mine", path, None)
    assert [question.id for question in of.questions] == ["1", "7", "x", "4"]
    assert [question.category for question in of.questions] == ["", "a", "", ""]
    # Answers in "messages" are the drafters' to write; those in a prompt are examples.
    assert [question.texts for question in of.questions] == [
        ["one"],
        ["two", "three"],
        ["be brief\n\nfour", "five"],
        ["2 + 2\n\n4\n\n3 + 3"],
    ]
    assert of.turns == 6
    assert roles(of.questions[1]) == ["user", "assistant", "user"]
    assert of.questions[3].conversation.prompt_length == 3


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"question": "w"}, 'has neither a "prompt"'),
        ({"prompt": ""}, "has neither"),
        ({"turns": []}, "has neither"),
        ({"turns": ["a", 3]}, "has neither"),
        ({"messages": [{"role": "user"}]}, "has neither"),
        ({"messages": [{"role": "system", "content": "a"}]}, "has neither"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "has neither"),
        (["a"], "has neither"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, record, told):
    path = write(tmp_path / "bad.jsonl", {"prompt": "good"}, record)
    with pytest.raises(ValueError, match=f"Line 2 of .*bad.jsonl.*{told}"):
        load_benchmark(path)


def test_broken_and_empty_files_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{')
    with pytest.raises(ValueError, match="Line 2 of .*bad.jsonl is no JSON"):
        load_benchmark(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        load_benchmark(str(path))
    with pytest.raises(ValueError, match="no prompt set 'mt_bensh': expected mt_bench"):
        load_benchmark("mt_bensh")


def test_ids_that_occur_twice_are_refused(tmp_path):
    path = write(tmp_path / "twice.jsonl", {"id": 3, "prompt": "a"}, {"id": "3", "prompt": "b"})
    with pytest.raises(ValueError, match="several questions with the id '3'"):
        load_benchmark(path)


def test_names_of_files(tmp_path):
    """EAGLE keeps every set as NAME/question.jsonl."""
    path = write(tmp_path / "poems" / "question.jsonl", {"prompt": "a"})
    assert load_benchmark(path).name == load_benchmark(str(tmp_path / "poems")).name == "poems"
    assert load_benchmark(f"verse={path}").name == "verse"
    other = write(tmp_path / "poems.jsonl", {"prompt": "b"})
    with pytest.raises(ValueError, match="Two prompt sets are called 'poems'"):
        load_benchmarks([path, other])
    assert [of.name for of in load_benchmarks([f"{path},verse={other}", "qa"])] == ["poems", "verse", "qa"]


def test_a_limit_keeps_the_first_questions_of_each_set():
    some = load_benchmarks(["mt_bench,qa"], limit=3)
    assert [[question.id for question in of.questions] for of in some] == [["81", "82", "83"], ["321", "322", "323"]]


def test_a_data_set_of_the_hub(tmp_path):
    """A folder loads as a data set of the Hub does."""
    write(tmp_path / "verse" / "train.jsonl", {"prompt": "a"})
    write(tmp_path / "verse" / "test.jsonl", {"prompt": "b"}, {"prompt": "c"})
    name = f"hub:{tmp_path}/verse"
    of = load_benchmark(name)
    assert (of.name, of.source) == ("verse", name)
    assert [question.texts for question in of.questions] == [["b"], ["c"]]
    assert [question.texts for question in load_benchmark(f"{name}:train").questions] == [["a"]]
    assert load_benchmark(f"poems={name}:train").name == "poems"
    with pytest.raises(ValueError, match="names no data set"):
        load_benchmark("hub:")


def test_a_data_set_without_a_test_split_says_what_there_is(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "verse" / f"{split}.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match="has the splits train, validation; name one"):
        load_benchmark(f"hub:{tmp_path}/verse")


def test_a_changed_question_changes_the_digest(tmp_path):
    digests = {load_benchmark(write(tmp_path / "a.jsonl", {"prompt": text})).about()["digest"] for text in "abca"}
    assert len(digests) == 3


def test_the_demos_prompts_are_a_set():
    of = demo_set(2)
    assert (of.name, len(of.questions), of.turns) == ("demo", 2, 2)
    assert of.questions[0].id.endswith(".py")
