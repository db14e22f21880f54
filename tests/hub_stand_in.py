"""A stand-in of the Hub: the part of its HTTP interface that pushing and loading models needs, on the loopback.

What it answers was read from the client, huggingface_hub 1.33 and 2.4, which checks it.
"""

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants


USER = "me"
WRITE_TOKEN = "hf_writetoken"
READ_TOKEN = "hf_readtoken"
_LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt")


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """sha256 for large files, git's hash of a blob for others: what the client compares its own files with."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, File]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.commit_of(revision)]

    def commit(self, revision: str, files: dict[str, File], message: str) -> str:
        state = {**self.files(revision), **files}
        listing = json.dumps([len(self.messages), sorted((path, file.oid) for path, file in state.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = state
        self.branches[revision] = sha
        self.messages.append(message)
        return sha


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class HubStandIn:
    """Repositories in memory, and what was asked: `requests` holds (method, path), `committed` the paths of each
    commit, `stored` the sha256 of every large file that was sent."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.committed: list[list[str]] = []
        self.stored: list[str] = []
        self.endpoint = ""

    def environment(self, home: Path, token: str = WRITE_TOKEN) -> dict[str, str]:
        """Variables that send a process here, with an empty cache in `home`."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # large files then go the way of Git LFS, which is plain HTTP
            "HF_TOKEN": token,
            "OMP_NUM_THREADS": "1",
        }

    def serve(self, monkeypatch) -> None:
        """Sends this process here."""
        for name, value in (("ENDPOINT", self.endpoint), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def files_at(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        commit = self.repo(name).commit_of(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, self.repo(name).commits[commit]


@contextlib.contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Runs one on a free port of 127.0.0.1."""
    hub = HubStandIn()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubStandIn

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        try:
            self._route([part for part in path.split("/") if part])
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: object, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode())

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self) -> None:
        if self._token() not in (WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if self._token() != WRITE_TOKEN:
            raise Refusal(403, "You don't have the rights to write here")

    # ---- Routes ----

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._validate()
            case ["api", "models", owner, name, "preupload", revision]:
                self._preupload(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "branch", branch]:
                self._branch(f"{owner}/{name}", branch)
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", revision)
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision, *folder]:
                self._tree(f"{owner}/{name}", revision, "/".join(folder))
            case [owner, git, "info", "lfs", "objects", "batch"] if git.endswith(".git"):
                self._batch(f"{owner}/{git.removesuffix('.git')}")
            case ["lfs", oid]:
                self._store(oid)
            case ["lfs", oid, "verify"]:
                self._json({}, 200 if oid in self.state.large_files else 404)
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                raise Refusal(404, f"The stand-in has no {self.command} {self.path}")

    def _create(self) -> None:
        self._may_write()
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        if owner != USER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.state.endpoint}/{name}", "name": name}
        if name in self.state.repos:
            self._json({**answer, "error": "You already created this model repo"}, 409)
            return
        self.state.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json(answer)

    def _validate(self) -> None:
        """The Hub's own rules are more; these are those that it documents."""
        content = json.loads(self.body)["content"]
        errors = []
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        except yaml.YAMLError as error:
            data, errors = {}, [str(error)]
        for key in ("tags", "datasets"):
            if not isinstance(data.get(key, []), list):
                errors.append(f'"{key}" must be an array')
        for model in data.get("model-index", []):
            if not model.get("name"):
                errors.append('"model-index[0].name" is required')
            for result in model.get("results", [{}]):
                if not {"task", "dataset", "metrics"} <= result.keys() or not result["dataset"].keys() >= {
                    "type",
                    "name",
                }:
                    errors.append('"model-index[0].results" lacks task, dataset or metrics')
        self._json({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)

    def _preupload(self, name: str, revision: str) -> None:
        self._may_write()
        _, files = self.state.files_at(name, revision)
        answer = []
        for asked in json.loads(self.body)["files"]:
            base64.b64decode(asked["sample"], validate=True)
            path = asked["path"]
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(_LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": files[path].oid if path in files else None,
                }
            )
        self._json({"files": answer})

    def _batch(self, name: str) -> None:
        self._may_write()
        self.state.repo(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            action = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.state.large_files:
                url = f"{self.state.endpoint}/lfs/{asked['oid']}"
                action["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(action)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have the hash that was announced")
        self.state.large_files[oid] = self.body
        self.state.stored.append(oid)
        self._send(200, b"")

    def _branch(self, name: str, branch: str) -> None:
        self._may_write()
        repo = self.state.repo(name)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def _commit(self, name: str, revision: str) -> None:
        self._may_write()
        self.state.files_at(name, revision)
        repo, files, message = self.state.repo(name), {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.state.large_files:
                    raise Refusal(400, f"LFS pointer to an object that was never sent: {value['path']}")
                files[value["path"]] = File(self.state.large_files[value["oid"]], True)
            else:
                raise Refusal(400, f"Operation {item['key']!r} is not known")
        sha = repo.commit(revision, files, message)
        self.state.committed.append(sorted(files))
        url = f"{self.state.endpoint}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _may_read(self, name: str) -> None:
        if self.state.repo(name).private and self._token() not in (WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Repository not found", "RepoNotFound")

    def _info(self, name: str, revision: str) -> None:
        self._may_read(name)
        commit, files = self.state.files_at(name, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self.state.repo(name).private
        self._json({"id": name, "modelId": name, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        self._may_read(name)
        _, files = self.state.files_at(name, revision)
        inside = {path: file for path, file in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self._json(
            [
                {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 130}} if file.is_lfs else {})
                for path, file in sorted(inside.items())
            ]
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        self._may_read(name)
        commit, files = self.state.files_at(name, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self._send(200, file.content, headers)
