"""The recursive training of position specialists, as a Trainer."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from transformers.utils import logging

from ..compatibility import check_trainer, commit_of, tensor_parallel_group, train_on_one_device
from ..hub.provenance import command_line, describe_hardware, package_versions
from ..hub.record import TrainingRecord
from ..hub.trainer import HubMixin
from ..limits import learned_positions
from ..modeling_poss import PosSConfig, PosSModel, PosSOutput, poss_of
from ..peft_models import without_peft
from ..statistics import GenerationStatistics
from .arguments import PosSTrainingArguments
from .callbacks import ClipGradientValues, Opening, TrainingChecks, gradients_are_finite, use_consoles
from .checkpointing import CheckpointMixin
from .checks import check_samples
from .collator import PosSDataCollator
from .data import prepare_dataset
from .drafting import (
    draft_from,
    evaluation_prompts,
    is_in_pieces,
    longest_prompt,
    obstacle_to_drafting,
    preserved_random_state,
    whole_weights,
)
from .estimate import TrainingEstimate
from .features import target_features
from .lengths import sample_lengths
from .metrics import PositionSums, boundary_drops, evaluation_metrics, metrics_of_sums, summed_predictions
from .nonfinite import WatchedBatch, describe_features, describe_step, rows_not_finite
from .preflight import check_launch
from .resume import checkpoint_to_resume
from .sampling import RepeatedStream, SetSamplerEpoch
from .tensor_parallel import shared_features, whole_reference
from .token_counts import token_counts


__all__ = ["PosSTrainer"]

logger = logging.get_logger(__name__)

check_trainer(Trainer)


class PosSTrainer(CheckpointMixin, HubMixin, Trainer):
    """[`~transformers.Trainer`] for a [`PosSModel`]: a frozen target gives features, the specialists learn to go on.

    Each step runs the target once without gradient (not at all if samples hold features), then the roll-out over all
    draft positions, with one backward pass over the sum of their losses. Beside the loss it logs, by draft position k,
    `loss_{name}_k`, `accuracy_k`, `pos_acc_k` and the `tau` that follows (see [`position_metrics`]), over all samples
    since the last log, and in evaluations the same with `eval_`. Every evaluation also drafts for real:
    `eval_generate_tau` and `eval_generate_pos_acc_k` are those of `generate` on a few prompts. Before the first step
    the console shows an estimate of memory, disk and tokens.

    Args:
        model: the specialists, or a `PeftModel` around them; attached to `target` here.
        target: the language model to draft for, or a `PeftModel` around it, whose active adapters then count. It is
            put in evaluation mode and its parameters no longer ask for gradients.
        args: training arguments.
        train_dataset, eval_dataset: conversations or text (see [`prepare_dataset`]), prepared samples, or a
            [`FeatureDataset`].
        processing_class: the target's tokenizer; needed for text.
        data_collator: [`PosSDataCollator`] by default.
        kwargs: as in the base class.

    Raises:
        ValueError: if the specialists do not fit the target, a dataset holds nothing to learn, or arguments do not fit
            the specialists. In training: if memory or disk cannot suffice, or a loss or gradient is not finite.

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
        if not isinstance(args, PosSTrainingArguments):
            raise ValueError(f"`args` are {type(args).__name__}; expected PosSTrainingArguments, which take the same.")
        check_launch(args)
        poss, target = poss_of(model), without_peft(target)
        if poss is None:
            raise ValueError(f"`model` is a {type(model).__name__}; expected a PosSModel, or a PeftModel around one.")
        poss.attach(target)
        # The processes that share a tensor-parallel target, in which each trains on rows of its own.
        self.target_group = tensor_parallel_group(target) if args.world_size > 1 else None
        if self.target_group is not None:
            config = poss.config
            poss.reference = whole_reference(poss.reference, self.target_group, config.vocab_size, config.hidden_size)
        self.poss = poss
        self.target = target.eval().requires_grad_(False)
        self.position_weights = args.weights_of_positions(poss.config.num_draft_positions)
        self.provenance: dict[str, Any] = {}
        self.estimate: TrainingEstimate | None = None
        self._sums = PositionSums()
        self._watched: list[WatchedBatch] = []
        self._evaluated_dataset: Any = None
        train_on_one_device(args)
        with args.main_process_first(desc="preparing the data"):
            positions = learned_positions(target.config)
            train_dataset, eval_dataset = (
                _prepare(dataset, processing_class, args, poss.config, positions)
                for dataset in (train_dataset, eval_dataset)
            )
        pad_token_id = poss.config.pad_token_id if processing_class is None else processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PosSDataCollator(pad_token_id or 0),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=kwargs.pop("compute_metrics", evaluation_metrics(args.losses, self.position_weights)),
            **kwargs,
        )
        # `compute_loss` divides by `num_items_in_batch`, so accumulated steps add up to the loss of one large batch.
        self.model_accepts_loss_kwargs = True
        self._place_target()
        if train_dataset is not None and poss.config.draft_vocab_size is not None and poss.draft_vocabulary[0] < 0:
            poss.set_draft_vocabulary(token_counts(_tokens_of(train_dataset), poss.config.vocab_size))
            if model is not poss:
                logger.warning(
                    "The draft vocabulary was counted from the training data, and checkpoints of an adapter do not "
                    "hold it. Save the specialists merged (`merge_and_unload()`), or set it again when the adapter is "
                    "loaded (`poss.set_draft_vocabulary(counts)`)."
                )
        if train_dataset is not None and not has_length(train_dataset):
            self.train_dataset = RepeatedStream(train_dataset)
        self.add_callback(SetSamplerEpoch(self))
        self.add_callback(TrainingChecks(self._check_estimate, self._check_step))
        if args.max_grad_value:
            self.add_callback(ClipGradientValues(self, args.max_grad_value))
        self.add_callback(Opening(lambda: str(self.estimate)))
        use_consoles(self)

    def _place_target(self) -> None:
        """Puts the target on this process's device, unless whoever loaded it spread or packed it."""
        packed = getattr(self.target, "is_loaded_in_4bit", False) or getattr(self.target, "is_loaded_in_8bit", False)
        spread = getattr(self.target, "hf_device_map", None) or is_in_pieces(self.target)
        if not (packed or spread or self.target_group is not None):
            self.target.to(self.args.device)

    # ---- Steps ----

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """As in the base class; True resumes from the newest checkpoint that is whole.

        Raises:
            ValueError: if there is none, the one that was named is broken or of other specialists, memory or disk
                cannot suffice, or a loss or gradient is not finite.
        """
        self._sums, self._watched = PositionSums(), []  # an earlier call may have left some
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, self.poss.config)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PosSOutput]:
        """Loss of the roll-out, summed over rows and divided by `num_items_in_batch` (this batch's rows if None)."""
        inputs = dict(inputs)
        features, last = self._features(inputs)
        bad_rows = rows_not_finite(features) | rows_not_finite(last).to(features.device)
        if bad_rows.any():
            when, dtype = self._when(model.training), self.target.dtype
            raise ValueError(describe_features(when, inputs["input_ids"], bad_rows, dtype, self.processing_class))
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        outputs = model(
            **inputs,
            features=self._add_noise(features) if model.training else features,
            target_features=last,
            num_items_in_batch=num_items_in_batch,
            losses=self.args.losses,
            position_weights=self.position_weights,
            loss_top_k=self.args.loss_top_k,
        )
        self._watch(inputs["input_ids"], outputs, model.training)
        loss = outputs.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is of all processes, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _features(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the features out of a batch that holds them; runs the target for one that does not."""
        features, last = inputs.pop("features", None), inputs.pop("target_features", None)
        if features is None:
            names = ("input_ids", "attention_mask", "segment_ids", "position_ids")
            passed = {name: inputs[name] for name in names if name in inputs}
            passed["feature_layers"] = self.poss.config.feature_layers
            if self.target_group is not None:
                return shared_features(self.target, self.target_group, **passed)
            return target_features(self.target, **passed)
        return features, features if last is None else last

    def _add_noise(self, features: torch.Tensor) -> torch.Tensor:
        """Uniform noise of width `feature_noise` * 512 / length around the features (EAGLE)."""
        if not self.args.feature_noise:
            return features
        return features + (torch.rand_like(features) - 0.5) * self.args.feature_noise * 512 / features.shape[1]

    # ---- Watching ----

    def _when(self, training: bool) -> str:
        return f"Step {self.state.global_step + 1}" if training else "Evaluation"

    def _watch(self, input_ids: torch.Tensor, outputs: PosSOutput, training: bool) -> None:
        """Adds a batch to the sums of the next log, and keeps what tells whether its step is sound."""
        batch = WatchedBatch(input_ids, outputs.loss.detach(), outputs.loss_sums)
        if training:
            self._sums.add(outputs.loss_sums, outputs.counts)
            self._watched.append(batch)
        elif not torch.isfinite(batch.loss):
            raise ValueError(describe_step(self._when(False), [batch], list(self.args.losses), self.processing_class))

    def _check_step(self) -> None:
        watched, self._watched = self._watched, []
        sound = [torch.isfinite(batch.loss) for batch in watched]
        # With a loss scaler, gradients that overflow are its business: it skips the step and scales less. Below 1 it
        # is not the scale that makes them overflow.
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            sound.append(gradients_are_finite(self.model.parameters()).to(self.args.device))
        if not torch.stack(sound).all():
            raise ValueError(describe_step(self._when(True), watched, list(self.args.losses), self.processing_class))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base class; a log of training steps gets the metrics by draft position since the one before."""
        if "loss" in logs and (sums := self._sums.take(self._add_up)) is not None:
            logs |= metrics_of_sums(*sums, list(self.args.losses))
        super().log(logs, start_time)

    def _add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in the base class."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated_dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in the base class; then drafts for real from the beginnings of some samples.

        Neither the random numbers of the run nor the mode of the model change.
        """
        dataset, self._evaluated_dataset = self._evaluated_dataset, None
        training = self.poss.training
        with preserved_random_state(self.args.device):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            self._warn_of_drops(output)
            if dataset is not None and self.args.eval_generate_prompts and not prediction_loss_only:
                metrics = self._draft(dataset)
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.model.train(training)
        return output

    def _warn_of_drops(self, output: EvalLoopOutput) -> None:
        if output.predictions is None or not self.is_world_process_zero():
            return
        _, counts = summed_predictions(output.predictions)
        for drop in boundary_drops(counts, self.poss.config.positions_per_specialist):
            logger.warning(str(drop))

    def _draft(self, dataset: Any) -> dict[str, float]:
        """`generate_tau` and `generate_pos_acc_k` of `generate` on the beginnings of samples, by all processes."""
        if (obstacle := obstacle_to_drafting(self.model)) is not None:
            logger.warning_once(f"Evaluation does not draft for real: {obstacle}.")
            return {}
        longest = longest_prompt(self.target.config, self.args.eval_generate_tokens)
        prompts = evaluation_prompts(_tokens_of(dataset), self.args.eval_generate_prompts, longest)
        if not is_in_pieces(self.target) and self.target_group is None:  # else all processes write the same text
            prompts = prompts[self.args.process_index :: self.args.world_size]
        with whole_weights(self.model):
            statistics = draft_from(
                self.target,
                self.poss.eval(),
                prompts,
                max_new_tokens=self.args.eval_generate_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                pad_token_id=getattr(self.data_collator, "pad_token_id", 0),
            )
        return self._summed_over_processes(statistics)

    def _summed_over_processes(self, statistics: GenerationStatistics) -> dict[str, float]:
        depth = self.poss.generation_config.num_assistant_tokens or self.poss.config.num_draft_positions
        by_position = [(counts + [0] * depth)[:depth] for counts in (statistics.reached, statistics.accepted)]
        numbers = torch.tensor([statistics.tokens, statistics.rounds, *by_position[0], *by_position[1]])
        tokens, rounds, *counts = self._add_up(numbers.to(self.args.device)).tolist()
        metrics = {"generate_tau": tokens / rounds} if rounds else {}
        for k, (reached, accepted) in enumerate(zip(counts[:depth], counts[depth:], strict=True), start=1):
            if reached:
                metrics[f"generate_pos_acc_{k}"] = accepted / reached
        return metrics

    # ---- What is said and kept of a run ----

    @cached_property
    def _lengths(self) -> list[int] | None:
        return sample_lengths(self.train_dataset)

    def _check_estimate(self) -> None:
        lengths = self._lengths
        in_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.estimate = TrainingEstimate.of(
            self.model,
            self.poss.config,
            self.target,
            self.args,
            steps=self.state.max_steps,
            steps_per_epoch=None if lengths is None else math.ceil(len(lengths) / in_a_step),
            tokens_per_epoch=None if lengths is None else sum(lengths),
            longest=None if lengths is None else max(lengths),
        )
        # DeepSpeed deals gradients and states out to the processes in ways of its own.
        if not (self.args.ignore_estimate or self.is_deepspeed_enabled):
            self.estimate.check()

    def training_record(self) -> TrainingRecord:
        """What is known of the run so far, for its model card. `provenance` holds what only the caller knows: the
        names of the data, what the specialists started from, a license..."""
        args, config, state = self.args, self.poss.config, self.state
        evaluation = next((log for log in reversed(state.log_history) if "eval_tau" in log), {})
        drafted = [value for name, value in evaluation.items() if name.startswith("eval_generate_pos_acc_")]
        lengths = self._lengths if self.train_dataset is not None else None
        fields = {
            "base_model": config.target_name_or_path,
            "base_model_revision": commit_of(self.target.config),
            "samples": None if lengths is None else len(lengths),
            "tokens": None if lengths is None else sum(lengths),
            "losses": args.losses,
            "num_draft_positions": config.num_draft_positions,
            "positions_per_specialist": config.positions_per_specialist,
            "feature_layers": config.feature_layers,
            "draft_vocab_size": config.draft_vocab_size,
            "specialist_adapter": config.specialist_adapter,
            "hyperparameters": self._hyperparameters(),
            "metrics": {name: value for name, value in evaluation.items() if name.startswith("eval_")},
            "eval_samples": len(self.eval_dataset) if evaluation and has_length(self.eval_dataset) else None,
            "generate_tau": evaluation.get("eval_generate_tau"),
            "generate_pos_acc": drafted,
            "hardware": describe_hardware(),
            "versions": package_versions(),
            "command": command_line(),
            "seconds": sum(log.get("train_runtime", 0.0) for log in state.log_history) or None,
        }
        if drafted:
            fields["generate_prompts"] = args.eval_generate_prompts
            fields["generate_settings"] = {"max_new_tokens": args.eval_generate_tokens, "do_sample": False}
        return TrainingRecord(**{**fields, **self.provenance})

    def _hyperparameters(self) -> dict[str, Any]:
        args = self.args
        settings = {
            "steps": self.state.global_step,
            "epochs": None if self.state.epoch is None else round(self.state.epoch, 2),
            "batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warm-up": args.warmup_steps,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "betas": f"{args.adam_beta1}, {args.adam_beta2}",
            "weight decay": args.weight_decay or None,
            "gradient clipping (value)": args.max_grad_value or None,
            "gradient clipping (norm)": args.max_grad_norm or None,
            "max_length": args.max_length,
            "packing": args.packing or None,
            "feature noise": args.feature_noise or None,
            "position weights": self.position_weights,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else str(self.poss.dtype).removeprefix("torch."),
            "processes": args.world_size,
            "seed": args.seed,
        }
        return {name: value for name, value in settings.items() if value is not None}


def _prepare(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: PosSTrainingArguments,
    config: PosSConfig,
    positions: int | None,
) -> Any:
    """Samples of a dataset, checked against the specialists; of each one if there are several by name."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _prepare(part, tokenizer, args, config, positions) for name, part in dataset.items()}
    if hasattr(dataset, "without_features"):
        dataset.check(config)
    elif tokenizer is not None:
        dataset = prepare_dataset(dataset, tokenizer, args.max_length, args.packing, args.dataset_text_field)
    else:
        sample = next(iter(dataset), None)
        if isinstance(sample, str) or (isinstance(sample, dict) and "input_ids" not in sample):
            raise ValueError("The dataset holds text. Pass the target's tokenizer as `processing_class`.")
    check_samples(_tokens_of(dataset), config.num_draft_positions, positions)
    return dataset


def _tokens_of(dataset: Any) -> Any:
    """The samples without stored features, which are large."""
    return dataset.without_features() if hasattr(dataset, "without_features") else dataset
