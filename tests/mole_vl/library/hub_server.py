"""A small Hub on this machine: the endpoints that huggingface_hub's commits and downloads use.

What it keeps to: a commit names its parent, and is refused with 412 where that is not the last.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"


class Hub:
    """Repositories: for each, its commits in order, each a mapping of paths to contents."""

    def __init__(self):
        self.lock = Lock()
        self.repos = {}
        self.private = {}
        self.large = {}
        self.token = None
        # Called with the repository before a commit is looked at.
        self.before_commit = lambda _repo: None
        self.refused = 0

    def create(self, repo, private):
        with self.lock:
            self.private.setdefault(repo, private)
            self.repos.setdefault(repo, [("0" * 40, {".gitattributes": b""})])

    def files(self, repo, revision="main"):
        commits = self.repos[repo]
        return commits[-1] if revision == "main" else next(c for c in commits if c[0] == revision)

    def commit(self, repo, lines):
        header, *operations = (json.loads(line) for line in lines.splitlines())
        self.before_commit(repo)
        with self.lock:
            last, files = self.repos[repo][-1]
            if header["value"].get("parentCommit", last) != last:
                self.refused += 1
                return None
            new = dict(files)
            for operation in operations:
                value = operation["value"]
                new[value["path"]] = (
                    base64.b64decode(value["content"])
                    if operation["key"] == "file"
                    else self.large[value["oid"]]
                )
            oid = hashlib.sha1(f"{last}{len(self.repos[repo])}".encode()).hexdigest()
            self.repos[repo].append((oid, new))
            return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve()

    def do_HEAD(self):
        self.serve()

    def do_POST(self):
        self.serve()

    def do_PUT(self):
        self.serve()

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        token = f"Bearer {self.hub.token}"
        if self.hub.token and self.headers.get("Authorization", token) != token:
            return self.error(401, "RepoNotFound")
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return answer(self, body, **found.groupdict())
        return self.error(404, "EntryNotFound")

    def send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content, status=200):
        self.send(status, json.dumps(content).encode(), Content_Type="application/json")

    def error(self, status, code):
        self.send(status, b"{}", X_Error_Code=code)

    def create(self, body):
        said = json.loads(body)
        repo = f"{said.get('organization') or 'ann'}/{said['name']}"
        there = repo in self.hub.repos
        self.hub.create(repo, said.get("private") or said.get("visibility") == "private")
        url = f"http://{self.headers['Host']}/{repo}"
        self.json({"url": url, "id": repo}, 409 if there else 200)

    def known(self, repo):
        if repo in self.hub.repos:
            return True
        self.error(404, "RepoNotFound")
        return False

    def info(self, _, repo):
        if self.known(repo):
            self.json({"id": repo, "sha": self.hub.files(repo)[0], "siblings": []})

    def tree(self, _, repo, revision):
        if self.known(repo):
            files = self.hub.files(repo, revision)[1]
            self.json(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )

    def preupload(self, body, repo, revision):
        def mode(path):
            return "lfs" if path.endswith(LARGE) else "regular"

        if self.known(repo):
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.json(
                {
                    "files": [
                        {"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths
                    ]
                }
            )

    def batch(self, body, repo):
        host = self.headers["Host"]
        objects = [
            {**o, "actions": {"upload": {"href": f"http://{host}/large/{o['oid']}", "header": {}}}}
            for o in json.loads(body)["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def large(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.send(200)

    def commit(self, body, repo, revision):
        oid = self.hub.commit(repo, body)
        if oid is None:
            self.json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        else:
            address = f"http://{self.headers['Host']}/{repo}"
            self.json({"commitUrl": f"{address}/commit/{oid}", "commitOid": oid})

    def resolve(self, _, repo, revision, path):
        if self.known(repo):
            oid, files = self.hub.files(repo, revision)
            if path not in files:
                return self.error(404, "EntryNotFound")
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.send(200, files[path], ETag=etag, X_Repo_Commit=oid)
        return None

    def valid(self, body):
        assert json.loads(body)["content"].startswith("---\n")
        self.json({"errors": [], "warnings": []})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.valid),
    (("GET",), f"/api/models/{REPO}", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>\w+)", Handler.tree),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>\w+)", Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>\w+)", Handler.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/large/(?P<oid>\w+)", Handler.large),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>\w+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def hub_server():
    """A Hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
