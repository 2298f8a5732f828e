"""A hub on this machine: the parts of the Hugging Face hub's protocol that downloads, listings and uploads use, and ways to break it.

`Hub` is a server with repositories in memory. `Worker` is a Python process whose huggingface_hub talks to it (HF_ENDPOINT is read on import, so it has to be another process than the tests')."""
from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    log: list[str] = field(default_factory=list)              # messages of commits

    def commit(self, files:dict[str, bytes], ref:str="main", message:str="") -> str:
        sha = hashlib.sha1(json.dumps([sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items()), len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        self.log.append(message)
        return sha

    def at(self, revision:str) -> str|None: return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    "Something to go wrong for the next `times` requests that fit."
    method: str
    pattern: str
    times: int = 1
    status: int = 0                                           # answer this
    code: str = ""                                            # with this X-Error-Code
    cut: int|None = None                                      # close the connection after so many bytes of the body
    content: bytes|None = None                                # send this instead, as if it were all
    wait: threading.Event|None = None                         # after the cut, wait before closing
    no_range: bool = False                                    # send the whole file even if a part is asked for


class Hub:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []        # method, path, Range
        self.lfs: dict[str, bytes] = {}
        self.tokens = {"reader": set(), "member": {"read"}, "writer": {"read", "write"}}      # what a token may do with gated and private repositories
        hub = self

        class Handler(_Handler):
            pass
        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()

    def repo(self, name:str, files:dict[str, bytes]|None=None, **kw) -> Repo:
        self.repos[name] = r = Repo(**kw)
        if files is not None: r.commit(files)
        return r

    def fault(self, method:str, pattern:str, times:int=1, **kw) -> Fault:
        self.faults.append(f := Fault(method, pattern, times, **kw))
        return f

    def clear(self) -> None:
        self.repos.clear(); self.faults.clear(); self.requests.clear(); self.lfs.clear()

    def bodies(self) -> list[str]: return [p for m, p, _ in self.requests if m == "GET" and ("/resolve/" in p or "/cdn/" in p)]

    def close(self) -> None:
        self.server.shutdown(); self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass
    def do_GET(self): self.answer("GET")
    def do_HEAD(self): self.answer("HEAD")
    def do_POST(self): self.answer("POST")
    def do_PUT(self): self.answer("PUT")

    def answer(self, method:str) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "chunked" not in (self.headers.get("Transfer-Encoding") or "") else self.chunks()
        hub.requests.append((method, path, self.headers.get("Range") or ""))
        fault = next((f for f in hub.faults if f.times > 0 and f.method == method and re.search(f.pattern, path)), None)
        if fault: fault.times -= 1
        with suppress(ConnectionError, BrokenPipeError):
            if fault and fault.status: return self.refuse(fault.status, fault.code)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
            if token and token not in hub.tokens: return self.send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            self.rights = hub.tokens.get(token, set()) if token else None
            if method == "POST" and path == "/api/repos/create": return self.create()
            if method == "POST" and path == "/api/validate-yaml": return self.json({"errors": [], "warnings": []})
            if m := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(\w+)/(.+)", path): return self.file(method, hub.repos[m[1]].commits[m[2]][m[3]], {}, fault)
            if m := re.fullmatch(r"/lfs/(\w+)", path):
                hub.lfs[m[1]] = self.body
                return self.send(200, b"")
            m = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|preupload|commit|branch)/(.+))?", path) or re.fullmatch(r"/([^/]+/[^/]+?)(\.git/info/lfs/objects/batch)()", path) or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+/.+)", path)
            if not m: return self.refuse(404, "")
            repo = hub.repos.get(m[1])
            if repo is None or repo.private and not self.rights: return self.refuse(404 if self.rights is not None else 401, "RepoNotFound")
            if m[2] == "resolve": return self.resolve(method, m[1], repo, *m[3].split("/", 1), fault)
            if m[2] in (None, "revision"): return self.info(m[1], repo, m[3] or "main")
            if "write" not in (self.rights or ()): return self.refuse(403 if self.rights is not None else 401, "")
            getattr(self, {"preupload": "preupload", "commit": "commit", "branch": "branch"}.get(m[2], "batch"))(m[1], repo, m[3])

    def chunks(self) -> bytes:
        out = b""
        while n := int(self.rfile.readline().split(b";")[0], 16): out += self.rfile.read(n); self.rfile.readline()
        self.rfile.readline()
        return out

    # ------------------------------------------------------------------------------------------------ answers
    def send(self, status:int, body:bytes, headers:dict[str, str]|None=None, length:int|None=None) -> None:
        self.send_response(status)
        for k, v in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def refuse(self, status:int, code:str) -> None: self.send(status, b'{"error":"no"}', {"X-Error-Code": code, "Content-Type": "application/json"} if code else {"Content-Type": "application/json"})
    def json(self, what:Any, status:int=200) -> None: self.send(status, json.dumps(what).encode(), {"Content-Type": "application/json"})

    def info(self, name:str, repo:Repo, revision:str) -> None:
        if (sha := repo.at(revision)) is None: return self.refuse(404, "RevisionNotFound")
        blobs = "blobs" in self.path
        self.json({"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                   "siblings": [{"rfilename": p, **({"size": len(c), "blobId": "0" * 40} if blobs else {})} for p, c in repo.commits[sha].items()]})

    def resolve(self, method:str, name:str, repo:Repo, revision:str, path:str, fault:Fault|None) -> None:
        if repo.gated and not (self.rights and "read" in self.rights): return self.refuse(403 if self.rights is not None else 401, "GatedRepo")
        if (sha := repo.at(revision)) is None: return self.refuse(404, "RevisionNotFound")
        if path not in repo.commits[sha]: return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = repo.commits[sha][path]
        head = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if path.endswith((".safetensors", ".npz", ".pt")):    # large files lie elsewhere
            return self.send(302, b"", head | {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content)), "Location": f"http://localhost:{self.hub.port}/cdn/{name}/{sha}/{path}"})
        self.file(method, content, head, fault)

    def file(self, method:str, content:bytes, head:dict[str, str], fault:Fault|None) -> None:
        if fault and fault.content is not None: content = fault.content
        first, status = 0, 200
        if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) and not (fault and fault.no_range):
            first, status = int(m[1]), 206
            if first >= len(content): return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            head = head | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        body = content[first:]
        if method == "GET" and fault and fault.cut is not None:
            self.send(status, body[:fault.cut], head, length=len(body))
            self.wfile.flush()
            if fault.wait: fault.wait.wait(30)
            self.close_connection = True
            return self.connection.close()
        self.send(status, body, head)

    # ------------------------------------------------------------------------------------------------ uploads
    def create(self) -> None:
        ask = json.loads(self.body)
        name = f"{ask.get('organization') or 'me'}/{ask['name']}"
        if "write" not in (self.rights or ()): return self.refuse(403 if self.rights is not None else 401, "")
        if name in self.hub.repos: return self.json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repo(name, {".gitattributes": b""}, private=bool(ask.get("private") or ask.get("visibility") == "private"))
        self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, name:str, repo:Repo, revision:str) -> None:
        self.json({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False, "oid": None} for f in json.loads(self.body)["files"]]})

    def batch(self, name:str, repo:Repo, _:str) -> None:
        self.json({"transfer": "basic", "objects": [{"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in json.loads(self.body)["objects"]]})

    def branch(self, name:str, repo:Repo, branch:str) -> None:
        if branch in repo.refs: return self.json({"error": "exists"}, 409)
        repo.refs[branch] = repo.refs["main"]
        self.json({})

    def commit(self, name:str, repo:Repo, revision:str) -> None:
        files, message = dict(repo.commits[repo.refs[revision]]), ""
        for line in map(json.loads, self.body.splitlines()):
            v = line["value"]
            if line["key"] == "header": message = v["summary"]
            if line["key"] == "file": files[v["path"]] = base64.b64decode(v["content"])
            if line["key"] == "lfsFile": files[v["path"]] = self.hub.lfs[v["oid"]]
        sha = repo.commit(files, revision, message)
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""})


# ------------------------------------------------------------------------------------------------ the other side
_loop = """
import json, os, sys, warnings
import torch
torch.set_num_threads(1)
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096                # what was received of a chunk is lost with its connection: 10 MB otherwise
import jumprelu_nb as jr
from jumprelu_nb.share import hub, publish
names = dict(jr=jr, torch=torch, hub=hub, publish=publish, os=os)
print("ready", flush=True)
for line in sys.stdin:
    here, said = dict(names, **json.loads(line)), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: exec(here["code"], here); got = dict(out=here.get("out"))
        except Exception as e: got = dict(error=type(e).__name__, message=str(e))
    print("=" + json.dumps(dict(got, warnings=[str(w.message) for w in caught])), flush=True)
"""


class Worker:
    "A process that loads SAEs from a hub at `endpoint`."
    def __init__(self, endpoint:str, home:Path, **env:str):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "http", "HTTP", "all_proxy", "ALL_PROXY"))}
        clean |= dict(HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_IMPLICIT_TOKEN="0", NO_PROXY="*", OMP_NUM_THREADS="1") | env
        self.process = subprocess.Popen([sys.executable, "-c", _loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean)
        assert self.process.stdout.readline().strip() == "ready"

    def start(self, code:str, **given:Any) -> None:
        self.process.stdin.write(json.dumps(dict(code=code, **given)) + "\n")
        self.process.stdin.flush()

    def __call__(self, code:str, **given:Any) -> dict[str, Any]:
        "Run code; what it puts into `out`, or its error."
        self.start(code, **given)
        for line in self.process.stdout:
            if line.startswith("="): return json.loads(line[1:])
        raise RuntimeError("the process ended")

    def close(self) -> None:
        self.process.kill(); self.process.wait()


def until(condition, seconds:float=20.) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(.02)
