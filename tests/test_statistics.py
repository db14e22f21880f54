"""What `collect_statistics` counts, against drafts whose fate is known in advance or worked out anew from the text."""

import threading
import time

import pytest
import torch
from conftest import PAD, SMALL_VOCAB, drafter_for, left_padded, small_target, with_slips
from transformers import PreTrainedModel

from hf_poss import PosSCandidateGenerator, collect_statistics
from hf_poss.draft_passes import DraftPasses
from hf_poss.draft_tree import DraftTree
from hf_poss.statistics import CallRecord, CallStatistics, GenerationStatistics


PROMPT = torch.tensor([[7, 8, 3, 8, 10, 4, 5]])


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return small_target()


def write(target, poss, number=24, prompt=PROMPT, **kwargs) -> list[int]:
    """New tokens of a greedy call."""
    output = target.generate(prompt, assistant_model=poss, max_new_tokens=number, do_sample=False, **kwargs)
    return output[0, prompt.shape[1] :].tolist()


def draft_known_text(monkeypatch, text: list[int], wrong_position: int | None = None) -> None:
    """Makes drafts hold the next tokens of `text`, a wrong one at `wrong_position`; trees have a second, wrong node at
    every level."""

    def draft(self, root_tokens, settings, *_):
        committed = self.columns.lengths[0] + 1
        tokens, parents, depths, parent = [int(root_tokens)], [0], [0], 0
        for position in range(1, settings.depth + 1):
            right = text[committed + position - 1]
            level = [(right + 1) % SMALL_VOCAB if position == wrong_position else right]
            if not settings.is_chain:
                level.insert(0, (right + 2) % SMALL_VOCAB)
            tokens, parents = tokens + level, parents + [parent] * len(level)
            depths, parent = depths + [position] * len(level), len(tokens) - 1
        return DraftTree(*(torch.tensor([row]) for row in (tokens, parents, depths)), max_depth=settings.depth)

    monkeypatch.setattr(PosSCandidateGenerator, "draft", draft)


@pytest.fixture
def known_text(target) -> list[int]:
    return target.generate(PROMPT, max_new_tokens=40, do_sample=False)[0].tolist()


# ---- Counts ----


def test_all_drafts_right(target, shape, known_text, monkeypatch):
    """11 tokens at depth 4: one from the prompt, then two rounds of five."""
    draft_known_text(monkeypatch, known_text)
    with collect_statistics() as stats:
        write(target, drafter_for(target, shape), 11)
    width = 1 if shape == "chain" else 2
    assert (stats.rounds, stats.tokens) == (2, 10)
    assert stats.drafted == [2 * width] * 4
    assert stats.reached == stats.accepted == [2, 2, 2, 2]
    assert stats.pos_acc == [1.0, 1.0, 1.0, 1.0]
    assert stats.tau == stats.tau_macro == 5.0
    assert stats.calls[0].authors == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_the_third_draft_always_wrong(target, shape, known_text, monkeypatch):
    """Each round gives two drafted tokens and the target's; position 4 is drafted, and never its turn."""
    draft_known_text(monkeypatch, known_text, wrong_position=3)
    with collect_statistics() as stats:
        write(target, drafter_for(target, shape), 16)
    width = 1 if shape == "chain" else 2
    # 15 tokens in five rounds; the last one has room for two drafted tokens, of which none is wrong.
    assert (stats.rounds, stats.tokens) == (5, 15)
    assert stats.calls[0].authors == [0] + [1, 2, 0] * 5
    assert stats.drafted == [5 * width, 5 * width, 4 * width, 4 * width]
    assert stats.reached[:3] == [5, 5, 4] and sum(stats.reached[3:]) == 0
    assert stats.accepted == [5, 5]
    assert stats.pos_acc[:3] == [1.0, 1.0, 0.0]
    assert stats.tau == 3.0


def test_no_draft_right(target, shape, known_text, monkeypatch):
    draft_known_text(monkeypatch, known_text, wrong_position=1)
    with collect_statistics() as stats:
        write(target, drafter_for(target, shape), 9)
    assert (stats.rounds, stats.tokens, stats.tau) == (8, 8, 1.0)
    assert sum(stats.accepted) == 0 and stats.pos_acc[0] == 0.0
    assert stats.calls[0].authors == [0] * 9


def test_an_end_of_sequence_that_was_drafted(target, shape, known_text, monkeypatch):
    """The text ends with a drafted token: the round has no token of the target's own."""
    new = known_text[PROMPT.shape[1] :]
    step = max(index for index in range(1, 5) if new[index] not in new[:index])  # inside the first round's draft
    draft_known_text(monkeypatch, known_text)
    with collect_statistics() as stats:
        written = write(target, drafter_for(target, shape), eos_token_id=new[step], pad_token_id=0)
    assert written == new[: step + 1]
    assert stats.calls[0].authors == list(range(step + 1))
    assert stats.accepted == stats.reached[:step] == [1] * step
    assert sum(stats.reached) == step
    assert stats.tau == step


@pytest.mark.parametrize(("depth", "n", "num_positions"), [(4, 2, 4), (6, 1, 3), (2, 4, 4)])
def test_counts_are_those_of_the_drafts_and_the_text(target, shape, depth, n, num_positions, monkeypatch):
    """Replays real drafts over the final text, token by token."""
    trees = []
    draft = PosSCandidateGenerator.draft

    def spy(self, *args):
        trees.append(draft(self, *args))
        return trees[-1]

    monkeypatch.setattr(PosSCandidateGenerator, "draft", spy)
    poss = drafter_for(target, shape, depth=depth, positions_per_specialist=n, num_draft_positions=num_positions)
    with collect_statistics() as stats:
        new = write(target, poss, 40)

    authors, drafted, reached, accepted, rounds = [0], [0] * depth, [0] * depth, [0] * depth, 0
    while len(authors) < len(new):
        rounds += 1
        tokens, parents, depths = [0], [0], [0]
        if len(authors) < len(new) - 1:  # else there was room for the target's token alone, and no draft
            tree = trees.pop(0)
            tokens, parents, depths = (rows[0].tolist() for rows in (tree.tokens, tree.parents, tree.depths))
        for level in depths[1:]:
            drafted[level - 1] += 1
        node, position = 0, 1
        while node is not None and len(authors) < len(new):
            children = {tokens[child]: child for child in range(1, len(tokens)) if parents[child] == node}
            node = children.get(new[len(authors)])
            if position in depths[1:]:
                reached[position - 1] += 1
            if node is not None:
                accepted[position - 1] += 1
            authors.append(0 if node is None else position)
            position += 1
    assert not trees

    def padded(counts):
        return counts + [0] * (depth - len(counts))

    call = stats.calls[0]
    assert call.authors == authors
    assert stats.rounds == rounds
    assert stats.tokens == len(new) - 1
    assert padded(stats.drafted) == drafted
    assert padded(stats.reached) == reached
    assert padded(stats.accepted) == accepted
    assert sum(accepted) > 0, "nothing was accepted, so little was counted"
    for k, rate in enumerate(stats.pos_acc):
        assert rate == (accepted[k] / reached[k] if reached[k] else 0.0)

    specialists = -(-num_positions // n)
    for counts, by_specialist in ((drafted, stats.drafted_by_specialist), (accepted, stats.accepted_by_specialist)):
        expected = [0] * specialists
        for k, count in enumerate(counts, start=1):
            expected[min((k - 1) // n, specialists - 1)] += count
        assert by_specialist == expected


# ---- Averages ----


def test_micro_and_macro_averages(target, shape, known_text, monkeypatch):
    """Calls of 5 and 2 tokens a round; macro is the mean of these, micro weighs them by rounds."""
    poss = drafter_for(target, shape)
    with collect_statistics() as stats:
        draft_known_text(monkeypatch, known_text)
        write(target, poss, 11)  # 10 tokens in 2 rounds
        draft_known_text(monkeypatch, known_text, wrong_position=2)
        write(target, poss, 13)  # 12 tokens in 6 rounds
    assert [(call.tokens, call.rounds) for call in stats.calls] == [(10, 2), (12, 6)]
    assert stats.tau == pytest.approx(22 / 8)
    assert stats.tau_macro == pytest.approx((5.0 + 2.0) / 2)
    # Position 2: right in both rounds of the first call, wrong in five of the other's; its last has no room for it.
    assert stats.pos_acc[:2] == [1.0, pytest.approx(2 / 7)]


def record_of(*rows: list[tuple[list[int], int, int]]) -> CallRecord:
    """A call whose rows had these rounds: drafted by position, accepted, emitted."""
    made = [CallStatistics(1, 2) for _ in rows]
    for row, rounds in zip(made, rows, strict=True):
        row.add_prompt_pass()
        for counts in rounds:
            row.add_round(*counts)
    return CallRecord(made, torch.device("cpu"))


@pytest.mark.parametrize("together", [False, True])
def test_pos_acc_is_conditional_and_sums_over_texts(together):
    """Ratios are taken of sums, of rows as of calls: 1 of 1 and 0 of 3 are 1 of 4, not 1 of 2."""
    texts = [([1, 1], 2, 3)], [([1, 1], 0, 1)] * 3
    stats = GenerationStatistics([record_of(*texts)] if together else [record_of(text) for text in texts])
    assert len(stats.calls) == 2
    assert stats.reached == [4, 1]
    assert stats.accepted == [1, 1]
    assert stats.pos_acc == [0.25, 1.0]
    assert stats.tau == 6 / 4
    assert stats.tau_macro == (3 + 1) / 2


def test_rows_of_a_batch_count_as_alone(target, shape):
    """Each row its rounds, tokens and authors; a finished one no more."""
    poss = drafter_for(target, shape)
    prompts = [PROMPT, PROMPT[:, 2:], PROMPT.flip(1)]
    kwargs = {
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": [1],
        "pad_token_id": PAD,
        "assistant_model": poss,
    }
    with collect_statistics() as alone:
        texts = [target.generate(**left_padded([prompt]), **kwargs)[0, prompt.shape[1] :] for prompt in prompts]
    with collect_statistics() as stats:
        target.generate(**left_padded(prompts), **kwargs)
    assert len(stats.records) == 1 and len(alone.records) == 3
    assert len({len(text) for text in texts}) > 1, "rows were to end at different times"
    for row, single, text in zip(stats.calls, alone.calls, texts, strict=True):
        assert (row.rounds, row.tokens) == (single.rounds, single.tokens)
        assert len(row.authors) == len(text)
    assert stats.rounds == alone.rounds and stats.tau_macro == pytest.approx(alone.tau_macro)


def test_tokens_that_are_taken_back_have_no_author(target, shape, scripted):
    """A row ran ahead when a criterion over the batch ended it; the other's drafts are all wrong, so it came late."""
    prompts = left_padded([PROMPT, PROMPT.flip(1)])
    texts = target.generate(**prompts, max_new_tokens=20, do_sample=False).tolist()
    scripted(texts[0], with_slips(texts[1], 1))
    with collect_statistics() as stats:
        written = target.generate(
            **prompts,
            assistant_model=drafter_for(target, shape, depth=4),
            max_new_tokens=20,
            do_sample=False,
            stopping_criteria=[lambda tokens, scores: tokens.shape[1] == 10],
        )
    assert written.tolist() == [text[:10] for text in texts]
    assert [call.authors for call in stats.calls] == [[0, 1, 2], [0, 0, 0]]


def test_drafters_of_different_make_in_one_block(target, known_text, monkeypatch):
    draft_known_text(monkeypatch, known_text)
    with collect_statistics() as stats:
        write(target, drafter_for(target, "chain", positions_per_specialist=2, num_draft_positions=2), 7)
        write(target, drafter_for(target, "chain", positions_per_specialist=1, num_draft_positions=3), 9)
    assert stats.accepted == [4, 4, 2]
    assert stats.accepted_by_specialist == [4 + 2, 2, 2]


def test_nothing_counted_is_zero(target, poss):
    with collect_statistics() as stats:
        pass
    assert (stats.rounds, stats.tokens, stats.tau, stats.tau_macro, stats.pos_acc) == (0, 0, 0.0, 0.0, [])
    assert (stats.drafting_seconds, stats.verifying_seconds, stats.other_seconds) == (0, 0, 0)


def test_a_call_without_a_round_does_not_enter_the_averages(target, shape, known_text, monkeypatch):
    draft_known_text(monkeypatch, known_text)
    poss = drafter_for(target, shape)
    with collect_statistics() as stats:
        write(target, poss, 1)
        assert (stats.rounds, stats.tau) == (0, 0.0)
        write(target, poss, 6)
    assert stats.tau == stats.tau_macro == 5.0
    assert len(stats.calls[0].authors) == 1


# ---- What is inside a block ----


def test_nested_blocks_each_see_the_calls_inside(target, shape):
    poss = drafter_for(target, shape)
    with collect_statistics() as outer:
        write(target, poss, 5)
        with collect_statistics() as inner:
            write(target, poss, 9)
        write(target, poss, 3)
    assert [len(call.authors) for call in outer.calls] == [5, 9, 3]
    assert [len(call.authors) for call in inner.calls] == [9]


def test_nothing_is_recorded_outside(target, shape, monkeypatch):
    poss = drafter_for(target, shape)
    with collect_statistics() as stats:
        write(target, poss, 5)
    before = (stats.rounds, stats.tokens, len(stats.records))

    def forbidden(*args, **kwargs):
        raise AssertionError("a record was made outside of any block")

    monkeypatch.setattr("hf_poss.statistics.CallStatistics", forbidden)
    write(target, poss, 5)
    assert (stats.rounds, stats.tokens, len(stats.records)) == before


def test_other_ways_to_generate_are_not_counted(target):
    with collect_statistics() as stats:
        target.generate(PROMPT, max_new_tokens=4, do_sample=False)
        target.generate(PROMPT, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
        write(target, target, 4)
    assert stats.calls == []


def test_another_thread_is_not_counted(target, shape):
    poss = drafter_for(target, shape)
    seen = {}

    def work():
        write(target, poss, 5)
        with collect_statistics() as own:
            write(target, poss, 7)
        seen["own"] = [len(call.authors) for call in own.calls]

    with collect_statistics() as stats:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen["own"] == [7]
    assert stats.calls == []


def test_a_call_that_fails_leaves_no_trace_on_the_next(target, shape, monkeypatch):
    poss = drafter_for(target, shape)
    with collect_statistics() as alone:
        write(target, poss, 9)

    def fail(self, *args):
        raise RuntimeError("out of luck")

    with collect_statistics() as stats:
        with monkeypatch.context() as patch:
            patch.setattr(PosSCandidateGenerator, "draft", fail)
            with pytest.raises(RuntimeError, match="out of luck"):
                write(target, poss, 9)
        write(target, poss, 9)
    assert stats.calls[-1].authors == alone.calls[0].authors


def test_a_block_that_fails_is_closed(target, shape):
    with pytest.raises(RuntimeError), collect_statistics() as stats:
        raise RuntimeError
    write(target, drafter_for(target, shape), 3)
    assert stats.calls == []


# ---- Time ----


def test_passes_are_timed_one_by_one(target, shape, monkeypatch):
    """A nap in the passes of one draft position shows there; another part's elsewhere."""
    poss = drafter_for(target, shape, positions_per_specialist=1, num_draft_positions=4)
    expand, naps = DraftPasses.expand, []

    def slow(self, specialist, *args, **kwargs):
        if specialist == 2:  # it serves the third position alone
            naps.append(0.03)
            time.sleep(naps[-1])
        return expand(self, specialist, *args, **kwargs)

    monkeypatch.setattr(DraftPasses, "expand", slow)
    with collect_statistics() as stats:
        write(target, poss, 12)
    assert len(stats.pass_seconds) == 4 and len(naps) > 1
    assert stats.pass_seconds[2] == max(stats.pass_seconds) >= sum(naps)
    assert sum(stats.pass_seconds) == pytest.approx(stats.seconds["passes"])


def test_every_part_of_a_call_takes_time(target, shape):
    """They add up to its three sums, over calls too; a batch's round is one."""
    prompts, calls = left_padded([PROMPT, PROMPT[:, 2:]]), []
    with collect_statistics() as stats:
        for _ in range(2):
            with collect_statistics() as one:
                target.generate(**prompts, assistant_model=drafter_for(target, shape), max_new_tokens=9)
            calls.append(one)
    parts = {"prompt", "context", "passes", "tree", "verification", "walk", "cache", "other"}
    assert set(stats.seconds) == parts and min(stats.seconds.values()) > 0.0
    for part in parts:
        assert stats.seconds[part] == pytest.approx(sum(call.seconds[part] for call in calls))
    seconds = stats.seconds
    assert stats.drafting_seconds == pytest.approx(seconds["context"] + seconds["passes"] + seconds["tree"])
    assert stats.verifying_seconds == pytest.approx(seconds["prompt"] + seconds["verification"])
    assert stats.other_seconds == pytest.approx(seconds["walk"] + seconds["cache"] + seconds["other"])
    for record in stats.records:
        assert record.rounds == max(row.rounds for row in record.rows) < sum(row.rounds for row in record.rows)
    assert stats.passes == sum(record.rounds for record in stats.records)


def test_counts_alone_cost_no_time(target, shape, monkeypatch):
    """The same counts and no times, unless a block around it is timed."""
    poss = drafter_for(target, shape)
    with collect_statistics() as timed:
        write(target, poss, 9)
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "synchronize", lambda *_: pytest.fail("waits for the device"))
        with collect_statistics(timed=False) as counts:
            write(target, poss, 9)
    assert counts.calls == timed.calls and counts.passes == timed.passes
    assert set(counts.seconds.values()) == {0.0} and counts.pass_seconds == []

    with collect_statistics(), collect_statistics(timed=False) as inner:
        write(target, poss, 9)
    assert min(inner.seconds.values()) > 0.0


@pytest.mark.parametrize("slow", ["drafting", "verifying"])
def test_time_is_booked_where_it_is_spent(target, shape, slow, monkeypatch):
    """A nap in the drafter or in the target shows in that part, and all parts together are within the call's time."""
    poss = drafter_for(target, shape)
    nap, naps = 0.02, []

    def sleep():
        naps.append(nap)
        time.sleep(nap)

    if slow == "drafting":
        draft = PosSCandidateGenerator.draft
        monkeypatch.setattr(PosSCandidateGenerator, "draft", lambda *args: (sleep(), draft(*args))[1])
        hook = None
    else:
        hook = target.model.register_forward_pre_hook(lambda *_: sleep())
    try:
        start = time.perf_counter()
        with collect_statistics() as stats:
            write(target, poss, 6)
        wall = time.perf_counter() - start
    finally:
        if hook is not None:
            hook.remove()
    parts = {
        "drafting": stats.drafting_seconds,
        "verifying": stats.verifying_seconds,
        "other": stats.other_seconds,
    }
    assert min(parts.values()) >= 0.0 and sum(parts.values()) <= wall
    assert parts[slow] >= sum(naps) > 0.0
    assert all(parts[part] < parts[slow] for part in parts if part != slow)
