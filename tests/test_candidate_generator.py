"""Drafting: which specialist runs where, what context costs, and that it computes what training computes."""

import copy
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    SHAPES,
    drafter_for,
    left_padded,
    make_poss,
    make_prompt,
    make_target,
    small_target,
    with_slips,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_poss import PosSCandidateGenerator, PosSModel, candidate_generator, collect_statistics
from hf_poss.candidate_generator import DraftSettings, prompt_entries
from hf_poss.compatibility import CACHE
from hf_poss.draft_passes import DraftPasses
from hf_poss.modeling_poss import PosSSpecialist


CONTEXT_LENGTHS = [1, 5, 300]


def make_drafter(poss, target, prompt, **kwargs) -> PosSCandidateGenerator:
    model_kwargs = kwargs.pop("model_kwargs", {})
    config = GenerationConfig(**{"max_length": 1000, **kwargs})
    return PosSCandidateGenerator(prompt, poss, config, model_kwargs, target)


def random_tokens(length: int, seed: int = 0, vocab: int = 97) -> torch.LongTensor:
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def features_of(target, input_ids) -> torch.Tensor:
    """The target's last hidden states [1, tokens, hidden]."""
    return target.base_model(input_ids).last_hidden_state


@torch.no_grad()
def drafter_of(poss, target, input_ids, **kwargs) -> PosSCandidateGenerator:
    """A drafter whose context is all tokens but the last, the root."""
    drafter = make_drafter(poss, target, input_ids[:, :-1], **kwargs)
    drafter.extend_context(features_of(target, input_ids[:, :-1]), input_ids[:, 1:])
    return drafter


def drafter_after_prompt(poss, target, length, **kwargs) -> tuple[PosSCandidateGenerator, torch.LongTensor]:
    """A drafter whose context is `length` tokens, and all tokens, the root behind them."""
    input_ids = random_tokens(length + 1)
    return drafter_of(poss, target, input_ids, **kwargs), input_ids


# ---- Routing ----


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("n", "num_positions", "depth"),
    [(2, 4, 4), (2, 4, 7), (1, 3, 5), (3, 7, 9), (6, 6, 6), (2, 5, 3), (4, 2, 5)],
)
def test_each_position_runs_its_specialist_once(llama, n, num_positions, depth, top_k, monkeypatch):
    poss = make_poss(llama, positions_per_specialist=n, num_draft_positions=num_positions)
    drafter, input_ids = drafter_after_prompt(poss, llama, 5)
    ran = []
    queries, complete = PosSSpecialist.queries, PosSSpecialist.complete

    def spy_queries(self, *args):
        ran.append(("queries", list(poss.layers).index(self)))
        return queries(self, *args)

    def spy_complete(self, *args):
        ran.append(("complete", list(poss.layers).index(self)))
        return complete(self, *args)

    monkeypatch.setattr(PosSSpecialist, "queries", spy_queries)
    monkeypatch.setattr(PosSSpecialist, "complete", spy_complete)
    with torch.no_grad():
        drafter.draft(input_ids[:, -1], DraftSettings(depth, top_k, 20))

    specialists = -(-num_positions // n)
    expected = [min((k - 1) // n, specialists - 1) for k in range(1, depth + 1)]
    assert [index for name, index in ran if name == "queries"] == expected
    assert [index for name, index in ran if name == "complete"] == expected


# ---- Cost ----


class RowCounter(TorchFunctionMode):
    """Counts, inside its block, the rows that pass each matrix and norm of a drafter.

    Matrices that stand one above the other in a product count each for itself.
    """

    def __init__(self, poss: PosSModel, target: PreTrainedModel):
        super().__init__()
        self.matrices = {name: m.weight for name, m in poss.named_modules() if isinstance(m, nn.Linear)}
        self.others = {id(parameter) for parameter in target.parameters()}
        self.rows: Counter[str] = Counter()
        self.products = 0
        for name, module in poss.named_modules():
            if name.endswith("layernorm"):
                module.register_forward_hook(self._count(name))

    def _count(self, name):
        def hook(module, args, output):
            self.rows[name] += args[0].shape[:-1].numel()

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and id(args[1]) not in self.others:
            self.products += 1
            self.rows.update(dict.fromkeys(self._names(args[1]), args[0].shape[:-1].numel()))
        return func(*args, **(kwargs or {}))

    def _names(self, weight: torch.Tensor) -> list[str]:
        names, start = [], 0
        while start < len(weight):
            names += [
                name
                for name, matrix in self.matrices.items()
                if torch.equal(weight[start : start + len(matrix)], matrix)
            ]
            assert names, "a product with a matrix that is not the drafter's"
            start += len(self.matrices[names[-1]])
        return names

    def take(self) -> tuple[dict[str, int], int]:
        """Rows and products since the last time."""
        taken, self.rows, self.products = (dict(self.rows), self.products), Counter(), 0
        return taken


@pytest.mark.parametrize("length", CONTEXT_LENGTHS)
def test_context_costs_fc_keys_and_values_only(llama, poss, length):
    """In two products, whatever the number of specialists."""
    with RowCounter(poss, llama) as counter:
        drafter, input_ids = drafter_after_prompt(poss, llama, length)

        def context_rows(rows):
            of_layers = {f"layers.{i}.self_attn.{p}_proj": rows for i in range(len(poss.layers)) for p in "kv"}
            return {"fc": rows, **of_layers}

        assert counter.take() == (context_rows(length), 2)

        with torch.no_grad():
            drafter.draft(input_ids[:, -1], DraftSettings(4, 3, 10))
            counter.take()
            accepted = torch.cat((input_ids, random_tokens(3, seed=1)), dim=1)
            drafter.extend_context(features_of(llama, accepted[:, :-1])[:, -3:], accepted[:, -3:])
        assert counter.take() == (context_rows(3), 2)


@pytest.mark.parametrize("length", CONTEXT_LENGTHS)
@pytest.mark.parametrize(("top_k", "depth"), [(1, 4), (1, 7), (3, 4), (3, 6), (4, 1), (3, 2)])
def test_drafting_costs_its_frontiers_whatever_the_context(llama, poss, length, top_k, depth):
    """The full layer for the frontier of each position; keys and values once for a level and specialist that sees it.

    Every row of a level goes through `fc` once; the last level is not expanded and costs nothing.
    """
    drafter, input_ids = drafter_after_prompt(poss, llama, length)
    with torch.no_grad(), RowCounter(poss, llama) as counter:
        drafter.draft(input_ids[:, -1], DraftSettings(depth, top_k, 12))

    widths = [1] + [top_k] * (depth - 1)  # frontier of each position
    expected = {"fc": sum(widths[1:])}
    for index in range(2):
        served = [k for k in range(1, depth + 1) if min((k - 1) // 2, 1) == index]
        full = sum(widths[k - 1] for k in served)
        seen = sum(widths[1 : max(served)]) if served else 0
        for name in ("q_proj", "o_proj"):
            expected[f"layers.{index}.self_attn.{name}"] = full
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"):
            expected[f"layers.{index}.{name}"] = full
        for name in ("k_proj", "v_proj"):
            expected[f"layers.{index}.self_attn.{name}"] = seen
    assert counter.take()[0] == {name: rows for name, rows in expected.items() if rows}


# ---- Caches ----


def assert_same_caches(drafter, fresh, slot: int = 0):
    """A slot of a drafter holds what a fresh drafter of one row holds, in every specialist."""
    length = fresh.columns.lengths[0]
    assert drafter.columns.lengths[slot] == length
    torch.testing.assert_close(drafter.query[slot : slot + 1], fresh.query, rtol=1e-4, atol=1e-4)
    held = drafter.buffer.view(len(drafter.columns.lengths), length)
    for states, fresh_states in zip(held, fresh.buffer.view(1, length), strict=True):
        assert states.shape[1] == fresh.assistant_model.config.num_specialists
        torch.testing.assert_close(states[slot : slot + 1], fresh_states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 254])
def test_caches_after_rounds_are_those_of_a_fresh_prefill(llama, poss, length, top_k):
    drafter, input_ids = drafter_after_prompt(poss, llama, length)
    settings = DraftSettings(4, top_k, 10)
    for accepted in (1, 4, 2, 5, 1):
        with torch.no_grad():
            first = drafter.draft(input_ids[:, -1], settings)
            again = drafter.draft(input_ids[:, -1], settings)
            assert torch.equal(first.tokens, again.tokens), "a draft left nodes behind"
            input_ids = torch.cat((input_ids, random_tokens(accepted, seed=accepted)), dim=1)
            features = features_of(llama, input_ids[:, :-1])
            drafter.extend_context(features[:, -accepted:], input_ids[:, -accepted:])

            fresh = drafter_of(poss, llama, input_ids)
            assert_same_caches(drafter, fresh)
            assert torch.equal(
                drafter.draft(input_ids[:, -1], settings).tokens, fresh.draft(input_ids[:, -1], settings).tokens
            )


@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_of_any_length_draft_what_they_draft_alone(llama, poss, top_k):
    """Rows that grow by different numbers, and one that finishes on the way."""
    poss = peaked(poss)
    settings = DraftSettings(4, top_k, 12)
    texts = [random_tokens(length, seed=length) for length in (7, 2, 12, 5)]
    drafter = make_drafter(poss, llama, torch.zeros(4, 12, dtype=torch.long))
    counts, rows = [text.shape[1] - 1 for text in texts], [0, 1, 2, 3]
    for number, growth in enumerate(([1, 3, 5, 2], [4, 1, 1, 2], [2, 2, 2, 2])):
        most = max(counts)
        features = torch.zeros(len(rows), most, llama.config.hidden_size)
        following = torch.zeros(len(rows), most, dtype=torch.long)
        for slot, row in enumerate(rows):
            features[slot, : counts[slot]] = features_of(llama, texts[row][:, :-1])[0, -counts[slot] :]
            following[slot, : counts[slot]] = texts[row][0, -counts[slot] :]
        with torch.no_grad():
            drafter.extend_context(features, following, counts if min(counts) < most else None)
            tree = drafter.draft(torch.cat([texts[row][:, -1] for row in rows]), settings)
        for slot, row in enumerate(rows):
            alone = drafter_of(poss, llama, texts[row])
            assert_same_caches(drafter, alone, slot)
            with torch.no_grad():
                expected = alone.draft(texts[row][:, -1], settings)
            for mine, theirs in zip(
                (tree.tokens, tree.parents, tree.depths),
                (expected.tokens, expected.parents, expected.depths),
                strict=True,
            ):
                assert mine[slot].tolist() == theirs[0].tolist()
        if number == 0:
            drafter.retire(1)
            rows = drafter.columns.rows[:3]
            assert sorted(rows) == [0, 2, 3]
        counts = [growth[row] for row in rows]
        for row in rows:
            texts[row] = torch.cat((texts[row], random_tokens(growth[row], seed=50 * number + row)), dim=1)


@pytest.mark.parametrize("before", ["nothing", "plain_turn", "poss_turn"])
@pytest.mark.parametrize("lengths", [[9], [9, 4, 12]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_caches_inside_generate_are_those_of_a_fresh_prefill(shape, lengths, before, scripted, monkeypatch):
    """After every round of real calls, whatever was accepted, in each row; in a second turn too, that goes on
    from the cache of one with or without specialists."""
    target = small_target()
    poss = drafter_for(target, shape)
    inputs = left_padded([make_prompt(length, seed=length) for length in lengths])

    def write(number, inputs, **kwargs):
        text = target.generate(**inputs, max_new_tokens=number, do_sample=False, **kwargs)
        mask = inputs["attention_mask"]
        return {"input_ids": text, "attention_mask": torch.cat((mask, mask.new_ones(len(lengths), number)), dim=1)}

    def said(inputs):
        return {name: torch.cat((value, value[:, -3:]), dim=1) for name, value in inputs.items()}

    def texts_of(inputs):
        return [
            row[row_mask.argmax() :]
            for row, row_mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]

    plain = write(30, inputs if before == "nothing" else said(write(6, inputs)))
    scripted(*(with_slips(text.tolist(), 4 + 3 * row) for row, text in enumerate(texts_of(plain))))

    kwargs = {CACHE: DynamicCache(config=target.config)}
    if before != "nothing":
        inputs = said(write(6, inputs, assistant_model=poss if before == "poss_turn" else None, **kwargs))
    snapshots = []
    extend_context = PosSCandidateGenerator.extend_context

    def spy(self, *args):
        extend_context(self, *args)
        snapshots.append((self.assistant_model, *copy.deepcopy((self.buffer, self.columns, self.query))))

    with monkeypatch.context() as patch:
        patch.setattr(PosSCandidateGenerator, "extend_context", spy)
        texts = texts_of(write(30, inputs, assistant_model=poss, **kwargs))

    places = {row: [] for row in range(len(lengths))}
    for model, buffer, columns, query in snapshots:
        seen = SimpleNamespace(assistant_model=model, buffer=buffer, columns=columns, query=query)
        for slot, row in enumerate(columns.rows[: columns.active]):
            places[row].append(columns.lengths[slot])
            assert_same_caches(seen, drafter_of(poss, target, texts[row][None, : places[row][-1] + 1]), slot)
    for of_row in places.values():
        assert len({after - before for before, after in itertools.pairwise(of_row)}) > 1, "all rounds were alike"


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("counts", [[11], [11, 3, 8], [4, 11, 1], None], ids=str)
def test_context_in_chunks_is_context_at_once(llama, poss, counts, chunk, monkeypatch):
    """Prompts of any lengths side by side, some of which end chunks before others; and more context behind them."""
    poss = peaked(poss)
    rows = 2 if counts is None else len(counts)
    texts = torch.cat([random_tokens(12, seed=row) for row in range(rows)])
    more = torch.cat([random_tokens(4, seed=9 + row) for row in range(rows)])
    features = [features_of(llama, tokens) for tokens in (texts[:, :-1], more)]
    settings, drafters, trees = DraftSettings(4, 3, 12), [], []
    for size in (1000, chunk):
        monkeypatch.setattr(candidate_generator, "CHUNK", size)
        drafters.append(make_drafter(poss, llama, torch.zeros(rows, 11, dtype=torch.long)))
        with torch.no_grad(), RowCounter(poss, llama) as counter:
            drafters[-1].extend_context(features[0], texts[:, 1:], counts)
        taken, products = counter.take()
        assert products == 2 * -(-11 // size) and set(taken.values()) == {11 * rows}
        with torch.no_grad():
            trees.append(drafters[-1].draft(texts[:, -1], settings))
            drafters[-1].extend_context(features[1], more, [2, 4, 1][:rows])
            trees.append(drafters[-1].draft(more[:, -1], settings))
    whole, chunked = drafters
    expected = [11] * rows if counts is None else counts
    assert chunked.columns.lengths == whole.columns.lengths
    assert whole.columns.lengths == [old + new for old, new in zip(expected, [2, 4, 1], strict=False)]
    torch.testing.assert_close(chunked.query, whole.query, rtol=1e-4, atol=1e-4)
    for row, length in enumerate(whole.columns.lengths):
        for mine, theirs in zip(chunked.buffer.view(rows, length), whole.buffer.view(rows, length), strict=True):
            torch.testing.assert_close(mine[row], theirs[row], rtol=1e-4, atol=1e-4)
    for one, other in zip(trees[:2], trees[2:], strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)


@torch.no_grad()
def test_weights_that_change_between_calls_are_those_that_draft(llama):
    """What a call keeps of them does not outlive it."""
    poss, changed = (make_poss(llama, seed=seed, positions_per_specialist=2, num_draft_positions=4) for seed in (0, 1))
    input_ids = random_tokens(12)

    def write(drafter):
        with collect_statistics() as stats:
            llama.generate(input_ids, assistant_model=drafter, max_new_tokens=16, do_sample=False)
        tree = drafter_of(drafter, llama, input_ids).draft(input_ids[:, -1], DraftSettings(4, 3, 12))
        return stats.calls[0].authors, tree.tokens.tolist(), tree.scores.tolist()

    before, expected = write(poss), write(changed)
    poss.load_state_dict(changed.state_dict())
    assert before[1:] != expected[1:]
    assert write(poss) == expected


# ---- Drafting and training compute the same ----


class Spy:
    """Keeps the features that a draft predicts, and what it makes of its frontiers, level by level."""

    def __init__(self, monkeypatch):
        self.features, self.children = [], []
        complete, expand = PosSSpecialist.complete, DraftPasses.expand

        def spy_complete(specialist, *args):
            self.features.append(complete(specialist, *args))
            return self.features[-1]

        def spy_expand(passes, *args, **kwargs):
            made = expand(passes, *args, **kwargs)
            self.children.append(made[0])
            return made

        monkeypatch.setattr(PosSSpecialist, "complete", spy_complete)
        monkeypatch.setattr(DraftPasses, "expand", spy_expand)


def peaked(poss: PosSModel) -> PosSModel:
    """Widens random weights until attention tells keys apart; fresh ones look at all alike, at whatever position."""
    with torch.no_grad():
        for name, parameter in poss.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(40.0)
            elif parameter.dim() > 1:
                parameter.mul_(5.0)
    return poss


@torch.no_grad()
def teacher_forced(poss, features, input_ids, drafted: list[int]) -> torch.Tensor:
    """What training's roll-out predicts for a chain [positions, hidden] whose root is the last of `input_ids`.

    The target's features of drafted tokens are unknown to a draft, so they are noise here: no row may read them.
    """
    positions = len(drafted) + 1
    anchor = input_ids.shape[1] - 2
    tokens = torch.cat((input_ids, input_ids.new_tensor([drafted])), dim=1)
    noise = torch.randn(1, positions, features.shape[-1], generator=torch.Generator().manual_seed(0))
    predictions = poss(tokens, torch.cat((features, noise), dim=1)).predictions
    return torch.stack([predictions[k][0, anchor + k] for k in range(positions)])


@pytest.mark.parametrize("length", CONTEXT_LENGTHS)
@pytest.mark.parametrize(("n", "num_positions"), [(1, 3), (2, 5), (4, 4)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_drafted_chain_is_a_row_of_the_training_roll_out(family, n, num_positions, length, monkeypatch):
    """Position k of a chain that starts at row a is what `forward` predicts for position k at row a + k - 1."""
    target = make_target(family)
    poss = peaked(make_poss(target, positions_per_specialist=n, num_draft_positions=num_positions))
    drafter, input_ids = drafter_after_prompt(poss, target, length)
    spy = Spy(monkeypatch)
    with torch.no_grad():
        tree = drafter.draft(input_ids[:, -1], DraftSettings(num_positions, 1, num_positions + 1))
    drafted = tree.tokens[0, 1:].tolist()
    features = torch.cat(spy.features, dim=1)[0]
    monkeypatch.undo()

    expected = teacher_forced(poss, features_of(target, input_ids[:, :-1]), input_ids, drafted[:-1])

    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert drafted == target.get_output_embeddings()(expected).argmax(-1).tolist()


def test_every_branch_of_a_tree_is_a_row_of_the_training_roll_out(monkeypatch):
    target = make_target("llama", scale=1.0)  # flat distributions, so that trees are bushy
    poss = peaked(make_poss(target, positions_per_specialist=2, num_draft_positions=4))
    spy = Spy(monkeypatch)
    drafter, input_ids = drafter_after_prompt(poss, target, 20)
    with torch.no_grad():
        drafter.draft(input_ids[:, -1], DraftSettings(4, 3, 20))
    levels, children = list(spy.features), list(spy.children)
    monkeypatch.undo()

    context = features_of(target, input_ids[:, :-1])
    paths = [[]]
    for level, (features, found) in enumerate(zip(levels, children, strict=True), start=1):
        assert features.shape[1] == len(paths)
        for row, path in enumerate(paths):
            expected = teacher_forced(poss, context, input_ids, path)[-1]
            torch.testing.assert_close(features[0, row], expected, rtol=1e-4, atol=1e-4)
        if level == len(levels):
            break
        below = [
            [*path, token] for path, row in zip(paths, found.tokens.view(-1, 3).tolist(), strict=True) for token in row
        ]
        paths = [below[child] for child in found.chosen[0].tolist()]
        assert all(len(path) == level for path in paths)
    assert len({tuple(path[:-1]) for path in paths}) > 1, "no branches compared"


def test_deeper_than_trained_the_last_specialist_goes_on(llama, monkeypatch):
    """With one specialist that is the roll-out of the same weights over more positions."""
    poss = peaked(make_poss(llama, positions_per_specialist=2, num_draft_positions=2))
    longer = make_poss(llama, positions_per_specialist=5, num_draft_positions=5)
    longer.load_state_dict(poss.state_dict())
    drafter, input_ids = drafter_after_prompt(poss, llama, 12)
    spy = Spy(monkeypatch)
    with torch.no_grad():
        tree = drafter.draft(input_ids[:, -1], DraftSettings(5, 1, 6))
    features = torch.cat(spy.features, dim=1)[0]
    monkeypatch.undo()
    expected = teacher_forced(longer, features_of(llama, input_ids[:, :-1]), input_ids, tree.tokens[0, 1:-1].tolist())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


# ---- Tokens that count ----


def test_entries_of_prompts():
    """Padding is left out, the last token never."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]])
    features = torch.zeros(3, 4, 2)
    assert [list(row) for row in prompt_entries(mask, features)] == [[2, 3], [0, 1, 2, 3], [0, 2, 3]]
    assert [list(row) for row in prompt_entries(mask, features[:, :2])] == [[0, 1], [0, 1], [0, 1]]
    assert [list(row) for row in prompt_entries(None, features)] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_the_mask_of_a_prompt_is_not_changed(dtype):
    mask = torch.tensor([[1, 1, 0]], dtype=dtype)
    prompt_entries(mask, torch.zeros(1, 3, 2))
    assert mask.tolist() == [[1, 1, 0]]


# ---- Candidates for transformers' own loop ----


def outputs_for(target, input_ids):
    return SimpleNamespace(hidden_states=(features_of(target, input_ids),))


def test_nothing_is_drafted_before_the_target_has_seen_the_prompt(llama, poss):
    prompt = random_tokens(6)
    candidates, logits = make_drafter(poss, llama, prompt).get_candidates(prompt, is_first_iteration=True)
    assert torch.equal(candidates, prompt) and logits is None


@pytest.mark.parametrize(("max_length", "drafted"), [(100, 4), (11, 4), (10, 3), (8, 1), (7, 0)])
def test_drafts_leave_room_for_the_targets_own_token(llama, poss, max_length, drafted):
    tokens = random_tokens(6)
    drafter = make_drafter(poss, llama, tokens[:, :5], max_length=max_length)
    candidates, logits = drafter.get_candidates(
        tokens, model_outputs=outputs_for(llama, tokens[:, :5]), is_first_iteration=False
    )
    assert logits is None
    assert torch.equal(candidates[:, :6], tokens)
    assert candidates.shape[1] - 6 == drafted


def test_a_chain_ends_with_the_end_of_sequence(llama, poss):
    tokens = random_tokens(6)
    outputs = outputs_for(llama, tokens[:, :5])

    def drafted(**kwargs):
        drafter = make_drafter(poss, llama, tokens[:, :5], **kwargs)
        candidates, _ = drafter.get_candidates(tokens, model_outputs=outputs, is_first_iteration=False)
        return candidates[0, 6:].tolist()

    whole = drafted()
    for eos in set(whole):
        assert drafted(eos_token_id=[eos, 0]) == whole[: whole.index(eos) + 1]


def test_rejected_tokens_do_not_enter_the_context(llama, poss):
    """The pass saw five tokens, of which the root and two drafted ones were right."""
    tokens = random_tokens(6)
    drafter = make_drafter(poss, llama, tokens[:, :5])
    candidates, _ = drafter.get_candidates(
        tokens, model_outputs=outputs_for(llama, tokens[:, :5]), is_first_iteration=False
    )
    seen = outputs_for(llama, candidates).hidden_states[0][:, 5:]
    assert seen.shape[1] == 5
    accepted = torch.cat((candidates[:, :8], random_tokens(1, seed=3)), dim=1)
    drafter.get_candidates(
        accepted,
        model_outputs=SimpleNamespace(hidden_states=(seen,)),
        is_first_iteration=False,
        n_last_matches=torch.tensor(2),
    )
    assert_same_caches(drafter, drafter_of(poss, llama, accepted))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_features_that_are_not_finite_are_refused(llama, poss, bad):
    tokens = random_tokens(6)
    features = features_of(llama, tokens[:, :5])
    features[0, 2, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_drafter(poss, llama, tokens[:, :5]).extend_context(features, tokens[:, 1:])


def test_features_in_the_targets_dtype_are_taken(llama, poss):
    """A bfloat16 target may have a float32 drafter and the other way round."""
    tokens = random_tokens(6)
    features = features_of(llama, tokens[:, :5])
    trees = []
    for drafter_dtype, feature_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        drafter = make_drafter(copy.deepcopy(poss).to(drafter_dtype), llama, tokens[:, :5])
        with torch.no_grad():
            drafter.extend_context(features.to(feature_dtype), tokens[:, 1:])
            trees.append(drafter.draft(tokens[:, -1], DraftSettings(3, 3, 10)))
        assert drafter.query.dtype == drafter_dtype
    assert [tree.tokens.shape for tree in trees] == [(1, 10), (1, 10)]


# ---- Settings ----


def test_default_settings(llama):
    poss = make_poss(llama, positions_per_specialist=2, num_draft_positions=5)
    assert DraftSettings.of(poss, "cuda") == DraftSettings(depth=5, top_k=10, total_tokens=60)
    on_cpu = DraftSettings.of(poss, torch.device("cpu"))
    assert on_cpu.depth == 5
    assert 1 < on_cpu.top_k <= 10 and on_cpu.top_k < on_cpu.total_tokens < 60


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_are_those_of_the_generation_config(poss, device):
    knobs = poss.generation_config
    knobs.num_assistant_tokens, knobs.draft_top_k, knobs.draft_total_tokens = 9, 3, 17
    assert DraftSettings.of(poss, device) == DraftSettings(9, 3, 17)


def test_settings_are_saved_and_loaded(poss, tmp_path):
    knobs = poss.generation_config
    knobs.num_assistant_tokens, knobs.draft_top_k, knobs.draft_total_tokens = 9, 3, 17
    poss.save_pretrained(tmp_path)
    assert DraftSettings.of(PosSModel.from_pretrained(tmp_path), "cpu") == DraftSettings(9, 3, 17)


def test_one_branch_is_a_chain(poss):
    poss.generation_config.draft_top_k = 1
    assert DraftSettings.of(poss, "cpu").is_chain
    poss.generation_config.draft_top_k = 2
    assert not DraftSettings.of(poss, "cpu").is_chain


@pytest.mark.parametrize(
    ("knob", "least", "bad"),
    [
        ("num_assistant_tokens", 1, [0, -1, 2.0, "3", True]),
        ("draft_top_k", 1, [0, -4, 1.5, False]),
        ("draft_total_tokens", 2, [1, 0, 60.0, [60]]),
    ],
)
def test_settings_out_of_range_are_refused(poss, knob, least, bad):
    setattr(poss.generation_config, knob, least)
    DraftSettings.of(poss, "cpu")
    for value in bad:
        setattr(poss.generation_config, knob, value)
        with pytest.raises(ValueError, match=rf"{knob}.*integer of {least} or more"):
            DraftSettings.of(poss, "cpu")


def test_a_chain_has_a_node_a_position_and_a_tree_what_it_is_given():
    chain, tree = DraftSettings(depth=6, top_k=1, total_tokens=2), DraftSettings(depth=6, top_k=4, total_tokens=9)
    assert chain.up_to(4) == DraftSettings(depth=4, top_k=1, total_tokens=5)
    assert chain.up_to(8) == DraftSettings(depth=6, top_k=1, total_tokens=7)
    assert tree.up_to(4) == DraftSettings(depth=4, top_k=4, total_tokens=9)
