"""The pair of models that ships with the package, and the text that it was trained on and is shown on."""

import sysconfig
from pathlib import Path
from typing import Any


__all__ = [
    "HELD_OUT_MODULES",
    "demo_folder",
    "demo_prompts",
    "held_out_sources",
    "load_demo_pair",
    "training_sources",
]

# Kept out of every training stage of the demo pair; all of them exist in Python 3.10 to 3.14.
HELD_OUT_MODULES = (
    "calendar",
    "cmd",
    "configparser",
    "csv",
    "fnmatch",
    "fractions",
    "heapq",
    "queue",
    "shelve",
    "string",
    "textwrap",
    "zipapp",
)

_PROMPT_CHARACTERS = 500

# Tables, vendored packages and tests: text that is not library code, or that some distributions leave out.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def demo_folder() -> Path:
    """Folder of the shipped pair: `target/` (a Llama with its tokenizer) and `poss/` (its drafter)."""
    return Path(__file__).parent / "assets" / "demo"


def _standard_library() -> Path:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "heapq.py").is_file():
        raise FileNotFoundError(
            f"No Python sources in {folder}: expected the standard library's .py files there. "
            "Use a Python installation that ships its sources."
        )
    return folder


def training_sources() -> dict[str, str]:
    """Source text of the standard library by relative path, sorted, without `HELD_OUT_MODULES`.

    Raises:
        FileNotFoundError: if this Python comes without sources.
    """
    root = _standard_library()
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.parts[0].startswith("config-"):
            continue
        if len(relative.parts) == 1 and relative.stem in HELD_OUT_MODULES:
            continue
        sources[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return sources


def held_out_sources() -> dict[str, str]:
    """Source text of `HELD_OUT_MODULES` by module name.

    Raises:
        FileNotFoundError: if this Python comes without sources.
    """
    root = _standard_library()
    return {name: (root / f"{name}.py").read_text(encoding="utf-8") for name in HELD_OUT_MODULES}


def demo_prompts(count: int) -> list[tuple[str, str]]:
    """Title and text of up to `count` prompts, one a held-out module: the lines that lead up to its middle.

    Raises:
        ValueError: if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} prompts; expected 1 or more.")
    prompts = []
    for name, source in list(held_out_sources().items())[:count]:
        end = source.index("\n", len(source) // 2) + 1
        start = source.rfind("\n", 0, max(end - _PROMPT_CHARACTERS, 0)) + 1
        prompts.append((f"{name}.py", source[start:end]))
    return prompts


def load_demo_pair(folder: str | Path | None = None) -> tuple[Any, Any, Any]:
    """Target, drafter and tokenizer of the pair in `folder` (the shipped one by default), in float32.

    Raises:
        FileNotFoundError: if the folder has no `target/` and `poss/`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .modeling_poss import PosSModel

    folder = demo_folder() if folder is None else Path(folder)
    if not (folder / "target").is_dir() or not (folder / "poss").is_dir():
        raise FileNotFoundError(f"No target/ and poss/ in {folder}; examples/build_demo_pair.py makes them.")
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype="float32").eval()
    poss = PosSModel.from_pretrained(folder / "poss", dtype="float32").eval()
    target.config.name_or_path = poss.config.target_name_or_path  # the folder is named for its place in the pair
    return target, poss, AutoTokenizer.from_pretrained(folder / "target")
