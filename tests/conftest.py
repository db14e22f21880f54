"""Tiny models that every test shares. All of them are made here from seeds; pretrained ones are optional."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    set_seed,
)
from transformers.integrations import peft as peft_integration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from hf_poss import PosSCandidateGenerator, PosSModel
from hf_poss.draft_tree import DraftTree


VOCAB_SIZE = 97
EOS = 2
SMALL_VOCAB = 12
PAD = 0
TOP_K = {"chain": 1, "tree": 4}
SHAPES = list(TOP_K)

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}

# A GPT-2 has learned absolute positions and no RoPE; Qwen3 has heads of its own width and norms on queries and keys.
TARGET_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
}


# Windows of 8 tokens: in every layer, and in every other one.
WINDOW_CONFIGS = {
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
        sliding_window=8,
    ),
}

# Seeds and widths whose greedy text does not fall into a loop of one or two tokens at once.
_LIVELY = {
    "llama": (4, 10.0),
    "qwen3": (0, 10.0),
    "gpt2": (7, 6.0),
    "opt": (1, 10.0),
    "mistral": (4, 10.0),
    "gemma3": (0, 10.0),
}


def make_target(family: str = "llama", attention: str = "sdpa", seed: int = 0, scale: float = 6.0) -> PreTrainedModel:
    """A random target. `scale` widens its weights: distributions get peaks and text varies, so drafts are both
    accepted and rejected."""
    set_seed(seed)
    target = AutoModelForCausalLM.from_config(TARGET_CONFIGS[family](), attn_implementation=attention)
    return widened(target.eval(), scale)


def make_poss(target: PreTrainedModel, seed: int = 0, **kwargs) -> PosSModel:
    """Random specialists for `target`."""
    set_seed(seed)
    return PosSModel.from_target(target, **kwargs).eval()


def small_target(family: str = "llama", attention: str = "sdpa", seed: int | None = None, **config) -> PreTrainedModel:
    """A random target of few tokens, so that random drafts are accepted often; it knows no end of sequence."""
    settings = {**TARGET_CONFIGS, **WINDOW_CONFIGS}[family]()
    settings.vocab_size, settings.eos_token_id = SMALL_VOCAB, None
    for name, value in config.items():
        setattr(settings, name, value)
    family_seed, scale = _LIVELY[family]
    set_seed(family_seed if seed is None else seed)
    return widened(AutoModelForCausalLM.from_config(settings, attn_implementation=attention).eval(), scale)


def unknown_attention() -> str:
    """Name of an attention that computes what sdpa does; whether it takes tree masks is not known of it."""
    AttentionInterface.register("some_kernel", sdpa_attention_forward)
    AttentionMaskInterface.register("some_kernel", sdpa_mask)
    return "some_kernel"


def widened(target: PreTrainedModel, scale: float) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return target


def drafter_for(target: PreTrainedModel, shape: str, total: int = 20, depth: int | None = None, **kwargs) -> PosSModel:
    """Random specialists that draft chains or trees."""
    poss = make_poss(target, **{"positions_per_specialist": 2, "num_draft_positions": 4, **kwargs})
    knobs = poss.generation_config
    knobs.draft_top_k, knobs.draft_total_tokens, knobs.num_assistant_tokens = TOP_K[shape], total, depth
    return poss


def make_prompt(length: int, seed: int = 1, vocab: int = SMALL_VOCAB) -> torch.LongTensor:
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.LongTensor]) -> dict[str, torch.LongTensor]:
    """`input_ids` and `attention_mask` of prompts [1, tokens]."""
    longest = max(prompt.shape[1] for prompt in prompts)
    mask = torch.tensor([[0] * (longest - prompt.shape[1]) + [1] * prompt.shape[1] for prompt in prompts])
    padded = [torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0), value=PAD) for prompt in prompts]
    return {"input_ids": torch.cat(padded), "attention_mask": mask}


@pytest.fixture(params=SHAPES)
def shape(request) -> str:
    return request.param


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the drafter's guesses: `scripted(text, ...)`, one text a row without padding, makes every draft hold
    the next tokens of its row's text, a branch of wrong tokens before or behind each right one. Deep paths are then
    accepted, and which is known in advance. A mistake in a text is a draft that will be rejected."""

    def script(*texts: list[int]) -> None:
        def draft(self, root_tokens, settings, *_):
            rows = []
            for slot, root in enumerate(root_tokens.tolist()):
                committed = self.columns.lengths[slot] + 1
                right = texts[self.columns.rows[slot]][committed : committed + settings.depth]
                tokens, parents, depths, parent = [root], [0], [0], 0
                for depth, token in enumerate([*right, *[PAD] * (settings.depth - len(right))], start=1):
                    siblings = [token]
                    if not settings.is_chain:
                        siblings.insert((committed + depth) % 2, (token + 1) % SMALL_VOCAB)
                    tokens += siblings
                    parents += [parent] * len(siblings)
                    depths += [depth] * len(siblings)
                    parent = len(tokens) - len(siblings) + siblings.index(token)
                rows.append((tokens, parents, depths))
            return DraftTree(*torch.tensor(rows).unbind(1), max_depth=settings.depth)

        monkeypatch.setattr(PosSCandidateGenerator, "draft", draft)

    return script


def with_slips(text: list[int], every: int) -> list[int]:
    """A text with a wrong token at every `every`-th place."""
    return [(token + 1) % SMALL_VOCAB if index % every == every - 1 else token for index, token in enumerate(text)]


def pretrained_folder(name: str) -> Path:
    """Folder of a real model under `HF_POSS_TEST_MODELS`, else beside the checkout; skips where there is none."""
    root = os.environ.get("HF_POSS_TEST_MODELS", Path(__file__).parents[2] / "shared" / "models")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set HF_POSS_TEST_MODELS to a folder with {name}")
    return folder


def peft_for_add_adapter():
    """peft, if this transformers takes it for the adapters that it adds itself; 5.24 asks for one to come."""
    peft = pytest.importorskip("peft")
    wanted = getattr(peft_integration, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(wanted):
        pytest.skip(f"transformers {transformers.__version__} wants peft {wanted}, {peft.__version__} is installed")
    return peft


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_target("llama")


@pytest.fixture
def poss(llama) -> PosSModel:
    return make_poss(llama, positions_per_specialist=2, num_draft_positions=4)


@pytest.fixture(scope="session")
def stories() -> tuple[PreTrainedModel, object]:
    """A pretrained Llama that tells little stories, with its tokenizer."""
    folder = pretrained_folder("stories260k")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def warnings_seen(caplog, monkeypatch) -> Callable[..., list[str]]:
    """Gives the warnings so far: those of this package, or of the logger that is named. Once-only ones count anew."""
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # it keeps them to itself otherwise

    def seen(of: str = "hf_poss") -> list[str]:
        records = (record for record in caplog.records if record.levelno == logging.WARNING)
        return [record.getMessage() for record in records if record.name.startswith(of)]

    return seen


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the Hub on this machine, which this process takes for the Hub."""
    from hub_stand_in import hub_stand_in

    with hub_stand_in() as hub:
        hub.serve(monkeypatch)
        yield hub


@pytest.fixture
def revisions_asked(monkeypatch) -> dict[type, set[str | None]]:
    """Watches, by Auto class, which revisions are loaded."""
    asked: dict[type, set[str | None]] = {}
    for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def spy(name, *args, loader=loader, load=loader.from_pretrained, revision=None, **kwargs):
            asked.setdefault(loader, set()).add(revision)
            return load(name, *args, revision=revision, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    return asked
