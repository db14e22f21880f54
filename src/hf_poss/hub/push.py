"""Uploading specialists to the Hub."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..checkpoints import is_published_layout
from ..configuration_poss import PosSConfig
from .card import refresh_card
from .folder import check_weights, publishable_files, read_config
from .markdown import hub_name
from .record import TrainingRecord, read_training_record
from .tokenizer_reference import write_tokenizer_reference


__all__ = [
    "PushError",
    "complete_folder",
    "create_repo",
    "describe_upload",
    "push_command",
    "push_folder",
    "push_or_explain",
    "upload_files",
]

logger = logging.get_logger(__name__)

_REFUSALS = {
    401: "It does not accept the token, or there is none: `hf auth login`, or pass one with write access.",
    403: "The token may not write there: use one with write access to {repo_id}.",
    404: "It knows no {repo_id}, or hides it from this token: check the name, and that the token may see it.",
    409: "Somebody else changes {repo_id} at the same time: push again.",
    412: "Somebody else changes {repo_id} at the same time: push again.",
    413: "A file is larger than it takes.",
    429: "Too many requests for now.",
}
_TROUBLE = "It has trouble of its own: push again in a while."


class PushError(OSError):
    """The Hub could not be reached, or refused.

    Args:
        message: what happened, and what to do.
        status: HTTP status of the Hub's answer; None if there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload position specialists",
    endpoint: str | None = None,
    on_plan: Callable[[str], Any] = logger.info,
) -> str:
    """Uploads the specialists in `folder` in one commit; what the repository has already is not sent again.

    The folder is completed first, see [`complete_folder`]. What is uploaded: see [`publishable_files`].

    Args:
        folder: written by `save_pretrained`, the trainer or `hf-poss convert`.
        repo_id: `name` or `owner/name`; made if it is not there.
        private: of a repository that is made; the owner's default if not given.
        token: of the Hub; the one of `hf auth login` if not given.
        revision: branch, made if it is not there; `main` if not given.
        commit_message: of the commit.
        endpoint: address of the Hub; `HF_ENDPOINT`, or the public one, if not given.
        on_plan: is given the list of files with their sizes before anything is sent.

    Returns:
        URL of the repository.

    Raises:
        FileNotFoundError, ValueError: if the folder does not hold specialists that can be loaded, or `repo_id` is no
            name, before the Hub is called.
        PushError: if the Hub cannot be reached or refuses. The folder is complete, and the message has the command
            that pushes it later.
    """
    complete_folder(folder, repo_id)
    on_plan(describe_upload(folder))
    command = push_command(folder, repo_id, private, revision)
    full_name = create_repo(repo_id, command, private, token, endpoint)
    if full_name != repo_id:
        refresh_card(folder, full_name)  # whose examples load it by its name with the owner's
    return upload_files(folder, full_name, command, token, revision, commit_message, endpoint)


def push_or_explain(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> str | None:
    """[`push_folder`] for the end of a run: a push that fails is told, with the command for later, and loses nothing.

    Returns:
        URL of the repository, or None after a warning.
    """
    try:
        return push_folder(folder, repo_id, **kwargs)
    except (OSError, ValueError) as error:
        logger.warning(f"Not pushed to {repo_id}; everything is in {folder}. {error}")
        return None


def complete_folder(folder: str | os.PathLike, repo_id: str | None = None) -> PosSConfig:
    """Checks that the specialists in `folder` can be loaded, and adds the model card and the tokenizer's reference.

    A `README.md` of somebody else's stays.

    Raises:
        FileNotFoundError, ValueError: if they cannot be loaded, are in the public code's layout, or `repo_id` is no
            name on the Hub.
    """
    folder = Path(folder)
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"{repo_id!r} is no name on the Hub; expected `name` or `owner/name`. {error}") from error
    config = read_config(folder)
    if is_published_layout(str(folder), {}):
        raise ValueError(
            f"{folder} has the layout of the public code. Write it anew first, and push "
            f"that: hf-poss convert {shlex.quote(str(folder))} NEW_FOLDER"
        )
    check_weights(folder, config)
    write_tokenizer_reference(folder, config, read_training_record(folder) or TrainingRecord())
    refresh_card(folder, repo_id)
    return config


def describe_upload(folder: str | os.PathLike) -> str:
    """The files that a push uploads, with their sizes, and what it leaves out."""
    folder = Path(folder)
    names = publishable_files(folder)
    sizes = {name: (folder / name).stat().st_size for name in names}
    width = max(map(len, names))
    lines = [f"{len(names)} files of {folder}, {_bytes(sum(sizes.values()))}:"]
    lines += [f"  {name:{width}}  {_bytes(size):>9}" for name, size in sizes.items()]
    sent = {Path(name).parts[0] for name in names}
    if left := sorted(entry.name for entry in folder.iterdir() if entry.name not in sent):
        lines.append(f"left out: {', '.join(left)}")
    record = read_training_record(folder) or TrainingRecord()
    target = record.base_model or read_config(folder).target_name_or_path
    if hub_name(target) is None:
        named = f"named by a path ({target})" if target else "not named"
        lines.append(f"The target is {named}; say where others find it: --base_model OWNER/NAME")
    return "\n".join(lines)


def push_command(
    folder: str | os.PathLike, repo_id: str, private: bool | None = None, revision: str | None = None
) -> str:
    """The shell command that pushes `folder`."""
    words = ["hf-poss", "push", str(folder), repo_id, *(["--private"] if private else [])]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def create_repo(
    repo_id: str, command: str, private: bool | None = None, token: str | None = None, endpoint: str | None = None
) -> str:
    """Makes the repository if it is not there; returns its name with the owner's.

    Raises:
        PushError: if the Hub cannot be reached or refuses; it names `command` for later.
        ValueError: if it is to be private and there is a public one.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with _talking_to(api, repo_id, command):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_public = bool(private) and not api.repo_info(repo_id).private
    if is_public:
        raise ValueError(
            f"{repo_id} exists and is public. Make it private in its settings, choose another name, or push without "
            "--private."
        )
    return repo_id


def upload_files(
    folder: str | os.PathLike,
    repo_id: str,
    command: str,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload position specialists",
    endpoint: str | None = None,
) -> str:
    """Commits the publishable files of `folder` to a repository that is there; returns its URL.

    Raises:
        PushError: if the Hub cannot be reached or refuses; it names `command` for later.
    """
    folder = Path(folder)
    api = HfApi(endpoint=endpoint, token=token)
    operations = [CommitOperationAdd(name, folder / name) for name in publishable_files(folder)]
    with _talking_to(api, repo_id, command):
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


@contextlib.contextmanager
def _talking_to(api: HfApi, repo_id: str, command: str) -> Iterator[None]:
    # What is raised depends on who carries the bytes (httpx, its successor, hf_xet), and none of it is to end a run.
    try:
        yield
    except Exception as error:
        later = f"Push later: {command}"
        answer = _answer(error)
        if answer is not None and answer.response.status_code != 400:
            status = answer.response.status_code
            advice = _REFUSALS.get(status, _TROUBLE if status >= 500 else "").format(repo_id=repo_id)
            reason = f"{advice} ({_first_line(answer)})" if advice else _first_line(answer)
            raise PushError(f"{api.endpoint} answered {status}. {reason}. {later}", status) from error
        if isinstance(error, OfflineModeIsEnabled):
            raise PushError(f"The Hub is switched off by HF_HUB_OFFLINE. {later}") from error
        if answer is not None or isinstance(error, ValueError):  # metadata, names and files that the Hub does not take
            reason = " ".join(str(error).split()).rstrip(".")
            raise PushError(f"{api.endpoint} does not take it: {reason}. {later}", 400) from error
        raise PushError(
            f"{api.endpoint} cannot be reached, or its answer not be read ({type(error).__name__}: "
            f"{_first_line(error)}). {later}"
        ) from error


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer behind an error; the client wraps it, or fails while it handles it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no reason given")


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
