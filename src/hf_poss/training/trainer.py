"""The recursive training of position specialists, as a Trainer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..modeling_poss import PosSModel
from .arguments import PosSTrainingArguments
from .data import PosSDataCollator, tokenize_texts
from .features import target_features
from .metrics import position_metrics


__all__ = ["PosSTrainer"]


class PosSTrainer(Trainer):
    """[`~transformers.Trainer`] for a [`PosSModel`]: a frozen target gives features, the specialists learn to go on.

    Each step runs the target once without gradient, then the roll-out over all draft positions, with one backward
    pass over the sum of their losses. Evaluation logs `eval_accuracy_k`, `eval_pos_acc_k` and `eval_tau`, see
    [`position_metrics`].

    Args:
        model: the specialists; attached to `target` here.
        target: the language model to draft for. It is put in evaluation mode and its parameters no longer ask for
            gradients.
        args: training arguments.
        train_dataset, eval_dataset: text (see [`tokenize_texts`]), or samples with `input_ids` and optional `labels`.
        processing_class: the target's tokenizer; needed for text.
        data_collator: [`PosSDataCollator`] by default.
        kwargs: as in the base class.

    Raises:
        ValueError: if the specialists do not fit the target, or a dataset holds nothing to learn.

    Example:

    ```python
    >>> poss = PosSModel.from_target(target, positions_per_specialist=2, num_draft_positions=6)
    >>> args = PosSTrainingArguments("PosS2-My-Model", learning_rate=1e-3, bf16=True)
    >>> PosSTrainer(poss, target, args, train_dataset=dataset, processing_class=tokenizer).train()
    ```"""

    args: PosSTrainingArguments

    def __init__(
        self,
        model: PosSModel,
        target: PreTrainedModel,
        args: PosSTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        args = PosSTrainingArguments("poss_output") if args is None else args
        model.attach(target)
        pad_token_id = model.config.pad_token_id if processing_class is None else processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PosSDataCollator(pad_token_id or 0),
            train_dataset=self._prepare(train_dataset, processing_class, args),
            eval_dataset=self._prepare(eval_dataset, processing_class, args),
            processing_class=processing_class,
            compute_metrics=kwargs.pop("compute_metrics", position_metrics),
            **kwargs,
        )
        self.target = target.eval().requires_grad_(False)
        if args.place_model_on_device and not hasattr(target, "hf_device_map"):
            target.to(args.device)
        # `compute_loss` divides by `num_items_in_batch`, so accumulated steps add up to the loss of one large batch.
        self.model_accepts_loss_kwargs = True
        if args.max_grad_value is not None:
            self.add_callback(_ClipGradientValues(self, args.max_grad_value))

    @staticmethod
    def _prepare(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: PosSTrainingArguments) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: PosSTrainer._prepare(part, tokenizer, args) for name, part in dataset.items()}
        if tokenizer is None:
            sample = next(iter(dataset), None)
            if isinstance(sample, str) or (isinstance(sample, dict) and "input_ids" not in sample):
                raise ValueError("The dataset holds text. Pass the target's tokenizer as `processing_class`.")
            return dataset
        return tokenize_texts(dataset, tokenizer, args.max_length, args.packing, args.dataset_text_field)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of the roll-out, summed over rows and divided by `num_items_in_batch` (this batch's rows if None)."""
        features = target_features(self.target, inputs["input_ids"], inputs.get("attention_mask"))
        outputs = model(
            **inputs,
            features=self._add_noise(features) if model.training else features,
            target_features=features,
            num_items_in_batch=num_items_in_batch,
            feature_loss_weight=self.args.feature_loss_weight,
            token_loss_weight=self.args.token_loss_weight,
            topk_loss_weight=self.args.topk_loss_weight,
            loss_top_k=self.args.loss_top_k,
        )
        loss = outputs.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is of all processes, and gradients are averaged over them.
            loss = loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return (loss, outputs) if return_outputs else loss

    def _add_noise(self, features: torch.Tensor) -> torch.Tensor:
        """Uniform noise of width `feature_noise` * 512 / length around the features (EAGLE)."""
        if not self.args.feature_noise:
            return features
        return features + (torch.rand_like(features) - 0.5) * self.args.feature_noise * 512 / features.shape[1]


class _ClipGradientValues(TrainerCallback):
    def __init__(self, trainer: Trainer, limit: float):
        self.trainer = trainer
        self.limit = limit

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.accelerator.clip_grad_value_(self.trainer.model.parameters(), self.limit)
