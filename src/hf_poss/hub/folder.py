"""A folder that holds specialists: what it says of itself, whether it can be loaded, what of it is published."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoints import check_loading_info, is_published_layout, read_published, reading
from ..compatibility import relative_imports
from ..configuration_poss import PosSConfig
from ..modeling_poss import PosSModel
from .record import EVALUATION_RECORD, SPEED_RECORD, TRAINING_RECORD


__all__ = ["check_weights", "empty_model", "publishable_files", "read_config", "weight_files"]

CARD = "README.md"
TOKENIZER_REFERENCE = "tokenizer_reference.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_RECORDS = (TRAINING_RECORD, SPEED_RECORD, EVALUATION_RECORD)
_ALWAYS = (CARD, "config.json", "generation_config.json", TOKENIZER_REFERENCE, *_RECORDS)
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_IMAGE = re.compile(r"!\[[^\]]*\]\(([\w./-]+\.(?:png|jpe?g|svg|gif|webp))\)", re.IGNORECASE)


def read_config(
    folder: str | os.PathLike, positions_per_specialist: int | None = None, num_draft_positions: int | None = None
) -> PosSConfig:
    """Config of the specialists in `folder`: saved by this package, or a published PosS, EAGLE or HASS checkpoint.

    Args:
        positions_per_specialist, num_draft_positions: of a published checkpoint that does not say them.

    Raises:
        FileNotFoundError: if there is no such folder, or no `config.json` in it.
        ValueError: if it holds something else than position specialists.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        found = "the folder has none" if folder.is_dir() else "there is no such folder"
        if (folder / "adapter_config.json").is_file():
            found = "the folder holds a PEFT adapter, which `merge_and_unload()` makes specialists of"
        raise FileNotFoundError(
            f"No config.json in {folder}: {found}. Expected what `PosSModel.save_pretrained`, `hf-poss train` or "
            "`hf-poss convert` writes."
        )
    source = str(folder.resolve())  # a published checkpoint may be told by its folder's name, which is not "."
    if not is_published_layout(source, {}):
        return PosSConfig.from_pretrained(source)
    with reading(source):
        positions = {"positions_per_specialist": positions_per_specialist, "num_draft_positions": num_draft_positions}
        return read_published(source, positions)[0]


def empty_model(config: PosSConfig) -> PosSModel:
    """A model without memory behind its weights, for its names and shapes."""
    with torch.device("meta"):
        return PosSModel(config)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that `from_pretrained` reads: one, or the index with its shards.

    Raises:
        FileNotFoundError: if there are none, or a shard is missing.
        ValueError: if the index cannot be read.
    """
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(
            f"No {_WEIGHTS} in {folder}, nor {_INDEX}. Save the specialists there (`poss.save_pretrained(...)`); "
            "`hf-poss convert` turns other files into one."
        )
    try:
        shards = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX} cannot be read ({error!r}). Save the specialists again.") from error
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names. Save them again.")
    return [_INDEX, *shards]


def check_weights(folder: str | os.PathLike, config: PosSConfig) -> None:
    """Refuses weights that `config` does not describe, by the headers of their files: names and shapes.

    Raises:
        FileNotFoundError: as in [`weight_files`].
        ValueError: if a file is damaged or cut off, or names or shapes are not those of these specialists.
    """
    folder = Path(folder)
    found: dict[str, list[int]] = {}
    with reading(str(folder)):
        for name in weight_files(folder):
            if name != _INDEX:
                with safe_open(folder / name, "pt") as file:
                    found |= {key: file.get_slice(key).get_shape() for key in file.keys()}
    wanted = {key: list(tensor.shape) for key, tensor in empty_model(config).state_dict().items()}
    info = {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": found.keys() - wanted.keys(),
        "mismatched_keys": [
            (key, found[key], wanted[key]) for key in wanted.keys() & found.keys() if found[key] != wanted[key]
        ],
    }
    check_loading_info(info, f"in {folder}")


def publishable_files(folder: str | os.PathLike) -> list[str]:
    """Paths inside `folder`, sorted, that belong to specialists on the Hub.

    Weights, configs, records, the card with the images that it shows, the code that loads them without this package,
    and a license. All else stays: checkpoints, optimizer states, logs, training arguments (a pickle), the tokenizer's
    files, which are the target's.

    Raises:
        FileNotFoundError: as in [`weight_files`].
    """
    folder = Path(folder)
    names = {*weight_files(folder), *_ALWAYS, *_LICENSES, *_code(folder)}
    if (folder / CARD).is_file():
        names.update(_IMAGE.findall((folder / CARD).read_text(encoding="utf-8")))
    paths = (os.path.normpath(name) for name in names)
    return sorted(path for path in paths if not path.startswith(("..", "/")) and (folder / path).is_file())


def _code(folder: Path) -> set[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = {folder / f"{name.split('.')[0]}.py" for name in config.get("auto_map", {}).values()}
    modules = {module for module in modules if module.is_file()}
    modules.update(*(relative_imports(module) for module in modules))
    names = {os.path.relpath(module, folder) for module in modules}
    return names | {f"custom_generate/{file.name}" for file in (folder / "custom_generate").glob("*.py")}
