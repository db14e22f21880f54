"""A tokenizer of words with a chat template, for the tiny targets of these tests."""

from conftest import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


ROLES = ["system", "user", "assistant", "tool"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def word_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Tokens 0..2 are `<pad>`, `<s>`, `</s>`; 3..6 the roles; i is the word `w{i}`, up to the targets' vocabulary."""
    words = ["<pad>", "<s>", "</s>", *ROLES, *(f"w{i}" for i in range(7, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
