"""Run by test_inputs.py: a data set on a loopback hub, read through huggingface_hub's own file system.

python tests/hub_dataset.py FOLDER: FOLDER/data holds Parquet files, the shards go to FOLDER/out.
"""

import http.server
import json
import os
import sys
import threading
from pathlib import Path

COMMIT = "c0ffee0000000000000000000000000000000000"
folder = Path(sys.argv[1])
files = {f"data/{path.name}": path.read_bytes() for path in sorted((folder / "data").iterdir())}
asked = []


def entry(name: str) -> dict:
    return {"type": "file", "path": name, "size": len(files[name]), "oid": f"{len(files[name]):040x}"}


class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, headers=()):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(206 if self.headers.get("Range") and isinstance(value, bytes) else 200)
        for name, text in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, api = self.path.split("?")[0].replace("%2F", "/"), "/api/datasets/me/icons"
        asked.append(path)
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.answer({"id": "me/icons", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            under = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            if under == "data" or "recursive=true" in self.path.lower():
                self.answer([entry(name) for name in files])
            else:
                self.answer([{"type": "directory", "path": "data", "oid": "0" * 40}])
        elif path.startswith(f"{api}/paths-info/{COMMIT}"):
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            known = [entry(name) for name in wanted if name in files]
            self.answer(known + [{"type": "directory", "path": "data", "oid": "0" * 40} for name in wanted if name == "data"])
        elif path.startswith(f"/datasets/me/icons/resolve/{COMMIT}/"):
            data = files[path.removeprefix(f"/datasets/me/icons/resolve/{COMMIT}/")]
            start, end = (self.headers.get("Range") or f"bytes=0-{len(data) - 1}").removeprefix("bytes=").split("-")
            self.answer(data[int(start) : int(end) + 1], [("ETag", '"1"'), ("X-Repo-Commit", COMMIT)])
        else:
            self.send_error(404)

    do_HEAD = do_POST = do_GET


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

from data_prep.build import Reading, Work, build  # noqa: E402 the endpoint is read at import
from data_prep.errors import UserError  # noqa: E402
from data_prep.inputs import expand  # noqa: E402

report = build(["hf://datasets/me/icons"], folder / "out", Reading(caption_column="text"), work=Work(1))
try:
    expand(["hf://datasets/me/nothing"])
except UserError as error:
    missing = str(error)
one = expand([f"hf://datasets/me/icons/{min(files)}"])
manifest = json.loads((folder / "out" / "manifest.json").read_text())
print(json.dumps({"report": report, "inputs": list(manifest["inputs"]), "missing": missing, "one": one}))
