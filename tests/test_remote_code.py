"""What a saved folder can do where the package is not installed, and beside it where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import hf_poss
from hf_poss import PosSConfig, PosSModel
from hf_poss.demo import demo_folder, load_demo_pair


PACKAGE = Path(hf_poss.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run_script(script: str, folder: Path, with_package: bool, *arguments: str) -> dict:
    """The JSON that `script` prints in a fresh, isolated interpreter with a module cache of its own."""
    if not with_package and PACKAGE.parent == Path(torch.__file__).parents[1]:
        pytest.skip("hf_poss is installed beside torch, so no path holds one without the other")
    paths = [path for path in sys.path if path and (with_package or Path(path) != PACKAGE.parent)]
    # `evaluate` puts the cache of this process there, once it has loaded a module.
    paths = [path for path in paths if not (Path(path) / "transformers_modules").is_dir()]
    preamble = f"import sys\nsys.path[:] = {paths!r}\n"
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        # Without `site`, no .pth file puts an editable install on the path.
        [sys.executable, "-I", "-S", "-c", preamble + COMMON + script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"log": result.stderr}


COMMON = """
import importlib.util, json, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel

report = {"package": importlib.util.find_spec("hf_poss") is not None}
target_folder, tree_folder, chain_folder = sys.argv[1:4]
target = AutoModelForCausalLM.from_pretrained(target_folder, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(target_folder, padding_side="left")
inputs = tokenizer("def read_lines(path):\\n    with open(path) as f:\\n", return_tensors="pt")
two = tokenizer(["class Queue:\\n    def put(self, item):\\n", "import os\\n"], padding=True, return_tensors="pt")
knobs = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
passes = []
target.model.register_forward_hook(lambda *_: passes.append(1))

def run(inputs, **kwargs):
    passes.clear()
    output = target.generate(**inputs, **knobs, **kwargs)
    return output.tolist(), len(passes)

def from_folder(folder, inputs=inputs, **kwargs):
    return run(inputs, custom_generate=folder, trust_remote_code=True, **kwargs)
"""


@pytest.fixture(scope="module")
def drafter() -> PosSModel:
    return load_demo_pair()[1]


@pytest.fixture(scope="module")
def folders(drafter, tmp_path_factory) -> tuple[str, str, str]:
    """The demo target, its drafter for trees, and the same one for chains."""
    folder = tmp_path_factory.mktemp("saved")
    drafter.save_pretrained(folder / "poss-tree.v1")
    drafter.generation_config.draft_top_k = 1
    drafter.save_pretrained(folder / "poss-chain")
    drafter.generation_config.draft_top_k = None
    return str(demo_folder() / "target"), str(folder / "poss-tree.v1"), str(folder / "poss-chain")


# ---- Without the package ----


WITHOUT_PACKAGE = """
from pathlib import Path
from safetensors.torch import save_file

poss = AutoModel.from_pretrained(tree_folder, trust_remote_code=True)
report["module"] = type(poss).__module__
save_file(poss.state_dict(), sys.argv[4])
again = str(Path(sys.argv[4]).parent / "again")
poss.save_pretrained(again)
resaved = AutoModel.from_pretrained(again, trust_remote_code=True).state_dict()
report["resaved"] = all(torch.equal(weight, resaved[name]) for name, weight in poss.state_dict().items())

def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

report["untrusted"] = refusal(lambda: AutoModel.from_pretrained(tree_folder, trust_remote_code=False))
report["poss alone"] = refusal(lambda: poss.generate(**inputs))

report["plain"], report["two plain"] = run(inputs), run(two)
loads = []
original = PreTrainedModel.from_pretrained.__func__
def counted(cls, *args, **kwargs):
    loads.append(cls.__name__)
    return original(cls, *args, **kwargs)
PreTrainedModel.from_pretrained = classmethod(counted)
report["tree"], report["chain"] = from_folder(tree_folder), from_folder(chain_folder)
report["two trees"], report["two chains"] = from_folder(tree_folder, two), from_folder(chain_folder, two)
report["loads"] = list(loads)

class Streamer:
    def __init__(self): self.tokens, self.ended = [], False
    def put(self, tokens): self.tokens += tokens.flatten().tolist()
    def end(self): self.ended = True
streamer = Streamer()
from_folder(tree_folder, streamer=streamer)
report["streamed"], report["stream ended"] = streamer.tokens, streamer.ended
report["repository"] = from_folder("me/poss-tree.v1")
report["revision"] = from_folder("me/poss-tree.v1", revision="main", local_files_only=True)
report["class of the repository"] = type(
    AutoModel.from_pretrained("me/poss-tree.v1", trust_remote_code=True)
).__module__
report["given assistant"] = from_folder(tree_folder, assistant_model=poss)

report["refused"] = refusal(lambda: from_folder(tree_folder, use_cache=False))
report["tree after it"] = from_folder(tree_folder)
report["plain after it"] = run(inputs)

code = sys.modules[target.load_custom_generate(tree_folder, trust_remote_code=True).__module__]
report["not through generate"] = refusal(lambda: code.generate(target, **inputs))

with torch.no_grad():
    poss.fc.weight.zero_()
    poss.save_pretrained(tree_folder)
loads.clear()
report["tree of other weights"] = from_folder(tree_folder)
report["loads of other weights"] = list(loads)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def alone(folders, drafter, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("alone")
    target, tree, chain = folders
    drafter.save_pretrained(folder / "poss-tree.v1")  # the script writes to it
    # What a download from the Hub leaves behind.
    repository = folder / "hub" / "models--me--poss-tree.v1"
    drafter.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    report = run_script(
        WITHOUT_PACKAGE, folder, False, target, str(folder / "poss-tree.v1"), chain, str(folder / "loaded.safetensors")
    )
    assert not report["package"]
    return report | {"weights": load_file(folder / "loaded.safetensors")}


def test_auto_model_loads_a_saved_folder(alone, drafter):
    assert alone["module"].startswith("transformers_modules.")
    assert alone["weights"].keys() == drafter.state_dict().keys()
    for name, weight in drafter.state_dict().items():
        assert torch.equal(alone["weights"][name], weight)


def test_a_repository_works_as_a_folder_does(alone):
    assert COMMIT in alone["class of the repository"]
    assert alone["repository"] == alone["revision"] == alone["tree"]


def test_what_remote_code_saves_loads_again(alone):
    assert alone["resaved"]
    assert alone["log"].count("Saved without custom_generate/") == 1


def test_code_is_not_run_without_consent(alone):
    assert "ValueError" in alone["untrusted"] and "trust_remote_code=True" in alone["untrusted"]


@pytest.mark.parametrize(
    "name", ["tree", "chain", "two trees", "two chains", "repository", "revision", "given assistant"]
)
def test_custom_generate_drafts_and_writes_the_same(alone, name):
    wanted, plain_passes = alone["two plain" if name.startswith("two") else "plain"]
    output, passes = alone[name]
    assert output == wanted
    assert plain_passes == 40
    assert passes < 0.75 * plain_passes


def test_specialists_are_loaded_once_a_folder(alone):
    assert alone["loads"] == ["PosSModel", "PosSModel"]


def test_specialists_saved_anew_are_loaded_anew(alone):
    assert alone["loads of other weights"] == ["PosSModel"]
    output, passes = alone["tree of other weights"]
    assert output == alone["plain"][0]
    assert passes > alone["tree"][1]


def test_a_streamer_gets_every_token(alone):
    assert [alone["streamed"]] == alone["plain"][0]
    assert alone["stream ended"]


def test_a_refused_call_leaves_the_target_as_it_was(alone):
    assert "use_cache" in alone["refused"]
    assert alone["tree after it"] == alone["tree"]
    assert alone["plain after it"] == alone["plain"]


def test_what_cannot_work_is_refused(alone):
    assert "NotImplementedError" in alone["poss alone"] and "assistant_model=poss" in alone["poss alone"]
    assert "ValueError" in alone["not through generate"] and "assistant_model=" in alone["not through generate"]


# ---- Beside the package ----


WITH_PACKAGE = """
import hf_poss
from transformers.dynamic_module_utils import get_class_from_dynamic_module

report["untrusted"] = type(AutoModel.from_pretrained(tree_folder)).__module__
report["trusted"] = type(AutoModel.from_pretrained(tree_folder, trust_remote_code=True)).__module__
poss = hf_poss.PosSModel.from_pretrained(tree_folder)
copied = get_class_from_dynamic_module("modeling_poss.PosSModel", tree_folder).from_pretrained(tree_folder)
report["copied"] = type(copied).__module__

def counted(call):
    with hf_poss.collect_statistics() as stats:
        output, passes = call()
    return {"output": output, "passes": passes, "tokens": stats.tokens, "rounds": stats.rounds}

report["plain"] = run(inputs)
report["calls"] = {
    "package": counted(lambda: run(inputs, assistant_model=poss)),
    "class of the folder": counted(lambda: run(inputs, assistant_model=copied)),
    "code of the folder": counted(lambda: from_folder(tree_folder)),
    "package after it": counted(lambda: run(inputs, assistant_model=poss)),
}
hf_poss.disable()
report["code of the folder, package off"] = from_folder(tree_folder)
for _ in range(500):  # wrappers of wrappers would end in a RecursionError
    hf_poss.enable()
    hf_poss.disable()
    sys.modules[target.load_custom_generate(tree_folder, trust_remote_code=True).__module__].enable()
hf_poss.enable()
report["calls"]["package, both on"] = counted(lambda: run(inputs, assistant_model=poss))
report["calls"]["code of the folder, both on"] = counted(lambda: from_folder(tree_folder))
hf_poss.disable()
report["plain, package off"] = run(inputs)
report["own methods"] = all(
    getattr(GenerationMixin, name).__code__.co_filename.endswith("utils.py")
    for name in ("_validate_generation_mode", "_get_candidate_generator", "_assisted_decoding")
)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def beside(folders, tmp_path_factory) -> dict:
    report = run_script(WITH_PACKAGE, tmp_path_factory.mktemp("beside"), True, *folders)
    assert report["package"]
    return report


def test_an_installed_package_goes_before_the_code_of_a_folder(beside):
    assert beside["untrusted"] == beside["trusted"] == "hf_poss.modeling_poss"
    assert beside["copied"].startswith("transformers_modules.")


def test_classes_and_hooks_of_both_work_together(beside):
    wanted, plain_passes = beside["plain"]
    assert len(beside["calls"]) == 6
    for name, call in beside["calls"].items():
        assert call["output"] == wanted, name
        assert call["passes"] < 0.75 * plain_passes, name
    assert beside["code of the folder, package off"][0] == wanted
    assert beside["code of the folder, package off"][1] < 0.75 * plain_passes


def test_a_call_is_counted_once_by_whoever_counts(beside):
    for name, call in beside["calls"].items():
        assert call["tokens"] == 39, name  # the pass over the prompt is no round; it writes the first token
        assert call["rounds"] == call["passes"] - 1, name


def test_both_hooks_come_off(beside):
    assert beside["own methods"]
    assert beside["plain, package off"] == beside["plain"]


# ---- What is written ----


def test_a_saved_folder_names_and_holds_its_code(folders):
    folder = Path(folders[1])
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_poss.PosSConfig", "AutoModel": "modeling_poss.PosSModel"}
    for copied in (folder / "custom_generate").glob("*.py"):
        name = "custom_generate.py" if copied.name == "generate.py" else copied.name
        assert copied.read_bytes() == (PACKAGE / name).read_bytes()
    for copied in folder.glob("*.py"):
        assert copied.read_bytes() == (PACKAGE / copied.name).read_bytes()


def test_saving_and_loading_again_changes_no_file(folders, tmp_path):
    folder = Path(folders[1])
    PosSModel.from_pretrained(folder).save_pretrained(tmp_path)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == sum(file.is_file() for file in tmp_path.rglob("*"))
    for file in files:
        assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes(), file


def test_code_is_left_out_where_nothing_is_registered(poss, monkeypatch, tmp_path):
    monkeypatch.setattr(PosSModel, "_auto_class", None)
    monkeypatch.setattr(PosSConfig, "_auto_class", None)
    poss.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_registering_for_another_auto_class_is_kept(poss, monkeypatch, tmp_path):
    monkeypatch.setattr(PosSModel, "_auto_class", PosSModel._auto_class)  # put back afterwards
    PosSModel.register_for_auto_class("AutoModelForCausalLM")
    poss.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_poss.PosSConfig",
        "AutoModelForCausalLM": "modeling_poss.PosSModel",
    }


def test_only_the_main_process_writes(poss, tmp_path):
    poss.save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_the_code_is_uploaded_with_the_weights(poss, monkeypatch, tmp_path):
    uploaded = []

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        uploaded.extend(operation.path_in_repo for operation in operations)

    card = huggingface_hub.ModelCard("---\nlibrary_name: transformers\n---\n")
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *args, **kwargs: card)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    poss.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/PosS2-tiny")
    assert {"model.safetensors", "modeling_poss.py", "custom_generate/generate.py"} <= set(uploaded)
