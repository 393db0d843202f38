"""A model hub on this machine: what huggingface_hub asks of one to download a repository at a commit, and no more.

Source: huggingface_hub's file_download.py (get_hf_file_metadata) and hf_api.py (repo_info, list_repo_tree), 2.4.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import make_server


@dataclass
class Hub:
    """Its repositories, each at one commit, and what was asked of it."""

    #: By id: the commit, and the folder that holds its files.
    repositories: Mapping[str, tuple[str, Path]]
    url: str = ""
    #: (repository, revision, what) of every request.
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def files(self, repository: str) -> list[str]:
        """Paths of its files."""
        folder = self.repositories[repository][1]
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def app(self) -> Flask:
        """Its routes."""
        app = Flask("hub")

        @app.get("/<org>/<name>/resolve/<revision>/<path:path>")
        def resolve(org: str, name: str, revision: str, path: str) -> Response:
            repository = f"{org}/{name}"
            self.asked.append((repository, revision, path))
            if (missing := self._missing(repository, revision)) is not None:
                return missing
            if path not in self.files(repository):
                return _error("EntryNotFound")
            body = (self.repositories[repository][1] / path).read_bytes()
            headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": revision}
            answer = Response(body, headers=headers, mimetype="application/octet-stream")
            # As for a HEAD, whose answer states the length of what it leaves out.
            answer.automatically_set_content_length = request.method == "GET"
            answer.headers["Content-Length"] = str(len(body))
            return answer

        @app.get("/api/models/<org>/<name>/revision/<revision>")
        def about(org: str, name: str, revision: str) -> Any:
            repository = f"{org}/{name}"
            self.asked.append((repository, revision, "about"))
            if (missing := self._missing(repository, revision)) is not None:
                return missing
            siblings = [{"rfilename": path} for path in self.files(repository)]
            return {"id": repository, "sha": revision, "private": False, "tags": [], "downloads": 0} | {
                "siblings": siblings
            }

        @app.get("/api/models/<org>/<name>/tree/<revision>", defaults={"under": ""})
        @app.get("/api/models/<org>/<name>/tree/<revision>/<path:under>")
        def tree(org: str, name: str, revision: str, under: str) -> Any:
            repository = f"{org}/{name}"
            self.asked.append((repository, revision, f"tree {under}"))
            if (missing := self._missing(repository, revision)) is not None:
                return missing
            found = [path for path in self.files(repository) if not under or path.startswith(f"{under}/")]
            if under and not found:
                return _error("EntryNotFound")
            folder = self.repositories[repository][1]
            return [
                {"type": "file", "path": path, "size": (folder / path).stat().st_size, "oid": "0" * 40}
                for path in found
            ]

        return app

    def _missing(self, repository: str, revision: str) -> Response | None:
        if repository not in self.repositories:
            return _error("RepoNotFound")
        return None if self.repositories[repository][0] == revision else _error("RevisionNotFound")


@contextmanager
def serving(repositories: Mapping[str, tuple[str, Path]]) -> Iterator[Hub]:
    """A hub with these repositories, by id: commit and folder."""
    hub = Hub(repositories)
    server = make_server("127.0.0.1", 0, hub.app(), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _error(code: str) -> Response:
    return Response(code, status=404, headers={"X-Error-Code": code})
