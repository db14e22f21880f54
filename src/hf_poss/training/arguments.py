"""Training arguments whose defaults are those of the public PosS code."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


__all__ = ["PosSTrainingArguments"]


@dataclass
class PosSTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings of the paper's training (PosS; the script in
    its repository), which started from an EAGLE layer and ran on 4 devices with 2 samples each, in bfloat16.

    The learning rate is meant for that start; specialists that start from random weights need a higher one.

    Args below are added to the base class or have another default.
    """

    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate (PosS, training script)."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta (PosS and EAGLE, scripts)."})
    warmup_steps: float = field(
        default=0.01,
        metadata={"help": "Share (below 1) or number of steps of linear warm-up (PosS, script: a hundredth)."},
    )
    num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs (PosS)."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip at; 0 for none."})
    max_grad_value: float | None = field(
        default=0.5, metadata={"help": "Clips every gradient entry at this value (PosS and EAGLE, scripts)."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Key of the labels in a batch."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads more than `forward`."})

    max_length: int = field(default=2048, metadata={"help": "Tokens a sample, cut off beyond (PosS, script)."})
    packing: bool = field(
        default=False, metadata={"help": "Joins texts and cuts them into samples of `max_length` tokens."}
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the text."})

    feature_loss_weight: float = field(default=1.0, metadata={"help": "Weight of smooth L1 on features (PosS)."})
    token_loss_weight: float = field(
        default=0.1, metadata={"help": "Weight of soft cross-entropy against the target's distribution (PosS)."}
    )
    topk_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the top-k part of it (PosS: its script passes 0; HASS: 1)."}
    )
    loss_top_k: int = field(default=10, metadata={"help": "k of the top-k loss (HASS)."})
    feature_noise: float = field(
        default=0.2,
        metadata={"help": "Width of the uniform noise on input features, scaled by 512 / length (EAGLE)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; predicting a feature needs 2 tokens or more.")
        for name in ("feature_loss_weight", "token_loss_weight", "topk_loss_weight", "feature_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 0 or more.")
        if not self.feature_loss_weight + self.token_loss_weight + self.topk_loss_weight > 0:
            raise ValueError("All loss weights are 0; give one of feature, token and top-k loss a weight.")
