"""What of a conversation counts: the expected masks are written by hand."""

import chat_templates as templates
import pytest
from chat_templates import make_tokenizer, marked

from hf_poss.training.chat import ChatRenderer, RefusedConversation, UnclearTurns
from hf_poss.training.data import prepare_dataset
from hf_poss.training.formats import Conversation


TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "no"},
]
THOUGHTS = [
    TURNS[0],
    {"role": "assistant", "content": "<think>a</think>yes"},
    TURNS[2],
    {"role": "assistant", "content": "<think>b</think>no"},
]
SYSTEM = {"role": "system", "content": "S"}
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
CHATML_MASK = f"{USER}hi<|im_end|>\n{ASSISTANT}⟦ yes <|im_end|>⟧\n{USER}so?<|im_end|>\n{ASSISTANT}⟦no<|im_end|>⟧\n"
PLAIN_MASK = CHATML_MASK.replace(" yes ", "yes")


def mask(template: str, messages: list[dict], **tokenizer_settings) -> str:
    tokenizer = make_tokenizer(template, **tokenizer_settings)
    [sample] = prepare_dataset([{"messages": messages}], tokenizer, max_length=1000)
    return marked(tokenizer, sample)


@pytest.mark.parametrize("name", ["CHATML", "TAGGED", "TAGGED_WITHOUT_END", "BARE", "PARTS"])
@pytest.mark.parametrize("trims_offsets", [False, True])
def test_all_turns_of_the_assistant_count_with_their_end(name, trims_offsets):
    assert mask(getattr(templates, name), TURNS, trims_offsets=trims_offsets) == CHATML_MASK


def test_what_follows_the_last_turn_does_not_count():
    for template in (templates.CHATML, templates.TAGGED, templates.TAGGED_WITHOUT_END):
        assert mask(template, TURNS[:3]) == CHATML_MASK.partition(ASSISTANT + "⟦no")[0]


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


LLAMA3_MASK = (
    f"<s>{header('system')}S<|eot_id|>{header('user')}hi<|eot_id|>{header('assistant')}⟦yes<|eot_id|>⟧"
    f"{header('user')}so?<|eot_id|>{header('assistant')}⟦no<|eot_id|>⟧"
)


def test_templates_that_trim():
    assert mask(templates.LLAMA3, [SYSTEM, *TURNS]) == LLAMA3_MASK


def test_what_ends_the_text_but_not_the_turn_does_not_count():
    assert mask(templates.LLAMA3_ALWAYS_OPEN, [SYSTEM, *TURNS]) == LLAMA3_MASK + header("assistant")
    assert mask(templates.PHI3, TURNS) == CHATML_MASK + "</s>"
    assert mask(templates.PHI3, TURNS[:3]) == CHATML_MASK.partition(ASSISTANT + "⟦no")[0] + "</s>"


def test_templates_that_drop_earlier_thoughts():
    """The last turn's thoughts count: the assistant writes them; earlier ones are not in the text."""
    default = "<|im_start|>system\nBe nice.<|im_end|>\n"
    last = "<think>\nb\n</think>\n\nno"
    assert mask(templates.THINKING, THOUGHTS) == default + PLAIN_MASK.replace("no", last)
    assert mask(templates.THINKING, THOUGHTS[:3]) == default + PLAIN_MASK.partition(ASSISTANT + "⟦no")[0]


def test_templates_that_open_thoughts_in_the_prompt():
    default = "<|im_start|>system\nBe nice.<|im_end|>\n"
    assert mask(templates.THINKS_FIRST, THOUGHTS) == default + PLAIN_MASK
    # An answer that begins like the thoughts that the prompt opens.
    answer = [TURNS[0], {"role": "assistant", "content": "<b>"}]
    assert mask(templates.THINKS_FIRST, answer) == f"{default}{USER}hi<|im_end|>\n{ASSISTANT}⟦<b><|im_end|>⟧\n"


def test_templates_that_end_the_last_turn_otherwise():
    assert mask(templates.LAST_ENDS_OTHERWISE, TURNS) == (
        f"{USER}hi<|im_end|>{ASSISTANT}⟦ yes <|im_end|>⟧{USER}so?<|im_end|>{ASSISTANT}⟦no</s>⟧"
    )
    assert mask(templates.ENDS_ONCE, TURNS) == f"{USER}hi{ASSISTANT}⟦ yes ⟧{USER}so?{ASSISTANT}⟦no</s>⟧"


def test_templates_without_header_that_move_the_system_prompt():
    assert mask(templates.INSTRUCTIONS, [SYSTEM, *TURNS]) == (
        "<s>[INST] hi [/INST]⟦ yes</s>⟧[INST] S\n\nso? [/INST]⟦ no</s>⟧"
    )


def test_the_space_behind_an_instruction_counts():
    """The prompt ends in front of it, also where it is a token of its own."""
    turns = [TURNS[0], {"role": "assistant", "content": "a"}, TURNS[2], {"role": "assistant", "content": "b"}]
    assert (
        mask(templates.INSTRUCTIONS, [SYSTEM, *turns]) == "<s>[INST] hi [/INST]⟦ a</s>⟧[INST] S\n\nso? [/INST]⟦ b</s>⟧"
    )


def test_words_are_tokens_of_the_whole_text():
    """' yes' is one token though the template's own space begins it."""
    tokenizer = make_tokenizer(templates.INSTRUCTIONS)
    [sample] = prepare_dataset([{"messages": TURNS[:2]}], tokenizer, max_length=100)
    whole = tokenizer("<s>[INST] hi [/INST] yes</s>", add_special_tokens=False)["input_ids"]
    assert sample["input_ids"] == whole
    assert [label for label in sample["labels"] if label != -100] == whole[-2:]


@pytest.mark.parametrize("template", [templates.CHATML, templates.TAGGED, templates.THINKING])
def test_assistant_first(template):
    text = mask(template, TURNS[1:])
    assert text.count("⟦") == 2 and f"{ASSISTANT}⟦" in text and "no<|im_end|>⟧" in text


def test_tool_calls_count():
    messages = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": "R"},
        {"role": "assistant", "content": "no"},
    ]
    assert mask(templates.TOOLS, messages) == (
        f'{USER}hi<|im_end|>\n{ASSISTANT}⟦<call>{{"name": "f"}}</call><|im_end|>⟧\n'
        f"<|im_start|>tool\nR<|im_end|>\n{ASSISTANT}⟦no<|im_end|>⟧\n"
    )


def test_slow_tokenizers_count_the_same(monkeypatch):
    """Without offsets, borders are found by the tokens that come before them."""
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", property(lambda self: False))
    assert mask(templates.CHATML, TURNS) == CHATML_MASK
    assert mask(templates.THINKING, THOUGHTS).endswith("⟦<think>\nb\n</think>\n\nno<|im_end|>⟧\n")


def test_only_the_completion_of_a_prompt_counts():
    for template in (templates.CHATML, templates.TAGGED, templates.TAGGED_WITHOUT_END):
        tokenizer = make_tokenizer(template)
        row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
        [sample] = prepare_dataset([row], tokenizer, max_length=1000)
        assert marked(tokenizer, sample) == CHATML_MASK.replace("⟦ yes <|im_end|>⟧", " yes <|im_end|>")


def test_refusals_say_what_the_template_said():
    renderer = ChatRenderer(make_tokenizer(templates.STRICT))
    with pytest.raises(RefusedConversation, match="System role not supported"):
        renderer.spans(Conversation([SYSTEM, *TURNS]))
    with pytest.raises(RefusedConversation, match="alternate"):
        renderer.render(Conversation(TURNS[1:]))


def test_turns_that_cannot_be_told_apart_are_an_error_with_the_remedy():
    renderer = ChatRenderer(make_tokenizer(templates.COUNTING))
    with pytest.raises(UnclearTurns, match="{% generation %}"):
        renderer.spans(Conversation(TURNS))


def test_no_chat_template():
    with pytest.raises(ValueError, match=r"no chat template.*tokenizer\.chat_template"):
        prepare_dataset([{"messages": TURNS}], make_tokenizer(), max_length=1000)


def test_generation_prompt():
    text = ChatRenderer(make_tokenizer(templates.CHATML)).render(Conversation(TURNS[:1]), add_generation_prompt=True)
    assert text == f"{USER}hi<|im_end|>\n{ASSISTANT}"
