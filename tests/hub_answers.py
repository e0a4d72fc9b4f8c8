"""How the loopback hub of tests/hub.py answers the requests of huggingface_hub 0.34 to 2.4.

Uploading: whoami-v2, repos/create, refs, tree, validate-yaml, preupload, LFS batch, PUT, verify, commit, tag.
Downloading: revision, tree, paths-info, HEAD and GET of resolve.
"""

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER, ORGANISATION = "hf_loopbackSecret0123", "me", "my-org"
LARGE = (".safetensors", ".onnx", ".png", ".jpg", ".bin", ".parquet")


class Refused(Exception):
    """An answer that is not 200: status, X-Error-Code, X-Error-Message."""


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def oid(path: str, data: bytes) -> str:
    """The hub's id of a file's content: sha256 for large files, git's sha1 for others."""
    return (
        hashlib.sha256(data).hexdigest()
        if is_large(path)
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


class Answers(http.server.BaseHTTPRequestHandler):
    """One request; ROUTES maps its method and path to an answer."""

    hub = None  # a hub.Hub

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        if self.hub.down:
            return self._drop()
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        # Read whole, or the client waits forever after a refusal.
        self.body = b"" if self.command == "PUT" else self._read()
        try:
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    self._authenticate()
                    if self.command != "PUT":
                        self.hub.log.append(f"{self.command} {path}")
                    return answer(self, *match.groups())
            raise Refused(404, "RepoNotFound", "Repository not found")
        except Refused as refused:
            status, code, message = refused.args
            self._answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _drop(self) -> None:
        """Break the connection: no answer, and a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _read(self, n: int | None = None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        left = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(left if n is None else min(n, left))

    def _answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _authenticate(self) -> None:
        authorization = self.headers.get("Authorization")
        self.user = USER if authorization == f"Bearer {TOKEN}" else None
        if authorization and not self.user:
            raise Refused(401, "", "Invalid credentials in Authorization header")

    def _repo(self, name: str, to_write: bool = False):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.user):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if to_write:
            self._check_rights(name.split("/")[0])
        return repo

    def _check_rights(self, namespace: str) -> None:
        if not self.user:
            raise Refused(401, "", "Invalid username or password.")
        if namespace not in (USER, ORGANISATION):
            raise Refused(
                403, "", f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            )

    def whoami(self) -> None:
        if not self.user:
            raise Refused(401, "", "Invalid username or password.")
        self._answer(
            {
                "type": "user",
                "name": USER,
                "orgs": [{"name": ORGANISATION}],
                "auth": {"accessToken": {"role": "write"}},
            }
        )

    def create(self) -> None:
        request = json.loads(self.body)
        name = f"{request['organization']}/{request['name']}"
        self._check_rights(request["organization"])
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self._answer({**url, "error": "You already created this model repo"}, 409)
        private = request.get("visibility") == "private" or request.get("private") is True
        self.hub.create(
            name, private, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        self._answer(url)

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        card, problems = yaml.safe_load(front[1]) if front else {}, []
        for model in card.get("model-index", []):
            for result in model.get("results", [{"dataset": {}}]):
                if (
                    not {"task", "metrics"} <= result.keys()
                    or not {"type", "name"} <= result["dataset"].keys()
                ):
                    problems.append({"message": f"model-index: {result}"})
        self._answer({"errors": problems, "warnings": []}, 400 if problems else 200)

    def preupload(self, name: str, revision: str) -> None:
        repo, entries = self._repo(name, to_write=True), json.loads(self.body)["files"]
        committed = repo.commits[repo.at(revision)]
        files = []
        for entry in entries:
            path = entry["path"]
            known = {"oid": oid(path, committed[path])} if path in committed else {}
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": False,
                    **known,
                }
            )
        self._answer({"files": files, "commitOid": repo.at(revision)})

    def batch(self, name: str) -> None:
        self._repo(name, to_write=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            objects.append(entry if entry["oid"] in self.hub.blobs else {**entry, "actions": actions})
        self._answer({"transfer": "basic", "objects": objects})

    def put_blob(self, sha256: str) -> None:
        with self.hub.lock:
            number, n = self.hub.cut or (0, 0)
            self.hub.cut = (number - 1, n) if number > 1 else None
            ends = number == 1
        if ends:
            self.hub.log.append(f"CUT {sha256} after {len(self._read(n))}")
            self.hub.down = True
            return self._drop()
        data = self._read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused(400, "", "The content is not what its sha256 says")
        self.hub.blobs[sha256] = data
        self.hub.log.append(f"PUT {sha256}")
        self._answer(b"")

    def verify(self) -> None:
        request = json.loads(self.body)
        if len(self.hub.blobs.get(request["oid"], b"")) != request["size"]:
            raise Refused(404, "", "Object does not exist")
        self._answer({})

    def commit(self, name: str, revision: str) -> None:
        repo, lines = self._repo(name, to_write=True), [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.commits[repo.at(revision)])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", repo.head) != repo.head:
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(
                        400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}"
                    )
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def tag(self, name: str, revision: str) -> None:
        repo, tag = self._repo(name, to_write=True), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refused(409, "", f"Tag {tag} already exists")
        repo.tags[tag] = repo.at(revision)
        self._answer({})

    def refs(self, name: str) -> None:
        repo = self._repo(name)
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()
        ]
        head = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}
        self._answer({"branches": [head], "converts": [], "tags": tags})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        sha = repo.at(revision or "main")
        files = [{"rfilename": path} for path in repo.commits[sha]]
        self._answer(
            {
                "id": name.removeprefix("datasets/"),
                "sha": sha,
                "private": repo.private,
                "siblings": files,
                "tags": [],
            }
        )

    def tree(self, name: str, revision: str, under: str | None = None) -> None:
        files = self._repo(name).commits[self._repo(name).at(revision)]
        inside = {path: data for path, data in files.items() if path.startswith(f"{under}/" if under else "")}
        if under and not inside:
            raise Refused(404, "EntryNotFound", "Entry not found")
        if self.query.get("recursive", "").lower() == "true":
            return self._answer([_entry(path, data) for path, data in inside.items()])
        depth = under.count("/") + 1 if under else 0
        folders = {"/".join(path.split("/")[: depth + 1]) for path in inside if path.count("/") > depth}
        here = [_entry(path, data) for path, data in inside.items() if path.count("/") == depth]
        self._answer(here + [_folder(path) for path in sorted(folders)])

    def paths_info(self, name: str, revision: str) -> None:
        files = self._repo(name).commits[self._repo(name).at(revision)]
        paths = json.loads(self.body)["paths"]
        known = [_entry(path, files[path]) for path in paths if path in files]
        self._answer(
            known + [_folder(path) for path in paths if any(other.startswith(f"{path}/") for other in files)]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha = self._repo(name).at(revision)
        if path not in self._repo(name).commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = self._repo(name).commits[sha][path]
        data = data[::-1] if path in self.hub.spoiled else data
        headers = {"ETag": f'"{oid(path, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-ETag": f'"{oid(path, data)}"', "X-Linked-Size": str(len(data))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            return self._answer(data[start : end + 1], 206, headers)
        self._answer(data, 200, headers)


def _entry(path: str, data: bytes) -> dict:
    large = {"lfs": {"oid": oid(path, data), "size": len(data), "pointerSize": 130}} if is_large(path) else {}
    git = hashlib.sha1(data).hexdigest() if large else oid(path, data)
    return {"type": "file", "path": path, "size": len(data), "oid": git, **large}


def _folder(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": "0" * 40}


_API, _ID = "/api/(?:models/|(?=datasets/))", r"((?:datasets/)?[^/]+/[^/]+?)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Answers.whoami),
    (("POST",), "/api/repos/create", Answers.create),
    (("POST",), "/api/validate-yaml", Answers.validate_yaml),
    (("POST",), rf"{_API}{_ID}/preupload/([^/]+)", Answers.preupload),
    (("POST",), rf"{_API}{_ID}/commit/([^/]+)", Answers.commit),
    (("POST",), rf"{_API}{_ID}/tag/([^/]+)", Answers.tag),
    (("GET",), rf"{_API}{_ID}/refs", Answers.refs),
    (("GET",), rf"{_API}{_ID}/revision/([^/]+)", Answers.info),
    (("GET",), rf"{_API}{_ID}/tree/([^/]+)(?:/(.+))?", Answers.tree),
    (("POST",), rf"{_API}{_ID}/paths-info/([^/]+)", Answers.paths_info),
    (("GET",), rf"{_API}{_ID}", Answers.info),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", Answers.batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", Answers.put_blob),
    (("POST",), "/lfs-verify", Answers.verify),
    (("GET", "HEAD"), rf"/{_ID}/resolve/([^/]+)/(.+)", Answers.resolve),
]
