"""Datasets to samples."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat import ChatRenderer, RefusedConversation
from .encoding import cut_rows, encode_rows, pack_rows
from .formats import Conversation, row_reader


__all__ = ["prepare_dataset"]

logger = logging.get_logger(__name__)

_EMPTY = "The dataset is empty; there is nothing to learn."
_SHOWN = 1500  # characters of a rendered text in an error


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool = False,
    text_field: str = "text",
    num_proc: int | None = None,
) -> Any:
    """Samples of at most `max_length` tokens: dicts with lists `input_ids`, `labels` (-100 where a token does not
    count), `segment_ids` if packed (1, 2, 3... by document), and the number of tokens, `length`.

    What counts: in a chat what the assistant wrote, each turn with the token that ends it; of prompt and completion
    the completion with the end-of-sequence token; of plain text all, the end-of-sequence token included.

    Longer chats and completions are cut off, and so is plain text unless packed: then it goes on in the next piece.
    Rows without a token that counts are left out, with a warning that says how many and why. Packed samples are made
    of whole documents, out of those of a thousand rows at a time.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a sequence of strings or of dicts. Formats are told by
            the columns, see [`~hf_poss.training.formats.row_reader`]; rows with `input_ids` are taken as samples.
            Samples that need no work, and those with stored features, come back as they are.
        tokenizer: of the target; chats are written with its chat template.
        max_length: tokens a sample.
        packing: puts several documents into a sample.
        text_field: column of plain text.
        num_proc: processes that tokenize; not for an `IterableDataset`.

    Raises:
        ValueError: if `max_length` is less than 2, the dataset is empty, has none of the columns that are understood,
            holds chats and the tokenizer has no chat template, or nothing is left that counts (shows how the template
            wrote a chat).
    """
    from datasets import Dataset, IterableDataset

    if max_length < 2:
        raise ValueError(f"`max_length` is {max_length}; expected 2 or more: the first token is not predicted.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        dataset = _from_sequence(dataset, text_field)
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(_EMPTY)
    columns = list(dataset.column_names or first)
    if "features" in columns or _is_prepared(dataset, columns, max_length, packing):
        return dataset
    dataset = dataset.with_format(None)
    names = ["input_ids", "labels"]
    if "input_ids" in columns:
        encode, arguments = cut_rows, {"max_length": max_length}
        names += ["segment_ids"] * ("segment_ids" in columns)
        packing = packing and "segment_ids" not in columns
    else:
        content = row_reader(columns, text_field, tokenizer.chat_template)(next(iter(dataset)))
        if isinstance(content, Conversation):
            ChatRenderer(tokenizer)  # refuses a tokenizer that cannot write chats, before any work
        tokenizer("a", verbose=False)  # its first call changes a tokenizer's hash, by which results are cached
        encode = encode_rows
        arguments = {"tokenizer": tokenizer, "max_length": max_length, "packing": packing, "text_field": text_field}
    names.append("length")
    encoded = _map(dataset, columns, encode, arguments, [*names, "left_out"], num_proc, "Tokenizing")
    samples = _without_left_out(encoded, lambda: _example(dataset, columns, tokenizer, text_field))
    if not packing:
        return samples
    packed = ["input_ids", "labels", "segment_ids", "length"]
    return _map(samples, names, pack_rows, {"max_length": max_length}, packed, num_proc, "Packing")


def _from_sequence(dataset: Any, text_field: str) -> Any:
    """A `datasets.Dataset` of a sequence of strings or dicts; anything else that gives samples stays as it is."""
    from datasets import Dataset

    if not hasattr(dataset, "__len__"):
        return dataset
    if len(dataset) == 0:
        raise ValueError(_EMPTY)
    first = dataset[0]
    if isinstance(first, str):
        return Dataset.from_dict({text_field: list(dataset)})
    if not isinstance(first, Mapping):
        raise ValueError(f"The dataset holds items of type {type(first).__name__}; expected strings or dicts.")
    if "features" in first or ("input_ids" in first and not isinstance(dataset, (list, tuple))):
        return dataset
    names = list(dict.fromkeys(name for row in dataset for name in row))  # `from_list` reads those of the first row
    return Dataset.from_list([{name: _as_list(row.get(name)) for name in names} for row in dataset])


def _is_prepared(dataset: Any, columns: Sequence[str], max_length: int, packing: bool) -> bool:
    """Whether samples come from here and need no further work."""
    prepared = {"input_ids", "labels", "length", *(["segment_ids"] if packing else [])}
    return prepared.issubset(columns) and hasattr(dataset, "__len__") and max(dataset["length"]) <= max_length


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _map(
    dataset: Any,
    columns: Sequence[str],
    function: Callable[..., dict[str, list]],
    arguments: dict[str, Any],
    names: Sequence[str],
    num_proc: int | None,
    task: str,
) -> Any:
    """`dataset.map` by batches, from `columns` to the columns `names`."""
    from datasets import Dataset, Features, Value
    from datasets import Sequence as List

    kinds = {"left_out": Value("string"), "length": Value("int32")}
    known = {"num_proc": num_proc, "desc": task} if isinstance(dataset, Dataset) else {}
    return dataset.map(
        function,
        batched=True,
        fn_kwargs=arguments,
        remove_columns=list(columns),
        features=Features({name: kinds.get(name, List(Value("int32"))) for name in names}),
        **known,
    )


# ---- rows that are left out


class _Counting:
    """Tells rows to keep, and counts the reasons of the others."""

    def __init__(self):
        self.reasons: Counter[str] = Counter()

    def __call__(self, left_out: str | None) -> bool:
        if left_out is None:
            return True
        if not self.reasons[left_out]:
            logger.warning(f"The dataset has rows {left_out}. They are left out.")
        self.reasons[left_out] += 1
        return False


def _without_left_out(encoded: Any, example: Callable[[], str]) -> Any:
    """The rows that are samples. `example` gives the text of a row, for the error if there are none."""
    from datasets import Dataset

    if isinstance(encoded, Dataset):
        left_out = encoded["left_out"]
        reasons = Counter(reason for reason in left_out if reason is not None)
        if reasons.total() == len(encoded):
            raise ValueError(_nothing_left(reasons, example))
        if reasons:
            logger.warning(f"Of {len(encoded)} rows these are left out: {_listed(reasons)}.")
            encoded = encoded.select([index for index, reason in enumerate(left_out) if reason is None])
        return encoded.remove_columns("left_out")
    counting = _Counting()
    samples = encoded.filter(counting, input_columns="left_out").remove_columns("left_out")
    if next(iter(samples), None) is None:
        raise ValueError(_nothing_left(counting.reasons, example))
    return samples


def _nothing_left(reasons: Counter[str], example: Callable[[], str]) -> str:
    return f"The dataset holds nothing to learn: {_listed(reasons)}. {example()}"


def _listed(reasons: Counter[str], most: int = 5) -> str:
    listed = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(most))
    more = reasons.total() - sum(count for _, count in reasons.most_common(most))
    return f"{listed}; {more} for other reasons" if more else listed


def _example(dataset: Any, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, text_field: str) -> str:
    """How a row reads."""
    if "input_ids" in columns:
        return "A sample needs two tokens or more, and a label other than -100 behind the first."
    read = row_reader(columns, text_field, tokenizer.chat_template)
    for row in islice(dataset, 100):
        content = read(row)
        if not isinstance(content, Conversation):
            return f"A row reads {_shortened(content.prompt + content.completion)}."
        try:
            text = ChatRenderer(tokenizer).render(content)
        except RefusedConversation:
            continue
        return f"The chat template writes a row as {_shortened(text)}."
    return "Change the messages, or `tokenizer.chat_template`, so that it takes them."


def _shortened(text: str) -> str:
    half = _SHOWN // 2
    return repr(text) if len(text) <= _SHOWN else f"{text[:half]!r} ... {text[-half:]!r}"
