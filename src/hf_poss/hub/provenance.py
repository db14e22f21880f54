"""Where a figure comes from: machine, versions, command, data."""

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch


__all__ = [
    "HUB_PREFIX",
    "command_line",
    "dataset_fields",
    "describe_hardware",
    "describe_processor",
    "package_versions",
    "without_secrets",
]

HUB_PREFIX = "hub:"  # of data sets on the Hub, where a path could stand as well
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft")
_SECRET_OPTIONS = re.compile(r"(--[\w-]*(?:token|secret|password|api[_-]?key))[ =](?!-)\S+", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def describe_hardware() -> str:
    """The accelerators of this machine; its processor where there is none."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        module = getattr(torch, device.type)
        names = [
            module.get_device_name(index) if hasattr(module, "get_device_name") else device.type
            for index in range(torch.accelerator.device_count())
        ]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return describe_processor()


def describe_processor() -> str:
    """The processor, and the number of threads that torch uses on it."""
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} on {name}"


def package_versions() -> dict[str, str]:
    """Versions of Python, hf_poss and, of the packages that training may use, those that are installed."""
    from .. import __version__

    versions = {"python": platform.python_version(), "hf_poss": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command that runs, as one would type it: without the folder of the script, and without secrets."""
    argv = sys.argv if argv is None else argv
    return without_secrets(shlex.join([os.path.basename(argv[0]), *argv[1:]]))


def without_secrets(text: str) -> str:
    """`text` with `***` in the place of Hub tokens and of what follows options that end in token, secret, password
    or key: records are published."""
    return _HUB_TOKEN.sub("***", _SECRET_OPTIONS.sub(r"\1 ***", text))


def dataset_fields(names: Iterable[str]) -> dict[str, list[str]]:
    """Fields of a [`TrainingRecord`] for what `--dataset` was given: `datasets` holds names on the Hub, `files` the
    last parts of local paths, since a machine's folders concern nobody else."""
    fields: dict[str, list[str]] = {"datasets": [], "files": []}
    for name in names:
        if os.path.exists(name) or os.path.isabs(name) or Path(name).suffix in (".txt", ".json", ".jsonl", ".parquet"):
            fields["files"].append(os.path.basename(os.path.normpath(name)))
        else:
            fields["datasets"].append(name)
    return fields
