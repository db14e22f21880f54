"""Pipelines and streamers with position specialists: the text of a pipeline without an assistant."""

import threading

import pytest
import torch
from conftest import make_poss, make_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline
from transformers.pipelines import base as pipelines_base

import hf_poss
from hf_poss import PosSModel, collect_statistics
from hf_poss.demo import demo_folder, load_demo_pair


CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
PROMPTS = {
    "text": "def read_lines(path):\n",
    "texts": ["def read_lines(path):\n", "class Queue:\n    def put(self, item):\n", "import os\n"],
    "chat": [{"role": "user", "content": "class Stack:"}],
    "prefilled chat": [
        {"role": "user", "content": "class Stack:"},
        {"role": "assistant", "content": "    def push(self,"},
    ],
}


@pytest.fixture(scope="module")
def demo_pair():
    target, poss, tokenizer = load_demo_pair()
    tokenizer.chat_template = CHAT_TEMPLATE
    return target, poss, tokenizer


def make_pipeline(demo_pair, **kwargs):
    target, _, tokenizer = demo_pair
    knobs = {"device": "cpu", "max_new_tokens": 32, "do_sample": False}
    return pipeline("text-generation", model=target, tokenizer=tokenizer, **{**knobs, **kwargs})


@pytest.fixture(scope="module")
def plain(demo_pair):
    return make_pipeline(demo_pair)


@pytest.fixture(scope="module", params=["object", "folder"])
def drafted(request, demo_pair):
    return make_pipeline(
        demo_pair, assistant_model=demo_pair[1] if request.param == "object" else str(demo_folder() / "poss")
    )


# ---- Text ----


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_same_text_for_every_kind_of_prompt(plain, drafted, prompt, batch_size):
    wanted = plain(PROMPTS[prompt], batch_size=batch_size)
    with collect_statistics() as stats:
        texts = drafted(PROMPTS[prompt], batch_size=batch_size)
    assert texts == wanted
    assert stats.tau > 1.5


def test_several_sequences_a_prompt(plain, drafted):
    """Draws from one token each, so that the two can be compared."""
    knobs = {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
    with collect_statistics() as stats:
        texts = drafted(PROMPTS["texts"], batch_size=2, **knobs)
    assert texts == plain(PROMPTS["texts"], batch_size=2, **knobs)
    assert [len(sequences) for sequences in texts] == [3, 3, 3]
    assert stats.tau > 1.5


def test_stop_sequences(plain, drafted):
    stop = {"stop_sequence": "\n", "return_full_text": False}
    wanted = plain(PROMPTS["text"], **stop)
    assert wanted[0]["generated_text"].endswith("\n") and wanted != plain(PROMPTS["text"], return_full_text=False)
    assert drafted(PROMPTS["text"], **stop) == wanted


# ---- Streams ----


def stream(demo_pair, write) -> str:
    """What arrives while `write` runs in a thread of its own."""
    streamer = TextIteratorStreamer(demo_pair[2], skip_prompt=True, timeout=60)
    thread = threading.Thread(target=write, args=(streamer,))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 2
    return "".join(pieces)


def test_a_pipeline_streams_from_a_thread(demo_pair, plain, drafted):
    wanted = plain(PROMPTS["text"], return_full_text=False)[0]["generated_text"]
    assert stream(demo_pair, lambda streamer: drafted(PROMPTS["text"], streamer=streamer)) == wanted


def test_generate_streams_from_a_thread(demo_pair, plain):
    target, poss, tokenizer = demo_pair
    inputs = tokenizer(PROMPTS["text"], return_tensors="pt")
    knobs = {"max_new_tokens": 32, "do_sample": False, "assistant_model": poss}
    wanted = plain(PROMPTS["text"], return_full_text=False)[0]["generated_text"]
    assert stream(demo_pair, lambda streamer: target.generate(**inputs, streamer=streamer, **knobs)) == wanted


# ---- Loading ----


@pytest.fixture
def hooked():
    yield
    hf_poss.enable()


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One letter a token, in the vocabulary of the shared tiny models."""
    vocabulary = {chr(33 + index): index for index in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!", pad_token="!", eos_token="#")


def assistant_of(target, letters, **kwargs):
    made = pipeline("text-generation", model=target, tokenizer=letters, device="cpu", **kwargs)
    return made.assistant_model, made.assistant_tokenizer


def test_specialists_need_no_tokenizer_whatever_the_special_tokens(letters, tmp_path):
    target = make_target()
    poss = make_poss(target)
    poss.save_pretrained(tmp_path)
    target.config.pad_token_id = 96
    assert assistant_of(target, letters, assistant_model=poss) == (poss, None)
    assert assistant_of(target, letters, assistant_model=poss, assistant_tokenizer=letters) == (poss, None)
    loaded, tokenizer = assistant_of(target, letters, assistant_model=str(tmp_path))
    assert isinstance(loaded, PosSModel) and tokenizer is None


def test_a_folder_is_loaded_in_the_dtype_of_the_target(letters, tmp_path):
    target = make_target()
    make_poss(target).save_pretrained(tmp_path)
    assert assistant_of(target.to(torch.bfloat16), letters, assistant_model=str(tmp_path))[0].dtype == torch.bfloat16


def test_specialists_of_another_target_are_refused(letters, tmp_path):
    other = make_poss(make_target("opt"))
    other.config.vocab_size = 98
    text = pipeline("text-generation", model=make_target(), tokenizer=letters, device="cpu", assistant_model=other)
    with pytest.raises(ValueError, match="vocabulary of 98 tokens"):
        text("AB")


def test_other_assistants_load_as_ever(hooked, letters, tmp_path):
    target, assistant = make_target(), make_target("gpt2")
    assistant.save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)
    other = make_target("qwen3")
    other.config.vocab_size = 98
    hf_poss.disable()
    with pytest.raises(ValueError) as stock:
        assistant_of(target, letters, assistant_model=other)
    hf_poss.enable()
    with pytest.raises(ValueError) as ours:
        assistant_of(target, letters, assistant_model=other)
    assert str(ours.value) == str(stock.value)
    assert assistant_of(target, letters) == (None, None)
    assert assistant_of(target, letters, assistant_model=assistant) == (assistant, None)
    assert assistant_of(target, letters, assistant_model=other, assistant_tokenizer=letters) == (other, letters)
    assert type(assistant_of(target, letters, assistant_model=str(tmp_path))[0]) is type(assistant)


def test_the_hook_of_pipelines_goes_with_the_others(hooked):
    ours = pipelines_base.load_assistant_model
    hf_poss.enable()
    assert pipelines_base.load_assistant_model is ours
    hf_poss.disable()
    hf_poss.disable()
    assert pipelines_base.load_assistant_model is ours.__wrapped__
    hf_poss.enable()
    assert pipelines_base.load_assistant_model is ours
