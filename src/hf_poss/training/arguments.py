"""Training arguments whose defaults are those of the public PosS code, the loss apart."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..losses import parse_losses


__all__ = ["PosSTrainingArguments"]

# Of the base class, with why it would do nothing here or harm.
_WITHOUT_MEANING = {
    "label_smoothing_factor": "specialists learn the target's distribution; see `losses`",
    "neftune_noise_alpha": "embeddings are the target's; `feature_noise` is the noise of EAGLE",
    "use_liger_kernel": "it has no kernels for specialists, whose losses are chunked as it is",
}


@dataclass
class PosSTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings of the paper's training (PosS; the script in
    its repository), which started from an EAGLE layer and ran on 4 devices with 2 samples each, in bfloat16. The loss
    is another one: that on tokens alone, by which specialists accept more (docs/study.md, section 4).

    The learning rate is meant for that start; specialists that start from random weights need a higher one.

    Args below are added to the base class or have another default. Losses are by name and weight, see
    [`parse_losses`]; those of the literature are

    - `token=1.0`: EAGLE-3, which dropped the loss on features; the default;
    - `feature=1.0,token=0.1`: EAGLE and PosS;
    - `feature=1.0,token=0.1,topk=1.0`: HASS, with `loss_top_k=10`;
    - `acceptance=1.0`, or `kl=1.0,acceptance=1.0`: a direct loss on what sampled drafts are accepted by.

    Raises:
        ValueError: for an unknown loss and for values that no training could use, before anything is loaded.
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
        default=0.5,
        metadata={"help": "Clips every gradient entry at this value (PosS and EAGLE, scripts); 0 for none."},
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Key of the labels in a batch."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads more than `forward`."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hides losses that are not finite from the log; here they stop the run."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter takes part in every step, so DDP need not search."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Buffers do not change, so DDP need not send them in every forward."}
    )

    max_length: int = field(default=2048, metadata={"help": "Tokens a sample, cut off beyond (PosS, script)."})
    packing: bool = field(
        default=False,
        metadata={"help": "Fills samples of `max_length` tokens with several texts, which do not see each other."},
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds plain text."})

    losses: dict[str, float] | str | None = field(
        default="token=1.0",
        metadata={
            "help": "Losses by name with weights, `name=weight,...` or JSON; names: feature, token, topk, kl, "
            "acceptance. EAGLE-3: token=1.0; PosS: feature=1.0,token=0.1; HASS: feature=1.0,token=0.1,topk=1.0."
        },
    )
    loss_top_k: int = field(default=10, metadata={"help": "k of the top-k loss (HASS)."})
    loss_decay: float = field(
        default=1.0,
        metadata={
            "help": "Draft position k counts loss_decay**(k-1). 1 sums positions equally (PosS); EAGLE-3's training "
            "script takes 0.8."
        },
    )
    position_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each draft position, beside `loss_decay` (PosS: all 1)."}
    )
    feature_noise: float = field(
        default=0.2,
        metadata={"help": "Width of the uniform noise on input features, scaled by 512 / length (EAGLE); 0 for none."},
    )

    eval_generate_prompts: int = field(
        default=4,
        metadata={"help": "Evaluation samples from whose beginning `generate` goes on, for the true tau; 0 for none."},
    )
    eval_generate_tokens: int = field(default=64, metadata={"help": "New tokens of each of them."})
    ignore_estimate: bool = field(
        default=False, metadata={"help": "Starts even if memory or disk look too small for the run."}
    )

    def __post_init__(self):
        self.losses = parse_losses(self.losses)
        if self.accelerator_config is None:
            # Every process reads a streamed dataset itself: the alternative joins batches that differ in length.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        for name, reason in _WITHOUT_MEANING.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` has no meaning here: {reason}. Leave it out.")
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs` asks for `use_reentrant`, and such a checkpoint loses the gradients "
                "of specialists, whose inputs have none. Leave it out, or set it to false."
            )
        if self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; predicting a feature needs 2 tokens or more.")
        for name in ("loss_decay", "feature_noise", "eval_generate_prompts"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value}; expected 0 or more.")
        for name in ("loss_top_k", "eval_generate_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 1 or more.")
        weights = self.position_weights
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(f"`position_weights` are {weights}; expected 0 or more for each, and one above 0.")

    def weights_of_positions(self, num_draft_positions: int) -> list[float] | None:
        """Weight of each draft position: `position_weights` times `loss_decay` ** (k - 1); None if all are 1.

        Raises:
            ValueError: if `position_weights` are not as many as there are positions.
        """
        weights = [1.0] * num_draft_positions if self.position_weights is None else self.position_weights
        if len(weights) != num_draft_positions:
            raise ValueError(
                f"`position_weights` has {len(weights)} entries; expected one for each of the "
                f"{num_draft_positions} draft positions."
            )
        if self.position_weights is None and self.loss_decay == 1.0:
            return None
        return [weight * self.loss_decay**k for k, weight in enumerate(weights)]
