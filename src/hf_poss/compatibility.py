"""What hf_poss needs of transformers beyond its public interface, looked up once.

Nothing else in the package touches these names.
"""

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    cache_utils,
)
from transformers.cache_utils import Cache
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.generation import PrefixConstrainedLogitsProcessor
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.pipelines import base as pipelines
from transformers.utils import output_capturing


__all__ = [
    "CACHE",
    "CANDIDATES",
    "DECODE",
    "SELECTS_HIDDEN_STATES",
    "VALIDATE",
    "attention_of",
    "bare_copy",
    "check_trainer",
    "commit_of",
    "compile_everywhere",
    "compile_settings",
    "custom_generate_source",
    "device_of",
    "input_device",
    "is_hooked",
    "is_pipeline_parallel",
    "is_placeholder",
    "is_plain_linear",
    "keeps_state",
    "mark_as_own",
    "mark_static",
    "operations_through",
    "original_method",
    "outlives_call",
    "peft_arguments",
    "plain_decoding",
    "prefix_function",
    "prompt_mask_length",
    "relative_imports",
    "replace_method",
    "sequences_left",
    "tensor_parallel_group",
    "train_on_one_device",
    "unsharded_class",
    "without_memory",
]

_WORKING_VERSIONS = "transformers>=5.15"

# The places where `generate` reaches an assistant, with the arguments that are read there.
VALIDATE, CANDIDATES, DECODE = "_validate_generation_mode", "_get_candidate_generator", "_assisted_decoding"
_HOOKS = {
    VALIDATE: ("generation_mode", "generation_config", "generation_mode_kwargs"),
    CANDIDATES: ("generation_config", "input_ids", "logits_processor", "model_kwargs"),
    DECODE: (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "assistant_model",
    ),
}
# What targets, `generate` and their outputs call the keys and values: `past_key_values`, or since 5.24 `cache`.
_TAKEN = inspect.signature(inspect.unwrap(GenerationMixin.prepare_inputs_for_generation)).parameters
CACHE = "cache" if "cache" in _TAKEN else "past_key_values"
# What `PosSTrainer` overrides beyond Trainer's public methods.
_TRAINER_METHODS = {
    "_get_output_dir": ("trial",),
    "_get_train_sampler": ("train_dataset",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
}
# Where a pipeline loads the assistant that it was given.
_PIPELINE_HOOK = "load_assistant_model"


def _missing_methods(owner: type, methods: dict[str, tuple[str, ...]]) -> list[str]:
    missing = []
    for name, arguments in methods.items():
        method = getattr(owner, name, None)
        if method is None:
            missing.append(f"{owner.__name__}.{name}")
            continue
        parameters = inspect.signature(inspect.unwrap(method)).parameters
        missing.extend(f"{name}({argument}=)" for argument in arguments if argument not in parameters)
    return missing


def _refuse_release(missing: list[str]) -> None:
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} lacks what hf_poss hooks into: {', '.join(missing)}. "
            f"Install a version that works: pip install '{_WORKING_VERSIONS}'."
        )


def _check_hooks() -> None:
    missing = _missing_methods(GenerationMixin, _HOOKS)
    if not hasattr(pipelines, _PIPELINE_HOOK):
        missing.append(f"pipelines.base.{_PIPELINE_HOOK}")
    if not hasattr(AssistedCandidateGenerator, "requires_model_outputs"):
        missing.append("CandidateGenerator.requires_model_outputs")
    _refuse_release(missing)


def check_trainer(trainer: type) -> None:
    """Refuses a release of transformers whose Trainer lacks what `PosSTrainer` overrides.

    Raises:
        ImportError: with the versions that work.
    """
    _refuse_release(_missing_methods(trainer, _TRAINER_METHODS))


_check_hooks()
_owners: dict[str, Any] = {**dict.fromkeys(_HOOKS, GenerationMixin), _PIPELINE_HOOK: pipelines}
_originals: dict[str, Callable[..., Any]] = {name: getattr(owner, name) for name, owner in _owners.items()}

# Newer releases take a list of layers as `output_hidden_states` and keep these only; older ones keep all.
SELECTS_HIDDEN_STATES = hasattr(output_capturing, "selected_hidden_states")


def original_method(name: str) -> Callable[..., Any]:
    """What `replace_method` replaces: a method of `GenerationMixin`, or `load_assistant_model` of pipelines."""
    return _originals[name]


def replace_method(name: str, method: Callable[..., Any]) -> None:
    """Puts `method` in the place of transformers' own; `original_method(name)` puts it back."""
    if method is not _originals[name]:
        method.is_hf_poss = True
    setattr(_owners[name], name, method)


def is_hooked() -> bool:
    """Whether `generate` runs position specialists, by this package or a copy of it that came with a checkpoint."""
    return all(hasattr(getattr(GenerationMixin, name), "is_hf_poss") for name in _HOOKS)


def custom_generate_source() -> str | None:
    """Folder or repository of the `target.generate(custom_generate=...)` that called the caller of this function.

    transformers does not hand it on, and runs a copy of the code from elsewhere.
    """
    source = inspect.currentframe().f_back.f_back.f_locals.get("custom_generate")
    return source if isinstance(source, str) else None


def relative_imports(module: Path) -> list[Path]:
    """Files of the modules that a module file imports relatively, and these in turn."""
    return sorted({Path(file) for file in get_relative_import_files(module)} - {module})


def tensor_parallel_group(target: PreTrainedModel) -> "torch.distributed.ProcessGroup | None":
    """The processes that share `target`'s weights by tensor parallelism, which read the same prompts and must emit the
    same tokens; None for a target that is whole in every process, or sharded by FSDP only."""
    mesh = getattr(target, "_device_mesh", None)
    if mesh is None or (target.tp_size or 1) == 1:
        return None
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()


def prefix_function(processor: PrefixConstrainedLogitsProcessor) -> Callable[[int, torch.Tensor], list[int]]:
    """The `prefix_allowed_tokens_fn` that a processor was made from."""
    return processor._prefix_allowed_tokens_fn


def sequences_left(target: PreTrainedModel, finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Whether this process, or with `synced_gpus` any process, has text left to write."""
    return target._has_unfinished_sequences(finished, synced_gpus, device=device)


def plain_decoding(target: PreTrainedModel) -> Callable[..., Any]:
    """The decoding loop of `generate` without an assistant, greedy or sampled."""
    return target._sample


def prompt_mask_length(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> int | None:
    """Tokens that the attention mask of a call covered, cached ones included; None if there was none."""
    mask = model_kwargs.get("attention_mask")
    return getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]


def is_pipeline_parallel(target: PreTrainedModel) -> bool:
    """Whether `target`'s layers are spread over processes, so that one has the embedding and another the head."""
    mesh = getattr(target, "_device_mesh", None)
    return mesh is not None and "pp" in (mesh.mesh_dim_names or ()) and mesh["pp"].size() > 1


def device_of(module: nn.Module) -> torch.device:
    """The device that `module` computes on. Weights that accelerate offloads are on `meta` until the module runs."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for device in (getattr(hook, "execution_device", None) for hook in getattr(hook, "hooks", (hook,))):
            if device is not None:
                return torch.device(device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


# Newer releases mark a cache that the caller brought along.
_MARKS_CACHES = "_is_user_defined" in inspect.unwrap(GenerationMixin._prepare_cache_for_generation).__code__.co_names


def outlives_call(cache: Cache, generation_config: GenerationConfig) -> bool:
    """Whether the caller gets to see a call's cache afterwards; True where a release does not tell."""
    returned = bool(generation_config.return_dict_in_generate)
    return returned or getattr(cache, "_is_user_defined", not _MARKS_CACHES)


# Stands in a cache for a layer that reads the keys and values of another one.
_PLACEHOLDER = getattr(cache_utils, "DummyLayer", ())


def is_placeholder(layer: Any) -> bool:
    """Whether a layer of a cache never holds anything."""
    return isinstance(layer, _PLACEHOLDER)


# One with values, and one that stands for it where memory is predicted.
_FAKE_TENSOR = getattr(getattr(torch, "_subclasses", None), "FakeTensor", torch.Tensor)
_PLAIN_TENSORS = (torch.Tensor, _FAKE_TENSOR)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix at hand and nothing else: no hook, adapter, shard, packed or offloaded weight."""
    hooks = module._forward_hooks or module._forward_pre_hooks or not _runs_own_forward(module)
    if type(module) is not nn.Linear or hooks:
        return False
    weight = module.weight
    return type(weight.data) in _PLAIN_TENSORS and weight.is_floating_point() and not weight.is_meta


def _runs_own_forward(module: nn.Module) -> bool:
    """Whether calls reach the `forward` of the module's class; accelerate may bring inputs to its device before."""
    if "forward" not in vars(module):
        return True
    hook = getattr(module, "_hf_hook", None)
    moves = all(
        type(hook).__name__ == "AlignDevicesHook" and not hook.offload for hook in getattr(hook, "hooks", (hook,))
    )
    return moves and getattr(module._old_forward, "__func__", None) is type(module).forward


def bare_copy(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """A copy with other parameters, free of what splits its inputs and brings its outputs together: a `forward` of
    the instance, or hooks in older releases."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)
    twin._parameters = {name: parameters.get(name) for name in module._parameters}  # a bias may be None
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()
    return twin


def input_device(target: PreTrainedModel) -> torch.device:
    """Where `target` takes its tokens; `target.device` is `meta` if its embedding is offloaded."""
    return device_of(target.get_input_embeddings())


def peft_arguments(target: PreTrainedModel) -> dict[str, Any]:
    """What a `PeftModel` hands to its layers in the call that runs: `adapter_names` and `alora_offsets`, an item a row
    of the batch."""
    arguments: dict[str, Any] = {}
    if hasattr(target, "peft_config"):
        for module in target.modules():
            for hook in module._forward_pre_hooks.values():
                arguments |= getattr(hook, "keywords", {})
    return arguments


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation that a text config asks for: "eager", "sdpa", "flash_attention_2"..."""
    return config._attn_implementation


def compile_everywhere(config: CompileConfig) -> CompileConfig:
    """Makes `generate` compile on devices too where transformers leaves it, CPUs above all; returns the config."""
    config._compile_all_devices = True
    return config


def compile_settings(
    target: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Arguments of `torch.compile` with which a call without drafts would compile its steps; None if it would not."""
    if not target._valid_auto_compile_criteria(model_kwargs, generation_config):
        return None
    config = generation_config.compile_config or target._default_compile_config()
    if target.get_compiled_call(config) == target.__call__:  # families that transformers leaves out
        return None
    settings = config.to_dict()
    # Shapes are the same in every round. Left open, torch.compile takes a second size for a sign that any may come.
    if settings.get("dynamic") is None:
        settings["dynamic"] = False
    return settings


def mark_static(tensor: torch.Tensor) -> None:
    """Tells torch.compile that a tensor stays at its address, so that CUDA graphs may write into it."""
    torch._dynamo.mark_static_address(tensor)


# Kinds of layers, by transformers' names, with a state beside or in place of keys and values.
_STATEFUL_LAYERS = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba"}


def keeps_state(target: PreTrainedModel) -> bool:
    """Whether a model keeps a state that cannot go back to an earlier token."""
    layers = getattr(target.config.get_text_config(), "layer_types", None) or ()
    return getattr(target, "_is_stateful", False) or not _STATEFUL_LAYERS.isdisjoint(layers)


def mark_as_own(generation_config: GenerationConfig) -> None:
    """Makes a generation config be saved as it is; transformers drops one that it takes for derived from a config."""
    generation_config._from_model_config = False


def commit_of(config: PreTrainedConfig) -> str | None:
    """The commit of the Hub repository that a config was loaded from; None for a local folder."""
    return getattr(config, "_commit_hash", None)


def train_on_one_device(args: "transformers.TrainingArguments") -> None:
    """Makes a process that sees several GPUs use one, where Trainer would wrap the model in `DataParallel`."""
    if args.n_gpu > 1:
        args._n_gpu = 1


@contextmanager
def unsharded_class(model: nn.Module) -> Iterator[None]:
    """FSDP2 puts a module into a class that torch makes; within, it is of the class that its code belongs to."""
    sharded = type(model)
    if sharded.__module__.startswith("torch.distributed."):
        model.__class__ = sharded.__mro__[2]  # behind it and `FSDPModule`
    try:
        yield
    finally:
        model.__class__ = sharded


def without_memory() -> AbstractContextManager:
    """Inside, new tensors have a shape, a dtype and a device, and neither memory nor values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def operations_through(run: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]) -> AbstractContextManager:
    """Inside, every operation on tensors goes through `run(operation, arguments, keyword_arguments)`, which calls it
    and returns what it returned, or answers in its place."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keyword_arguments=None):
            return run(operation, arguments, keyword_arguments or {})

    return Operations()
