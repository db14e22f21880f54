"""What a training will need, said before its first step: parameters, memory by part, tokens, disk."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from ..compatibility import SELECTS_HIDDEN_STATES
from ..configuration_poss import PosSConfig
from ..losses import CHUNK_ENTRIES
from .sizes import readable


__all__ = [
    "TrainingEstimate",
    "activation_bytes",
    "available_memory",
    "checkpoint_bytes",
    "checkpoints_kept",
    "loss_bytes",
    "optimizer_bytes",
    "parameter_bytes",
    "target_pass_bytes",
]

# float32 tensors of one chunk of the vocabulary that are alive at the same time: logits, log-softmax and its gradient
# of the drafter, probabilities of the target, and a product of two.
_LOSS_TENSORS = 5
# A folder also holds code, configs, the state of random generators and the log.
_SMALL_FILES = 510 * 2**10


def parameter_bytes(parameters: Iterable[nn.Parameter | torch.Tensor], device: torch.device | None = None) -> int:
    """Bytes of tensors; only of those on `device`, if that is given. Sharded ones count as far as they are here."""
    tensors = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters)
    return sum(t.numel() * t.element_size() for t in tensors if device is None or t.device == device)


def optimizer_bytes(parameters: Iterable[nn.Parameter], optimizer: str) -> int:
    """Bytes of an optimizer's state, by the name that `optim` has in the training arguments.

    AdamW keeps two tensors in the parameter's dtype and a float32 step count for each; in 8 bits two bytes an entry;
    Adafactor a row, a column and a scale of a matrix in float32; plain SGD nothing. Others count as AdamW.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if optimizer in ("sgd", "sgd_momentum"):
        return 0
    if optimizer == "adafactor":
        return 4 * sum(1 + (sum(p.shape[-2:]) if p.dim() > 1 else p.numel()) for p in parameters)
    if "8bit" in optimizer:
        return sum(2 * p.numel() for p in parameters)
    return 2 * parameter_bytes(parameters) + 4 * len(parameters)


def activation_bytes(config: PosSConfig, rows: int, itemsize: int = 4, checkpointed: bool = False) -> int:
    """Bytes that the roll-out keeps until backward, for a batch of `rows` rows (samples times tokens).

    Entries a row, with H hidden, Q = heads * head_dim, V = key-value heads * head_dim, I intermediate. A draft
    position keeps 5 H outside of its specialist: the input of `fc` (2 H), its output, the predicted feature and the
    gradient that the losses have for it; and inside 3 H + 2 Q + 4 I: rotated queries, what they attended to, the
    residual stream and two states of the norm, and the MLP's gate, its activation, the other branch and their product.
    Keys and values of a stream are 2 V for every specialist that reads it: those of its own positions and all before.
    With autocast (2 bytes) rotated queries and keys and the norm's input stay in float32.

    With gradient checkpointing the insides are made again, one position at a time.

    Args:
        config: of the specialists.
        rows: of the batch, padding included.
        itemsize: bytes of an entry in the dtype that is computed in.
        checkpointed: whether specialists are run again in backward.
    """
    hidden, positions, span = config.hidden_size, config.num_draft_positions, config.positions_per_specialist
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    exact = 4 - itemsize  # more bytes for what stays in float32
    inside = itemsize * (3 * hidden + 2 * query + 4 * config.intermediate_size) + exact * (query + 2 * hidden)
    outside = itemsize * 5 * hidden
    stream = itemsize * 2 * key + exact * key
    streams = sum(min(first + span, positions) for first in range(0, positions, span))  # of all specialists
    kept = positions * outside + streams * stream + (1 if checkpointed else positions) * inside
    return rows * (kept + itemsize * config.feature_size)


def loss_bytes(vocab_size: int, rows: int) -> int:
    """Bytes of the losses' float32 tensors over the vocabulary: a chunk of rows at a time."""
    chunk = min(rows, max(1, CHUNK_ENTRIES // vocab_size))
    return 4 * _LOSS_TENSORS * chunk * vocab_size


def target_pass_bytes(target: PreTrainedModel, rows: int, hidden_states: int | None = None) -> int:
    """Bytes that a pass of the frozen target needs beside its weights: hidden states that are kept, and those of one
    layer's MLP.

    Args:
        rows: of the batch.
        hidden_states: how many are kept; those of all layers if not given.
    """
    text = target.config.get_text_config()
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    width = max(width) if isinstance(width, (list, tuple)) else width
    itemsize = target.dtype.itemsize if target.dtype.is_floating_point else 2
    kept = text.num_hidden_layers + 1 if hidden_states is None else hidden_states
    return rows * itemsize * ((kept + 2) * text.hidden_size + 3 * width)


def checkpoint_bytes(model: nn.Module, optimizer: str, only_model: bool = False) -> tuple[int, int]:
    """Bytes of a checkpoint and of the final folder: weights, for a checkpoint also the optimizer's state.

    Of a PEFT model the trained weights alone are saved.
    """
    parameters = list(model.parameters())
    saved = [p for p in parameters if p.requires_grad] if hasattr(model, "peft_config") else parameters
    weights = parameter_bytes(saved) + _SMALL_FILES
    return weights + (0 if only_model else optimizer_bytes(parameters, optimizer)), weights


def checkpoints_kept(args: TrainingArguments, max_steps: int, steps_per_epoch: int | None) -> int:
    """Checkpoints that lie in the folder at the same time; a new one is written before the oldest is deleted."""
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy == "no":
        return 0
    if strategy == "epoch":
        interval = steps_per_epoch or max_steps
    else:
        interval = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * max_steps))
    written = -(-max_steps // max(1, int(interval)))
    limit = args.save_total_limit
    return written if not limit or limit < 1 else min(written, limit + 1)


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None if that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and Path("/proc/meminfo").is_file():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


@dataclass
class TrainingEstimate:
    """What a training needs on one process's device, and on disk. All sizes are bytes.

    Args:
        device: of the drafter.
        trained, parameters: numbers of the drafter's parameters that learn, and of all.
        loaded: weights that are in memory already, by part.
        needed: what training will add, by part.
        steps: optimizer steps.
        tokens_per_epoch: of the training set as it is fed, without padding; None if it cannot be told.
        checkpoint, final: sizes of a checkpoint and of the finished folder.
        checkpoints: that lie there at the same time.
        memory_free, disk_free: None if they cannot be told.
    """

    device: torch.device
    trained: int
    parameters: int
    loaded: dict[str, int]
    needed: dict[str, int]
    steps: int
    tokens_per_epoch: int | None = None
    checkpoint: int = 0
    final: int = 0
    checkpoints: int = 0
    memory_free: int | None = None
    disk_free: int | None = None

    @property
    def disk(self) -> int:
        """Bytes that the run will write and not delete."""
        return self.checkpoints * self.checkpoint + self.final

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: PosSConfig,
        target: PreTrainedModel,
        args: TrainingArguments,
        steps: int,
        steps_per_epoch: int | None = None,
        tokens_per_epoch: int | None = None,
        longest: int | None = None,
    ) -> "TrainingEstimate":
        """The estimate of a run whose models are loaded.

        Args:
            model: the drafter, perhaps wrapped by PEFT, FSDP...
            config: of the specialists.
            target: frozen, loaded.
            args: of the run.
            steps, steps_per_epoch, tokens_per_epoch: of the run.
            longest: tokens of the longest sample; `max_length` of `args` by default.
        """
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        device = next((p.device for p in parameters if p.device.type != "meta"), args.device)
        on_device = [*target.parameters(), *target.buffers()]
        optimizer = str(getattr(args.optim, "value", args.optim))
        full = parameters[0].element_size() > 2
        autocast = full and (args.bf16 or args.fp16)
        rows = args.per_device_train_batch_size * (longest or args.max_length)
        itemsize = 4 if full and not autocast else 2
        roll_out = {
            "activations": activation_bytes(config, rows, itemsize, bool(args.gradient_checkpointing)),
            "losses": loss_bytes(config.vocab_size, rows),
        }
        # The target is done before the roll-out begins.
        layers = 1 + len(config.feature_layers or ()) if SELECTS_HIDDEN_STATES else None
        runs_here = any(tensor.device == device for tensor in on_device)
        target_pass = {"target's pass": target_pass_bytes(target, rows, layers) if runs_here else 0}
        needed = {
            "gradients": parameter_bytes(trained),
            f"{optimizer}'s state": optimizer_bytes(trained, optimizer),
            "weights in half precision": 2 * sum(p.numel() for p in parameters) if autocast else 0,
            **max(roll_out, target_pass, key=lambda parts: sum(parts.values())),
        }
        checkpoint, final = checkpoint_bytes(model, optimizer, only_model=args.save_only_model)
        free = available_memory(device)
        if free is not None and device.type == "cpu":  # which the processes of a machine share
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(
            device=device,
            trained=sum(p.numel() for p in trained),
            parameters=sum(p.numel() for p in parameters),
            loaded={
                "drafter's weights": parameter_bytes(parameters, device),
                "target's weights": parameter_bytes(on_device, device),
            },
            needed={part: size for part, size in needed.items() if size},
            steps=steps,
            tokens_per_epoch=tokens_per_epoch,
            checkpoint=checkpoint,
            final=final,
            checkpoints=checkpoints_kept(args, steps, steps_per_epoch),
            memory_free=free,
            disk_free=_disk_free(args.output_dir),
        )

    def __str__(self) -> str:
        share = f" of {self.parameters:,}" if self.trained < self.parameters else ""
        lines = [f"Training {self.trained:,} parameters{share}, {self.steps:,} steps on {self.device}"]
        if self.tokens_per_epoch is not None:
            lines.append(f"  tokens per epoch: {self.tokens_per_epoch:,}")
        for title, parts in (("in memory", self.loaded), ("to come", self.needed)):
            listing = ", ".join(f"{part} {readable(size)}" for part, size in parts.items())
            lines.append(f"  {title}: {readable(sum(parts.values()))} ({listing})")
        if self.memory_free is not None:
            lines[-1] += f"; free: {readable(self.memory_free)}"
        disk = f"  disk: {readable(self.disk)}"
        if self.checkpoints:
            disk += f" ({self.checkpoints} checkpoint(s) of {readable(self.checkpoint)})"
        lines.append(disk + ("" if self.disk_free is None else f"; free: {readable(self.disk_free)}"))
        return "\n".join(lines)

    def check(self) -> None:
        """Refuses a run that cannot fit.

        Raises:
            ValueError: saying what is needed, what there is, and what to change.
        """
        needed = sum(self.needed.values())
        anyway = "`ignore_estimate=True` (`--ignore_estimate`) starts anyway"
        if self.memory_free is not None and needed > self.memory_free:
            largest = max(self.needed, key=self.needed.get)
            remedies = (
                "`gradient_checkpointing=True` or a smaller `per_device_train_batch_size` (with more "
                "`gradient_accumulation_steps`) or `max_length`"
                if largest in ("activations", "losses", "target's pass")
                else "`optim='adamw_bnb_8bit'`, fewer specialists (a larger `positions_per_specialist`), a "
                "`specialist_adapter`, or FSDP over several devices"
            )
            raise ValueError(
                f"Training needs {readable(needed)} more on {self.device}, which has {readable(self.memory_free)}. "
                f"The largest part is {largest}, {readable(self.needed[largest])}: try {remedies}. {anyway}.\n{self}"
            )
        if self.disk_free is not None and self.disk > self.disk_free:
            raise ValueError(
                f"The run writes {readable(self.disk)}, the disk has {readable(self.disk_free)} left. Set "
                "`save_total_limit`, raise `save_steps`, pass `save_only_model=True`, or choose another `output_dir`. "
                f"{anyway}.\n{self}"
            )


def _disk_free(folder: str | os.PathLike) -> int | None:
    """Bytes left where `folder` is or will be."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
