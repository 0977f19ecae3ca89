"""A small Hugging Face Hub on 127.0.0.1: repositories in memory, by the HTTP calls that huggingface_hub makes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Stub:
    """What the server holds, and what it was asked.

    Attributes:
        repos: name → revision → files. `main` is always there.
        tokens: those that may read `private` repositories and write; every one that was seen stands in `seen`.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.allowed = "hf_secretSECRETsecret"
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.large: Files = {}
        self.url = ""

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def find(self, repo: str, revision: str) -> tuple[str, Files] | None:
        for name, files in self.repos.get(repo, {}).items():
            if revision in (name, self.commit(repo, name)):
                return self.commit(repo, name), files
        return None


@contextmanager
def serving() -> Iterator[Stub]:
    stub = Stub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stub": stub}))
    stub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    stub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in named.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.stub.allowed}"

    def route(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.stub.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def missing(self, code: str) -> None:
        self.answer(404 if code != "Unauthorized" else 401, {"error": "no"}, X_Error_Code=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.route()
        if parts[:2] == ["api", "models"]:
            self.about("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    def about(self, repo: str, rest: list[str]) -> None:
        if repo not in self.stub.repos or (repo in self.stub.private and not self.may):
            return self.answer(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.stub.find(repo, revision)
        if found is None:
            return self.missing("RevisionNotFound")
        commit, files = found
        if rest[:1] == ["tree"]:
            return self.answer(200, [_entry(name, content) for name, content in sorted(files.items())])
        names = [{"rfilename": name} for name in sorted(files)]
        return self.answer(
            200, {"id": repo, "modelId": repo, "sha": commit, "siblings": names, "private": False, "tags": []}
        )

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self.stub.find(repo, revision)
        if found is None or name not in found[1]:
            return self.missing("EntryNotFound")
        commit, content = found[0], found[1][name]
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        parts, body = self.route(), self.body()
        if parts[-1] == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.may:
            return self.missing("Unauthorized")
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        repo = "/".join(parts[2:4])
        if len(parts) > 4 and parts[4] == "preupload":
            asked = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": asked})
        if parts[-2:] == ["objects", "batch"]:
            return self.batch(json.loads(body))
        if len(parts) > 4 and parts[4] == "commit":
            return self.take(repo, parts[5], body)
        return self.answer(404)

    def do_PUT(self) -> None:
        parts = self.route()
        self.stub.large[parts[-1]] = self.body()
        self.answer(200)

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        self.stub.created.append(asked)
        there = repo in self.stub.repos
        self.stub.repos.setdefault(repo, {"main": {}})
        self.answer(409 if there else 200, {"url": f"{self.stub.url}/{repo}", "name": repo})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.stub.url}/store/{one['oid']}", "header": {}}},
            }
            for one in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def take(self, repo: str, revision: str, body: bytes) -> None:
        files = self.stub.repos[repo].setdefault(revision, {})
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                self.stub.messages.append(item["value"]["summary"])
            elif item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.stub.large[item["value"]["oid"]]
        commit = self.stub.commit(repo, revision)
        self.answer(
            200, {"commitOid": commit, "commitUrl": f"{self.stub.url}/{repo}/commit/{commit}", "hookOutput": ""}
        )


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
