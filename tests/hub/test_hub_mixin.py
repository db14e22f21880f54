"""What a trainer does about the Hub: never lose a run, publish what belongs there."""

import socket

import pytest
import torch
from conftest import make_poss, make_target
from hub_stand_in import READ_TOKEN, WRITE_TOKEN
from huggingface_hub import ModelCard, constants
from transformers import Trainer, TrainingArguments

from hf_poss import PosSModel
from hf_poss.hub.push import PushError
from hf_poss.hub.record import TrainingRecord
from hf_poss.hub.trainer import HubMixin


class TinyTrainer(HubMixin, Trainer):
    """Its loss pulls the weights of `fc` towards zero; the Hub is what is tested."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.fc.weight.square().mean()

    def training_record(self):
        return TrainingRecord(base_model="me/target", hyperparameters={"steps": self.state.global_step})


@pytest.fixture
def trainer(tmp_path):
    def make(push_to_hub=True, token=WRITE_TOKEN, **kwargs):
        arguments = TrainingArguments(
            str(tmp_path / "PosS2-tiny"),
            push_to_hub=push_to_hub,
            hub_token=token,
            use_cpu=True,
            max_steps=4,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **{"save_steps": 2, **kwargs},
        )
        data = [{"x": torch.zeros(1)} for _ in range(4)]
        return TinyTrainer(make_poss(make_target(), num_draft_positions=2), arguments, train_dataset=data)

    return make


def test_the_run_ends_on_the_hub(hub, trainer):
    runner = trainer(save_strategy="no")
    runner.train()
    assert runner.push_to_hub(license="mit") == f"{hub.endpoint}/me/PosS2-tiny"
    files = hub.repos["me/PosS2-tiny"].files()
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "training_record.json"} <= set(
        files
    )
    assert not {"training_args.bin", "trainer_state.json"} & set(files)
    card = ModelCard(files["README.md"].content.decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("hf_poss", "me/target", "mit")
    assert "| Steps | 4 |" in card.text and "generated_from_trainer" not in card.content


def test_saving_pushes_as_in_the_base_class(hub, trainer):
    runner = trainer(save_strategy="no")
    runner.save_model()
    assert hub.repos["me/PosS2-tiny"].messages == ["Model save"]


def test_checkpoints_are_pushed_while_training_goes_on(hub, trainer, tmp_path):
    runner = trainer(hub_always_push=True)
    runner.train()
    runner.push_in_progress.wait_until_done()
    repo = hub.repos["me/PosS2-tiny"]
    assert repo.messages == ["Training in progress, step 2", "Training in progress, step 4"]
    assert not [path for path in repo.files() if "checkpoint-" in path]
    assert "modeling_poss.py" in repo.files() and "custom_generate/generate.py" in repo.files()
    first, second = (commit["model.safetensors"].oid for commit in list(repo.commits.values())[1:])
    assert first != second


def test_whole_checkpoints_go_along_if_asked(hub, trainer):
    runner = trainer(hub_strategy="checkpoint", save_steps=4)
    runner.train()
    runner.push_in_progress.wait_until_done()
    files = hub.repos["me/PosS2-tiny"].files()
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json", "README.md"} <= set(files)


def test_only_the_end_is_pushed_if_asked(hub, trainer):
    runner = trainer(hub_strategy="end")
    runner.train()
    assert "me/PosS2-tiny" in hub.repos and hub.committed == []
    assert runner.push_to_hub(blocking=False).result(60) == f"{hub.endpoint}/me/PosS2-tiny"
    assert len(hub.committed) == 1


def test_without_a_network_nothing_is_lost(trainer, monkeypatch, tmp_path, warnings_seen):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    runner = trainer(hub_model_id="me/mine")
    assert "Training goes on without the Hub" in warnings_seen()[0]
    runner.train()
    assert runner.push_to_hub() is None
    folder = tmp_path / "PosS2-tiny"
    assert f"hf-poss push {folder} me/mine" in warnings_seen()[-1]
    assert ModelCard.load(folder / "README.md").data.base_model == "me/target"
    saved = PosSModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in runner.model.state_dict().items())


@pytest.mark.parametrize(("token", "status"), [("hf_unknown", 401), (READ_TOKEN, 403)])
def test_a_refusal_is_told_before_the_first_step(hub, trainer, token, status):
    with pytest.raises(PushError) as refusal:
        trainer(token=token)
    assert refusal.value.status == status


def test_pushing_needs_no_flag(hub, trainer):
    runner = trainer(push_to_hub=False, save_strategy="no")
    assert runner.push_to_hub() == f"{hub.endpoint}/me/PosS2-tiny"


def test_a_card_without_a_push(trainer, tmp_path):
    runner = trainer(push_to_hub=False, save_strategy="no")
    runner.save_model()
    runner.create_model_card(language="en", dataset_tags="me/chats", finetuned_from="me/other")
    data = ModelCard.load(tmp_path / "PosS2-tiny" / "README.md").data
    assert (data.language, data.datasets, data.base_model) == (["en"], ["me/chats"], "me/other")


def test_an_adapter_ends_its_run_in_peace(hub, trainer, tmp_path, warnings_seen):
    """PEFT saves the adapter alone, which is no folder of specialists."""
    peft = pytest.importorskip("peft")
    runner = trainer(save_strategy="no", hub_strategy="end")
    runner.model = peft.get_peft_model(runner.model, peft.LoraConfig(target_modules=["fc"]))
    assert runner.push_to_hub() is None
    assert (tmp_path / "PosS2-tiny" / "adapter_model.safetensors").is_file()
    assert "PEFT adapter" in warnings_seen()[-1] and "hf-poss push" not in warnings_seen()[-1]
    (tmp_path / "PosS2-tiny" / "README.md").unlink()
    runner.create_model_card()
    assert "No model card was written" in warnings_seen()[-1]


def test_a_checkpoint_without_weights_does_not_end_training(hub, trainer, monkeypatch, warnings_seen):
    runner = trainer()
    # What FSDP leaves with sharded weights.
    monkeypatch.setattr(runner, "_save", lambda folder, **kwargs: runner.model.config.save_pretrained(folder))
    runner.train()
    assert runner.state.global_step == 4
    assert len([warning for warning in warnings_seen() if "not pushed while training goes on" in warning]) == 1
