"""LoRA specialists: one full layer that all of them share, and a low-rank adapter for each, made of peft's layers.

Imported by a [`PosSModel`] whose config has a `specialist_adapter`, and by nothing else: it needs peft.
"""

import functools
import math

from torch import nn
from transformers import initialization as init

from .adapter_settings import complete_adapter
from .configuration_poss import PosSConfig


try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError(
        "`specialist_adapter` makes specialists of peft's LoRA layers, and peft is not installed. "
        "Install it: pip install 'peft>=0.18'."
    ) from error


__all__ = ["ADAPTER_NAME", "SharedLayer"]

ADAPTER_NAME = "specialist"

# How peft starts A. transformers would start both parts of an adapter as any other linear layer.
_INITIALIZE_A = functools.partial(init.kaiming_uniform_, a=math.sqrt(5))


class SharedLayer(nn.Module):
    """The weights that every LoRA specialist goes out from: those of one specialist. It is never run itself.

    Not a `PosSSpecialist`, so that FSDP, which gathers the weights of one when it runs, leaves these to the model.

    Args:
        specialist: a `PosSSpecialist`, which gives its children to this module.
    """

    def __init__(self, specialist: nn.Module):
        super().__init__()
        for name, child in specialist.named_children():
            self.add_module(name, child)

    def adapted(self, specialist: nn.Module, config: PosSConfig) -> nn.Module:
        """Turns `specialist` into one that computes with these weights and holds nothing but its adapter (LoRA).

        An adapted projection is a `peft.tuners.lora.Linear` of one adapter, which starts as zero: all specialists
        begin equal, as the paper's do as copies of one layer. No state tells whose turn it is, so going from one to
        the next merges and switches nothing.

        Args:
            specialist: a `PosSSpecialist` on `meta`; its own weights are dropped.
            config: of the model; `specialist_adapter` is read.
        """
        layers = {name: layer for name, layer in self.named_modules() if not any(layer.children())}
        for name, layer in layers.items():
            parent, attribute = _place(specialist, name)
            setattr(parent, attribute, layer)
        inject_adapter_in_model(LoraConfig(**complete_adapter(config.specialist_adapter)), specialist, ADAPTER_NAME)
        self.requires_grad_(True)  # peft froze what is no adapter; here it learns too
        for name, layer in layers.items():
            parent, attribute = _place(specialist, name)
            adapted = getattr(parent, attribute)
            if isinstance(adapted, LoraLayer):
                parent, attribute = adapted, "base_layer"
                adapted.lora_A[ADAPTER_NAME].initialize = _INITIALIZE_A
                adapted.lora_B[ADAPTER_NAME].initialize = init.zeros_
            # A plain attribute, not a child: what is shared is counted, saved and sharded once, as this layer's.
            delattr(parent, attribute)
            parent.__dict__[attribute] = layer
        return specialist


def _place(specialist: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the one of this name, and the attribute that it is there."""
    parent, _, attribute = name.rpartition(".")
    return specialist.get_submodule(parent), attribute
