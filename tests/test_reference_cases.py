"""Parity with the public reference algorithm, on cases of random weights with the outputs it gave.

`HF_POSS_REFERENCE_CASES` names a folder of cases; without it the copies beside this file are read.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_poss import PosSCandidateGenerator, PosSModel
from hf_poss.candidate_generator import DraftSettings
from hf_poss.losses import roll_out_losses
from hf_poss.modeling_poss import TargetReference


CASES_FOLDER = Path(os.environ.get("HF_POSS_REFERENCE_CASES") or Path(__file__).parent / "data" / "reference")
CASES = sorted(meta.parent for meta in CASES_FOLDER.glob("*/meta.json"))
TOLERANCE = 1e-4


class Case:
    """A reference case, with the specialists loaded from its checkpoint."""

    def __init__(self, folder: Path):
        self.meta = json.loads((folder / "meta.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")
        self.embedding = load_file(folder / "model.safetensors")["embed_tokens.weight"].float()
        self.head = self.expected["lm_head.weight"].float()
        self.poss = PosSModel.from_pretrained(
            folder,
            positions_per_specialist=self.meta["positions_per_specialist"],
            num_draft_positions=self.meta["num_draft_positions"],
            dtype=torch.float32,
        ).eval()

    def roll_out(self) -> tuple[torch.Tensor, ...]:
        head = nn.Linear(self.head.shape[1], self.head.shape[0], bias=False)
        head.weight.data = self.head
        self.poss.reference = TargetReference(nn.Embedding.from_pretrained(self.embedding), head, self.poss.config)
        with torch.no_grad():
            return self.poss.roll_out(self.expected["train.hidden_states"], self.expected["train.input_ids_shifted"])

    def target(self) -> LlamaForCausalLM:
        """A target with the case's embedding and head; its layers are never run."""
        vocab_size, hidden_size = self.head.shape
        target = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                pad_token_id=None,
                tie_word_embeddings=False,
            )
        )
        target.get_input_embeddings().weight.data = self.embedding
        target.get_output_embeddings().weight.data = self.head
        return target.eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda folder: folder.name)
def case(request) -> Case:
    return Case(request.param)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def leaf_paths(parents: list[int]) -> set[tuple[int, ...]]:
    """Every way from the root to a node that is nobody's parent."""
    paths = set()
    for leaf in set(range(len(parents))) - set(parents[1:]):
        path = [leaf]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        paths.add(tuple(path))
    return paths


def test_there_are_cases():
    assert CASES, f"no folder with a meta.json in {CASES_FOLDER}"


def test_training_predictions_agree(case):
    predictions = case.roll_out()

    assert len(predictions) == case.meta["num_draft_positions"]
    for position, predicted in enumerate(predictions):
        assert relative_error(predicted, case.expected[f"train.predict.{position}"]) < TOLERANCE, position


def test_losses_agree(case):
    predictions, mask = case.roll_out(), case.expected["train.loss_mask"].float()
    names = ("feature", "token", "topk")

    found = roll_out_losses(
        predictions,
        case.expected["train.target_hidden_states"],
        mask.bool(),
        case.poss.draft_head(case.poss.reference),
        dict.fromkeys(names, 1.0),
        [1.0] * len(predictions),
        case.meta["topk_loss_k"],
    )
    losses = found.sums.sum(0).T / (mask.sum() + 1e-5)  # [positions, losses]

    torch.testing.assert_close(losses, case.expected["train.losses_smoothl1_ce_topk"], rtol=TOLERANCE, atol=0.0)


def test_every_draft_round_agrees(case):
    """Rounds share the caches, so a later one also shows that a round leaves nothing behind."""
    meta, expected = case.meta, case.expected
    drafter = PosSCandidateGenerator(
        expected["draft.prompt_ids"], case.poss, GenerationConfig(max_length=10_000), {}, case.target()
    )
    settings = DraftSettings(meta["draft_passes"], meta["top_k"], meta["total_tokens"])

    for index in range(meta["rounds"]):
        wanted = {name: expected[f"draft.{index}.{name}"] for name in ("features", "input_ids", "draft_tokens")}
        with torch.no_grad():
            next_tokens = wanted["input_ids"][:, -wanted["features"].shape[1] :]
            drafter.extend_context(wanted["features"], next_tokens)
            tree = drafter.draft(wanted["input_ids"][:, -1], settings)

        assert tree.tokens.tolist() == wanted["draft_tokens"].tolist(), index
        assert tree.depths[0].tolist() == expected[f"draft.{index}.tree_position_ids"].tolist(), index
        assert torch.equal(tree.ancestors[:, None], expected[f"draft.{index}.tree_mask"].bool()), index
        retrieved = {
            tuple(node for node in path if node >= 0) for path in expected[f"draft.{index}.retrieve_indices"].tolist()
        }
        assert leaf_paths(tree.parents[0].tolist()) == retrieved, index
