"""The two hubs on loopback, as far as an upload needs them: what arrives lies in `repos`."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

USER = "tester"


class FakeHub(ThreadingHTTPServer):
    """Answers the routes of the Hugging Face Hub and of ModelScope that an upload uses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.made: dict[str, dict[str, Any]] = {}  # the wishes with which each was made
        self.messages: list[str] = []  # of the commits
        self.blobs: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[tuple[str, str, str]] = []  # method, path, Authorization
        self.refuse: dict[str, int] = {}  # part of a path: the HTTP status for it
        self.role = "write"  # of the token
        self.large = ".safetensors"  # what goes to large storage

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, path: str, content: bytes) -> None:
        self.repos[repo][path] = content


class Handler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: Any = None) -> None:
        data = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        authorization = self.headers.get("Authorization") or ""
        self.server.requests.append((self.command, path, authorization))
        for part, status in self.server.refuse.items():
            if part in path:
                # A careless hub that repeats the header, to see that nobody prints it.
                self.answer(status, {"error": f"refused {authorization}", "Message": authorization})
                return
        if self.command == "PUT":
            self.server.blobs[path.rpartition("/")[2]] = body
            self.answer(200)
        elif path.startswith(("/api/v1/", "/openapi/")):
            self.modelscope(path, json.loads(body or b"{}"))
        else:
            self.hugging_face(path, body)

    do_GET = do_POST = do_PUT = handle_any

    def batch(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        """Where to put large files: a signed address, whose signature is nobody's business."""
        signed = f"{self.server.url}/storage/{{}}?X-Amz-Signature=s3cr3tsignature"
        return {
            "objects": [
                {**item, "actions": {"upload": {"href": signed.format(item["oid"])}}}
                for item in objects
            ]
        }

    # -- Hugging Face -----------------------------------------------------------------------

    def hugging_face(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"displayName": "test", "role": hub.role}}
            self.answer(200, {"name": USER, "type": "user", "orgs": [], "auth": auth})
        elif path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---\n")
            valid = len(header) > 2 and isinstance(yaml.safe_load(header[1]), dict)
            self.answer(200, {"errors": [] if valid else [{"message": "bad"}], "warnings": []})
        elif path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish.get('organization') or USER}/{wish['name']}"
            known = name in hub.repos
            if not known:
                hub.repos[name], hub.made[name] = {}, wish
            self.answer(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answer = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(hub.large)],
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self.answer(200, {"files": answer})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", **self.batch(json.loads(body)["objects"])})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    hub.messages.append(value["summary"])
                elif item["key"] == "file":
                    hub.commit(name, value["path"], base64.b64decode(value["content"]))
                else:
                    hub.commit(name, value["path"], hub.blobs[value["oid"]])
            commit = {"commitUrl": f"{hub.url}/{name}/commit/0", "commitOid": "0" * 40}
            self.answer(200, commit)
        elif (name := path.removeprefix("/api/models/")) in hub.repos:
            private = hub.made[name].get("visibility") == "private"
            self.answer(200, {"id": name, "private": private, "siblings": []})
        else:
            self.answer(404)

    # -- ModelScope -------------------------------------------------------------------------

    def modelscope(self, path: str, body: dict[str, Any]) -> None:
        hub = self.server
        if path == "/openapi/v1/users/me":
            self.answer(200, {"success": True, "data": {"username": USER}})
        elif path == "/api/v1/models":
            name = f"{body['Path']}/{body['Name']}"
            if name in hub.repos:
                self.answer(400, {"Code": 10010101001, "Message": "already exists"})
                return
            hub.repos[name], hub.made[name] = {}, body
            self.answer(200, {"Code": 200, "Success": True, "Data": body})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"Code": 200, "Data": self.batch(body["objects"])})
        elif "/commit/" in path:
            name = path.removeprefix("/api/v1/repos/models/").split("/commit/")[0]
            hub.messages.append(body["commit_message"])
            for action in body["actions"]:
                is_large = action["type"] == "lfs"
                inline = base64.b64decode(action["content"])
                content = hub.blobs[action["sha256"]] if is_large else inline
                hub.commit(name, action["path"], content)
            self.answer(200, {"Code": 200, "Success": True, "Data": {"Id": "0"}})
        elif path.startswith("/openapi/v1/models/"):
            name = path.removeprefix("/openapi/v1/models/")
            private = hub.made[name]["Visibility"] == 1
            self.answer(200, {"success": True, "data": {"id": name, "private": private}})
        else:
            self.answer(404)


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
