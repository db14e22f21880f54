"""Keys and values of rows that grow at their own pace, and a target's cache that keeps one path of a tree a row."""

import random

import pytest
import torch
from conftest import make_target, small_target
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from hf_poss.caches import BufferGroup, Columns, KeyValueBuffer, TargetCache, move_entries


def states(
    count: int, seed: int, rows: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, count, 4, generator=generator).to(dtype) for _ in range(2))


def concatenated(*parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))


def assert_equal(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# ---- Columns ----


def moved(buffer: list[list[str]], moves: list[tuple[int, int, int]]) -> list[list[str]]:
    """What `moves` says, done to named columns, all at once."""
    before = [list(row) for row in buffer]
    for slot, source, destination in moves:
        buffer[slot][destination] = before[slot][source]
    return buffer


def test_columns_of_rows_of_different_lengths():
    """The example of the docstring: rows of 5 and 7, three nodes, row 0 keeps nodes 0 and 2."""
    columns = Columns(2)
    columns.lengths = [5, 7]
    assert (columns.width, columns.ragged) == (7, True)
    assert columns.in_use(torch.device("cpu")).long().tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    moves = columns.keep([[0, 2], [0, 1, 2]])
    assert sorted(moves) == [(0, 7, 5), (0, 9, 6)]
    assert columns.lengths == [7, 10]


def test_rows_of_one_length_that_keep_all_move_nothing():
    columns = Columns(3)
    assert not columns.keep([range(4)] * 3)
    assert not columns.keep([[0, 1]] * 3)
    assert (columns.lengths, columns.ragged) == ([6, 6, 6], False)


@pytest.mark.parametrize("capacity", [None, 100])
def test_columns_follow_any_rounds(capacity):
    """Random paths and rows that finish, against lists of names: a row's entries are its own, in order, in front.
    In buffers of one size nodes lie behind all that context can take, whatever the rows hold."""
    generator = random.Random(0)
    for _ in range(20):
        rows = generator.randrange(1, 5)
        columns, buffer = Columns(rows, capacity), [[""] * 200 for _ in range(rows)]
        expected = {row: [] for row in range(rows)}
        for number in range(12):
            nodes = generator.randrange(1, 7)
            paths = []
            assert columns.start == (columns.width if capacity is None else capacity)
            for slot in range(columns.active):
                row = columns.rows[slot]
                names = [f"{row}/{number}/{node}" for node in range(nodes)]
                buffer[slot][columns.start : columns.start + nodes] = names
                paths.append(sorted({0, *generator.sample(range(nodes), generator.randrange(nodes + 1))}))
                expected[row] += [names[node] for node in paths[-1]]
            moved(buffer, columns.keep(paths))
            if columns.active > 1 and generator.random() < 0.2:
                slot, last = columns.retire(generator.randrange(columns.active))
                buffer[slot], buffer[last] = buffer[last], buffer[slot]
            for slot, row in enumerate(columns.rows):
                assert buffer[slot][: columns.lengths[slot]] == expected[row]
        assert sorted(columns.rows) == list(range(rows))


def test_a_retired_row_takes_part_in_nothing():
    columns = Columns(3)
    columns.lengths = [4, 9, 6]
    assert columns.retire(1) == (1, 2)
    assert (columns.active, columns.rows, columns.lengths) == (2, [0, 2, 1], [4, 6, 9])
    assert columns.width == 6
    assert columns.in_use(torch.device("cpu")).shape == (2, 6)
    columns.keep([[0], [0]])
    assert columns.lengths == [5, 7, 9]


def test_columns_of_one_size():
    """The example of the docstring, with room for 10 columns of context: both rows have empty columns in front of the
    nodes, and what is kept moves from behind the room in both."""
    columns = Columns(2, capacity=10)
    columns.lengths = [5, 7]
    assert (columns.width, columns.start, columns.ragged) == (7, 10, True)
    assert columns.in_use(torch.device("cpu")).long().tolist() == [[1] * 5 + [0] * 5, [1] * 7 + [0] * 3]
    assert sorted(columns.keep([[0, 2], [0, 1, 2]])) == [(0, 10, 5), (0, 12, 6), (1, 10, 7), (1, 11, 8), (1, 12, 9)]
    assert (columns.lengths, columns.start) == ([7, 10], 10)
    columns.lengths = [10, 10]
    assert not columns.ragged


# ---- The buffer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [5, 250, 1, 1], [256, 1], [255, 1, 1], [300, 700, 5], [3, 2000]])
def test_a_buffer_grows_and_keeps_what_it_holds(sizes, dtype):
    buffer, parts, end = KeyValueBuffer(), [], 0
    for seed, size in enumerate(sizes):
        parts.append(states(size, seed, 2, dtype))
        buffer.write(end, *parts[-1])
        end += size
        assert_equal(buffer.view(2, end), concatenated(*parts))


def test_growth_is_geometric_and_ends_at_the_limit():
    buffer, capacities = KeyValueBuffer(), set()
    for column in range(3000):
        buffer.write(column, *states(1, column))
        capacities.add(buffer.states[0].shape[-2])
    assert len(capacities) < 9
    bounded = KeyValueBuffer(limit=300)
    bounded.write(0, *states(290, 0))
    assert bounded.states[0].shape[-2] == 300
    bounded.write(290, *states(20, 1))  # what has to fit fits
    assert bounded.states[0].shape[-2] >= 310


def test_writing_and_reading_copy_nothing_else():
    buffer = KeyValueBuffer()
    buffer.write(0, *states(10, 0, 3))
    places = [tensor.data_ptr() for tensor in buffer.states]
    for column in range(10, 200, 5):
        buffer.write(column, *states(5, column, 3))
        move_entries(buffer.states, *torch.tensor([[1], [column + 3], [column]]))
        assert [tensor.data_ptr() for tensor in buffer.view(3, column)] == places


def test_a_pass_of_fewer_rows_leaves_the_others():
    buffer = KeyValueBuffer()
    first, more = states(4, 0, 3), states(2, 1, 1)
    buffer.write(0, *first)
    buffer.write(1, *more)
    for held, before, new in zip(buffer.view(3, 4), first, more, strict=True):
        assert torch.equal(held[1:], before[1:])
        assert torch.equal(held[:1, :, 1:3], new)


@pytest.mark.parametrize("rows", [1, 2])
def test_entries_that_move_do_not_overwrite_one_another(rows):
    """Columns 3, 4 and 5 of a row go to 2, 3 and 4."""
    buffer, before = KeyValueBuffer(), states(6, 0, rows)
    buffer.write(0, *before)
    move_entries(buffer.states, *torch.tensor([[rows - 1] * 3, [3, 4, 5], [2, 3, 4]]))
    for held, tensor in zip(buffer.view(rows, 6), before, strict=True):
        assert torch.equal(held[-1, :, 2:5], tensor[-1, :, 3:6])
        assert torch.equal(held[-1, :, [0, 1, 5]], tensor[-1, :, [0, 1, 5]])
        assert torch.equal(held[:-1], tensor[:-1])


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_entries_move_in_tensors_of_any_leading_shape(rows, leading):
    """Random moves of several rows, in each of the tensors, against entries moved one by one."""
    generator = random.Random(rows)
    tensors = [torch.randn(*leading, rows, 2, 20, width) for width in (4, 6)]
    columns = {slot: (generator.sample(range(10, 20), 4), generator.sample(range(20), 4)) for slot in range(rows)}
    moves = [(slot, *move) for slot, ways in columns.items() for move in zip(*ways, strict=True)]
    expected = [tensor.clone() for tensor in tensors]
    for tensor, before in zip(expected, tensors, strict=True):
        for slot, source, destination in moves:
            tensor[..., slot, :, destination, :] = before[..., slot, :, source, :]
    places = [tensor.data_ptr() for tensor in tensors]
    move_entries(tensors, *torch.tensor(moves).T)
    assert_equal(tensors, expected)
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_a_buffer_of_one_size_stays_where_it_is():
    buffer, parts = KeyValueBuffer(limit=300, fixed=True), [states(size, size) for size in (10, 250, 40)]
    buffer.write(0, *parts[0])
    assert [tensor.shape[-2] for tensor in buffer.states] == [300, 300]
    places, end = [tensor.data_ptr() for tensor in buffer.states], 10
    for part in parts[1:]:
        buffer.write(end, *part)
        end += part[0].shape[-2]
    assert_equal(buffer.view(1, 300), concatenated(*parts))
    assert [tensor.data_ptr() for tensor in buffer.states] == places


# ---- A buffer of several specialists ----


def of_specialists(count: int, seed: int, rows: int = 2, specialists: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, specialists, 2, count, 4, generator=generator) for _ in range(2))


def test_nodes_lie_behind_the_context_until_others_take_their_place():
    buffer = KeyValueBuffer()
    context, first, second, more = (of_specialists(size, size) for size in (5, 3, 4, 2))
    buffer.write(0, *context)
    buffer.write(5, *first)
    buffer.write(8, *second)
    assert_equal(buffer.view(2, 12), concatenated(context, first, second))
    buffer.write(5, *more)
    assert_equal(buffer.view(2, 7), concatenated(context, more))
    for held, kept in zip(buffer.view(1, 5), context, strict=True):
        assert torch.equal(held, kept[:1])


@pytest.mark.parametrize("context_length", [253, 254, 256])
def test_nodes_that_outgrow_the_buffer_leave_the_context_whole(context_length):
    buffer, parts, end = KeyValueBuffer(), [of_specialists(context_length, 0)], context_length
    buffer.write(0, *parts[0])
    for seed, size in ((1, 2), (2, 300)):
        parts.append(of_specialists(size, seed))
        buffer.reserve(end + size, *parts[-1])
        buffer.write(end, *parts[-1])
        end += size
        assert_equal(buffer.view(2, end), concatenated(*parts))


def test_rows_of_all_specialists_change_places():
    buffer, before = KeyValueBuffer(), of_specialists(6, 0, rows=3)
    buffer.write(0, *before)
    buffer.swap(0, 2, 5)
    for held, tensor in zip(buffer.view(3, 6), before, strict=True):
        assert torch.equal(held[[2, 1, 0], ..., :5, :], tensor[..., :5, :])
        assert torch.equal(held[..., 5:, :], tensor[..., 5:, :])


# ---- Buffers of several layers ----


def filled(sizes: list[tuple[int, int]], rows: int = 2, limit: int | None = None) -> list[KeyValueBuffer]:
    """A buffer for each size and seed."""
    buffers = []
    for size, seed in sizes:
        buffers.append(KeyValueBuffer(limit))
        buffers[-1].write(0, *states(size, seed, rows))
    return buffers


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("limit", [None, 320])
def test_buffers_that_are_brought_together_hold_what_they_held_and_grow_as_one(rows, limit):
    buffers = filled([(200, seed) for seed in range(3)], rows, limit)
    group = BufferGroup(buffers)
    parts = [[states(200, seed, rows)] for seed in range(3)]
    end = 200
    for round_number, size in enumerate((1, 60, 50)):  # the second of these does not fit
        for index, buffer in enumerate(buffers):
            parts[index].append(states(size, 10 * round_number + index, rows))
            buffer.write(end, *parts[index][-1])
        end += size
        for index, buffer in enumerate(buffers):
            assert_equal(buffer.view(rows, end), concatenated(*parts[index]))
            for held, together in zip(buffer.states, group.states, strict=True):
                assert held.data_ptr() == together[index].data_ptr(), "a buffer went its own way"
        assert limit is None or group.states[0].shape[-2] <= limit


def test_what_moves_in_a_group_moves_in_its_buffers():
    buffers = filled([(20, seed) for seed in range(3)])
    group = BufferGroup(buffers)
    moves = torch.tensor([[0, 0, 1], [15, 17, 19], [3, 4, 16]])
    expected = [tuple(held.clone() for held in buffer.states) for buffer in buffers]
    for held in expected:
        move_entries(held, *moves)
    move_entries(group.states, *moves)
    for buffer, held in zip(buffers, expected, strict=True):
        assert_equal(buffer.states, held)


# ---- A target's cache ----

TREE_TOKENS = [8, 20, 21, 22, 23, 24, 25]
#  0 -> 1, 2;  1 -> 3;  2 -> 4, 5;  4 -> 6
TREE_PARENTS = [0, 0, 0, 1, 2, 2, 4]
TREE_DEPTHS = [0, 1, 1, 2, 2, 2, 3]


def tree_mask(contexts: list[int], width: int) -> torch.Tensor:
    """Additive mask [rows, 1, nodes, width + nodes], node by node."""
    nodes = len(TREE_PARENTS)
    mask = torch.full((len(contexts), 1, nodes, width + nodes), torch.finfo(torch.float32).min)
    for row, length in enumerate(contexts):
        mask[row, ..., :length] = 0.0
        for node in range(nodes):
            ancestor = node
            while ancestor:
                mask[row, 0, node, width + ancestor] = 0.0
                ancestor = TREE_PARENTS[ancestor]
            mask[row, 0, node, width] = 0.0
    return mask


@pytest.mark.parametrize("paths", [[[0], [0, 1]], [[0, 2, 5], [0]], [[0, 2, 4, 6], [0, 1, 3]], [[0, 1], [0, 2]]])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_decoding_goes_on_as_after_a_prefill_of_the_paths(family, paths):
    """Trees of two rows are verified, a path of each kept, twice; the next logits are those of the texts alone."""
    target = make_target(family, scale=2.0)
    prompts = torch.tensor([[5, 9, 11, 30, 4], [6, 7, 40, 3, 2]])
    texts = prompts.tolist()
    cache = TargetCache(DynamicCache(config=target.config), rows=2)
    with cache.lend():
        target(prompts, past_key_values=cache.cache)
        cache.commit(5)
        for kept in (paths, paths[::-1]):
            lengths, width = cache.columns.lengths, cache.columns.width
            assert lengths == [len(text) for text in texts]
            positions = torch.tensor(lengths)[:, None] + torch.tensor(TREE_DEPTHS)
            logits = target(
                torch.tensor([TREE_TOKENS] * 2),
                attention_mask=tree_mask(lengths, width),
                position_ids=positions,
                past_key_values=cache.cache,
            ).logits
            cache.keep_paths(kept)
            for row, path in enumerate(kept):
                texts[row] += [TREE_TOKENS[node] for node in path]
                alone = target(torch.tensor([texts[row]])).logits[0, -len(path) :]
                torch.testing.assert_close(logits[row, path], alone, rtol=1e-4, atol=1e-4)
    held = cache.cache
    assert held.get_seq_length() == max(map(len, texts))
    for row, text in enumerate(texts):
        alone = target(torch.tensor([text]), use_cache=True).past_key_values
        for layer, other in zip(held.layers, alone.layers, strict=True):
            assert type(layer) is DynamicLayer
            for mine, theirs in ((layer.keys, other.keys), (layer.values, other.values)):
                torch.testing.assert_close(mine[row : row + 1, :, : len(text)], theirs, rtol=1e-4, atol=1e-4)
                assert not mine[row, :, len(text) :].any()


@torch.no_grad()
def run(target, cache: TargetCache, tokens: torch.LongTensor) -> None:
    """Feeds rows [active, tokens] that have no padding and are of one length."""
    target(tokens, past_key_values=cache.cache)
    cache.commit(tokens.shape[1])


def test_rows_come_back_in_the_batchs_order():
    target = small_target()
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 10, 11]])
    cache = TargetCache(DynamicCache(), rows=3)
    with cache.lend():
        run(target, cache, tokens)
        cache.retire(0)
        assert cache.columns.rows == [2, 1, 0]
        run(target, cache, torch.tensor([[4], [5]]))
        cache.swap(0, 1)
        run(target, cache, torch.tensor([[6], [7]]))
    texts = [[3, 4, 5], [6, 7, 8, 5, 6], [9, 10, 11, 4, 7]]
    for row, text in enumerate(texts):
        with torch.no_grad():
            alone = target(torch.tensor([text])).past_key_values.layers
        for layer, other in zip(cache.cache.layers, alone, strict=True):
            torch.testing.assert_close(layer.keys[row, :, : len(text)], other.keys[0], rtol=1e-4, atol=1e-4)
            assert not layer.values[row, :, len(text) :].any()


@pytest.mark.parametrize("filled", [0, 3, 20])
def test_a_window_layer_comes_back_as_plain_decoding_leaves_it(filled):
    """With the newest entries of its window, after any number before and after."""
    target = small_target("mistral")
    tokens = torch.arange(3, 12).repeat(4)[None, : filled + 15]
    lent, plain = DynamicCache(config=target.config), DynamicCache(config=target.config)
    with torch.no_grad():
        if filled:
            target(tokens[:, :filled], past_key_values=lent)
        for part in filter(torch.Tensor.numel, tokens.split([filled, 15], dim=1)):
            target(part, past_key_values=plain)
    cache = TargetCache(lent, rows=1)
    assert cache.windows == [8, 8]
    with cache.lend():
        assert lent.get_seq_length() == filled
        for token in tokens[:, filled:].unbind(1):
            run(target, cache, token[:, None])
    assert lent.get_seq_length() == plain.get_seq_length() == filled + 15
    for layer, other in zip(lent.layers, plain.layers, strict=True):
        assert type(layer) is DynamicSlidingWindowLayer
        assert layer.get_mask_sizes(1) == other.get_mask_sizes(1)
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filled", [0, 4])
def test_a_call_that_fails_leaves_the_cache_as_it_was(filled):
    target = small_target()
    lent = DynamicCache(config=target.config)
    with torch.no_grad():
        if filled:
            target(torch.arange(3, 3 + filled)[None], past_key_values=lent)
    before = [(layer, layer.keys.clone()) for layer in lent.layers if filled]
    layers = list(lent.layers)
    cache = TargetCache(lent, rows=1)
    with pytest.raises(RuntimeError, match="out of luck"), cache.lend():
        run(target, cache, torch.tensor([[5, 6]]))
        raise RuntimeError("out of luck")
    assert lent.layers == layers and lent.get_seq_length() == filled
    for layer, keys in before:
        assert torch.equal(layer.keys, keys)
    with torch.no_grad():
        target(torch.tensor([[7]]), past_key_values=lent)
    assert lent.get_seq_length() == filled + 1


def test_a_cache_of_another_batch_is_refused():
    cache = DynamicCache()
    cache.update(*states(3, 0, rows=2), 0)
    with pytest.raises(ValueError, match="2 row.*batch has 3.*batch_repeat_interleave"):
        TargetCache(cache, rows=3)


def test_a_static_cache_comes_back_as_plain_decoding_leaves_it():
    target = small_target()
    prompt, more = torch.tensor([[5, 9, 11, 3], [6, 7, 10, 4]]), torch.tensor([[4, 8], [3, 5]])
    lent, plain = (StaticCache(config=target.config, max_cache_len=16) for _ in range(2))
    with torch.no_grad():
        target(prompt, past_key_values=plain)
        target(more, past_key_values=plain)
    layers = list(lent.layers)
    cache = TargetCache(lent, rows=2)
    with cache.lend():
        run(target, cache, prompt)
        run(target, cache, more)
    assert lent.layers == layers and {type(layer) for layer in layers} == {StaticLayer}
    assert int(lent.get_seq_length()) == int(plain.get_seq_length()) == 6
    for layer, other in zip(lent.layers, plain.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


def test_a_layer_that_cannot_forget_is_refused():
    class Forgetful(DynamicLayer):
        """Of another make: nobody knows what it does with its entries."""

    cache = DynamicCache()
    cache.layers.append(Forgetful())
    with pytest.raises(ValueError, match="Forgetful.*DynamicCache"):
        TargetCache(cache, rows=1)


# ---- Layers of unlike shape ----


UNLIKE = ((2, 4), (1, 8), (2, 4), (2, 6), *((1, 8),) * 9)  # heads and width of each layer


@pytest.mark.parametrize("rows", [1, 3])
def test_layers_of_unlike_shape_keep_their_paths(rows):
    """Rounds of random paths, rows that finish, buffers that grow: each layer ends with its own entries in order."""
    generator = random.Random(rows)
    cache = TargetCache(DynamicCache(), rows)
    texts = [[[] for _ in range(rows)] for _ in UNLIKE]
    with cache.lend():
        for number, entries in enumerate((250, *[7] * 30)):
            active = cache.columns.active
            new = [torch.randn(active, heads, entries, width) for heads, width in UNLIKE]
            for index, keys in enumerate(new):
                cache.cache.update(keys, -keys, index)
            if number == 0:
                paths = [list(range(entries))] * active
                cache.commit(entries)
            else:
                paths = [sorted({0, *generator.sample(range(entries), 3)}) for _ in range(active)]
                cache.keep_paths(paths)
            for text, keys in zip(texts, new, strict=True):
                for slot, path in enumerate(paths):
                    text[cache.columns.rows[slot]].append(keys[slot, :, path])
            if active > 1 and number in (10, 20):
                cache.retire(generator.randrange(active))
    for layer, text in zip(cache.cache.layers, texts, strict=True):
        for row, parts in enumerate(text):
            whole = torch.cat(parts, dim=1)
            assert torch.equal(layer.keys[row, :, : whole.shape[1]], whole)
            assert torch.equal(layer.values[row, :, : whole.shape[1]], -whole)
            assert not layer.keys[row, :, whole.shape[1] :].any()


def test_layers_of_unlike_dtype_keep_their_paths():
    dtypes = torch.float32, torch.bfloat16
    cache, parts = TargetCache(DynamicCache(), 1), [[] for _ in range(4)]
    with cache.lend():
        for seed, path in enumerate(([0, 1, 2], [0, 2], [0, 1], [0, 2])):
            for index in range(4):
                new = states(3, 4 * seed + index, dtype=dtypes[index % 2])
                cache.cache.update(*new, index)
                parts[index].append(tuple(tensor[:, :, path] for tensor in new))
            cache.keep_paths([path]) if seed else cache.commit(3)
    for layer, kept in zip(cache.cache.layers, parts, strict=True):
        assert_equal((layer.keys, layer.values), concatenated(*kept))
