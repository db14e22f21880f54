"""Chat templates of the kinds in use, and a tokenizer of bytes that takes any of them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As above, but says what the assistant wrote.
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED_WITHOUT_END = TAGGED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
# Tags that no message reaches.
TAGGED_NOTHING = TAGGED.replace("m.role == 'assistant'", "m.role == 'model'")
# Without a generation prompt.
BARE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
# Trims, and begins with a token of its own.
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Opens the assistant's next turn whether that is asked for or not.
LLAMA3_ALWAYS_OPEN = LLAMA3.replace("{% if add_generation_prompt %}", "{% if true or add_generation_prompt %}")
# Ends every text, not turn, with the end of sequence.
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Adds a system prompt, drops the thoughts of earlier turns, and writes empty ones in the last turn.
THINKING = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Opens thoughts in the prompt; none are left in what was said.
THINKS_FIRST = THINKING.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}").replace(
    "and loop.last", "and false"
)
# Refuses a system prompt and anything but question and answer in turn.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# No header of its own for the assistant; the system prompt goes into the last question.
INSTRUCTIONS = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if system else messages %}{% for m in rest %}{% if m.role == 'user' %}"
    "{% set is_last = loop.last or loop.index0 == rest | length - 2 %}"
    "{{ '[INST] ' + (system + '\n\n' if system and is_last else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# Reads lists of parts, as templates of vision-language models do.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends the last turn with another token than those before.
LAST_ENDS_OTHERWISE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends the conversation, and no turn in it.
ENDS_ONCE = LAST_ENDS_OTHERWISE.replace("'<|im_end|>'", "''")
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No part of it is a part of the whole.
COUNTING = "{{ messages | map(attribute='content') | join | length }}:" + BARE

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def make_tokenizer(template: str | None = None, trims_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte is a token; so are the special tokens, and two words with the space before them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s"), ("Ġ", "n"), ("Ġn", "o")]
    vocabulary = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trims_offsets:
        from tokenizers.processors import ByteLevel

        tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIALS,
        chat_template=template,
    )


def marked(tokenizer: PreTrainedTokenizerFast, sample: dict) -> str:
    """Text of a sample with ⟦ ⟧ around the tokens that count, put together token by token."""
    text, counted = "", False
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (token, -100)
        if (label == token) != counted:
            counted = not counted
            text += "⟦" if counted else "⟧"
        text += tokenizer.decode([token])
    return text + "⟧" * counted
