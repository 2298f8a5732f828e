"The hub, on a server that speaks its protocol and breaks it: what arrives is right, or nothing is there; every failure is one sentence."
from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import socket
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from _formats import inputs, variants
from _hub import Hub, Worker, until
from safetensors.torch import load_file, save_file

from jumprelu_nb.sae.model import SAE
from jumprelu_nb.share import cli
from jumprelu_nb.share.exchange import load_sae, save_as

LOAD = """
sae = jr.load_sae(repo, path, cache_dir=cache, **globals().get('how', {}))
x = torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(1))
out = dict(hub=sae.metadata["hub"], codes=sae.encode(x).double().sum().item(), y=sae(x).double().sum().item(), d_sae=sae.d_sae)
"""

QUICK = "hub.time.sleep = lambda s: None\nimport huggingface_hub.file_download as f; f.time.sleep = lambda s: None\n"      # the server does not need the rest


@pytest.fixture(scope="module")
def hub():
    h = Hub()
    yield h
    h.close()


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    w = Worker(hub.url, tmp_path_factory.mktemp("home"))
    yield w
    w.close()


@pytest.fixture(scope="module")
def offline(hub, tmp_path_factory):
    w = Worker(hub.url, tmp_path_factory.mktemp("home"), HF_HUB_OFFLINE="1")
    yield w
    w.close()


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    w = Worker(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("home"))
    yield w
    w.close()


@pytest.fixture(autouse=True)
def _fresh(hub):
    hub.clear()
    yield


@pytest.fixture
def cache(tmp_path): return str(tmp_path/"cache")


def made(folder:Path, seed:int=0, format:str="saelens", d:int=16, F:int=64) -> dict[str, bytes]:
    "The files of an SAE."
    sae = SAE(d, F, dict(name="jumprelu", threshold=.3), metadata=dict(model_name="gpt2", site="resid_post.6")).init_(seed).requires_grad_(False)
    save_as(sae, folder, format)
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def under(path:str, files:dict[str, bytes]) -> dict[str, bytes]: return {f"{path}/{k}": v for k, v in files.items()}


def told(folder:Path, files:dict[str, bytes], **how) -> dict:
    "What the same files give when they are read from a folder."
    for name, content in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(content)
    sae = load_sae(folder, **how)
    x = torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(1))
    return dict(codes=sae.encode(x).double().sum().item(), y=sae(x).double().sum().item(), d_sae=sae.d_sae)


def same(got:dict, want:dict) -> None:
    assert "error" not in got, got
    assert {k: got["out"][k] for k in want} == pytest.approx(want, rel=1e-6)


def nothing_loads(cache:str, offline:Worker, repo:str="me/first", path:str="") -> None:
    "No file in the cache passes for an SAE, or for a whole file."
    got = offline(LOAD, repo=repo, path=path, cache=cache)
    assert got.get("error") in ("HubError", "FormatError"), got
    for p in Path(cache).rglob("*"):
        if p.is_file() and "snapshots" in p.parts and p.name.endswith((".safetensors", ".npz", ".pt")): raise AssertionError(f"{p} is there")


# ------------------------------------------------------------------------------------------------ what is fetched
def test_only_what_is_needed(hub, online, offline, cache, tmp_path):
    files = made(tmp_path/"a")
    surplus = {"trainer_state.pt": b"x" * 1000, "features.html": b"x" * 1000, "sparsity.safetensors": b"x" * 100, "README.md": b"x"}
    r = hub.repo("me/first", under("small", files | surplus) | under("large", made(tmp_path/"b", 1)))
    got = online(LOAD, repo="me/first", path="small", cache=cache)
    same(got, told(tmp_path/"local", files))
    assert got["out"]["hub"] == dict(repo="me/first", path="small", revision=r.refs["main"]) and not got["warnings"]
    assert {p.rpartition("/")[2] for p in hub.bodies()} == {"cfg.json", "sae_weights.safetensors"}
    hub.requests.clear()
    same(online(LOAD, repo="me/first", path="small", cache=cache), told(tmp_path/"local", files))
    assert not hub.bodies(), "a second load fetches nothing"
    hub.requests.clear()
    same(offline(LOAD, repo="me/first", path="small", cache=cache), told(tmp_path/"local", files))
    same(offline(LOAD, repo="hf://me/first/small", path="", cache=cache), told(tmp_path/"local", files))
    assert not hub.requests


@pytest.mark.parametrize("name", [n for n in variants])
def test_every_format(name, hub, online, cache, tmp_path):
    "Fetched from the hub, every format gives what it gives from a folder; nothing is asked of it twice."
    case = variants[name][1](tmp_path/"made", 16, 64)
    root = tmp_path/"made"
    hub.repo("me/first", {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()})
    path = case.path.relative_to(root).as_posix().removeprefix(".")
    got = online("how = dict(cache_dir=cache, **given)\nsae = jr.load_sae('me/first', path, **how)\nx = torch.tensor(x)\nout = [sae.encode(x).double().sum().item(), sae(x).double().sum().item()]", cache=cache, path=path, given=case.given, x=inputs().tolist())
    assert "error" not in got, got
    sae = load_sae(case.path, **case.given)
    assert got["out"] == pytest.approx([sae.encode(inputs()).double().sum().item(), sae(inputs()).double().sum().item()], rel=1e-5)


def test_split_files(hub, online, offline, cache, tmp_path):
    files = made(tmp_path/"a")
    t = load_file(tmp_path/"a"/"sae_weights.safetensors")
    parts = {"sae_weights-00001-of-00002.safetensors": ["W_enc", "b_enc"], "sae_weights-00002-of-00002.safetensors": [k for k in t if k not in ("W_enc", "b_enc")]}
    for name, keys in parts.items(): save_file({k: t[k] for k in keys}, tmp_path/"a"/name); files[name] = (tmp_path/"a"/name).read_bytes()
    files["sae_weights.safetensors.index.json"] = json.dumps(dict(weight_map={k: n for n, keys in parts.items() for k in keys})).encode()
    whole = files.pop("sae_weights.safetensors")
    hub.repo("me/first", files)
    hub.fault("GET", r"00002-of-00002", 99, cut=50)
    assert online(QUICK + LOAD, repo="me/first", path="", cache=cache)["error"] == "HubError"
    assert offline(LOAD, repo="me/first", path="", cache=cache)["error"] == "FormatError", "one part of two is no SAE"
    hub.faults.clear()
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", dict(files, **{"sae_weights.safetensors": whole})))


# ------------------------------------------------------------------------------------------------ broken transfers
def big(tmp_path:Path) -> dict[str, bytes]: return made(tmp_path/"a", d=64, F=512)


@pytest.mark.parametrize("times", [1, 3])
def test_cut_in_the_middle_goes_on(times, hub, online, cache, tmp_path):
    "The transfer goes on where it broke."
    files = big(tmp_path)
    hub.repo("me/first", files)
    hub.fault("GET", r"sae_weights", times, cut=40_000)
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))
    asked = [r for m, p, r in hub.requests if m == "GET" and "sae_weights" in p]
    assert len(asked) == times + 1 and asked[-1].startswith("bytes=") or int(huggingface_hub.__version__.split(".")[0]) < 1, asked
    stored = next(p for p in Path(cache).rglob("sae_weights.safetensors"))
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == stored.resolve().name


def test_cut_by_a_server_without_ranges(hub, online, cache, tmp_path):
    files = big(tmp_path)
    hub.repo("me/first", files)
    hub.fault("GET", r"sae_weights", 1, cut=40_000)
    hub.fault("GET", r"sae_weights", 1, no_range=True)
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))


def test_cut_for_good_leaves_nothing(hub, online, offline, cache, tmp_path):
    files = big(tmp_path)
    hub.repo("me/first", files)
    hub.fault("GET", r"sae_weights", 999, cut=0)
    got = online(QUICK + LOAD, repo="me/first", path="", cache=cache)
    assert got["error"] == "HubError" and "the connection broke" in got["message"] and cache in got["message"], got
    nothing_loads(cache, offline)
    hub.faults.clear()
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))
    same(offline(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))


@pytest.mark.parametrize("change", [lambda b: b[:-100], lambda b: b + b"x" * 100, lambda b: b""], ids=["short", "long", "empty"])
def test_wrong_size(change, hub, online, offline, cache, tmp_path):
    "What arrives is not as long as the hub had said."
    files = big(tmp_path)
    hub.repo("me/first", files)
    hub.fault("GET", r"sae_weights", 2, content=change(files["sae_weights.safetensors"]))
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))      # the third attempt
    again = cache + "2"
    hub.fault("GET", r"sae_weights", 99, content=change(files["sae_weights.safetensors"]))
    got = online(QUICK + LOAD, repo="me/first", path="", cache=again)
    assert got["error"] == "HubError" and "arrived with another size than announced: try again later" in got["message"], got
    nothing_loads(again, offline)
    hub.faults.clear()
    same(online(LOAD, repo="me/first", path="", cache=again), told(tmp_path/"local", files))


def test_killed_in_the_middle(hub, online, offline, cache, tmp_path):
    files = big(tmp_path)
    hub.repo("me/first", files)
    wait = threading.Event()
    hub.fault("GET", r"sae_weights", 1, cut=40_000, wait=wait)
    w = Worker(hub.url, tmp_path/"home")
    w.start(LOAD, repo="me/first", path="", cache=cache)
    until(lambda: any("sae_weights" in p for p in hub.bodies()))
    w.close(); wait.set()
    nothing_loads(cache, offline)
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))


def test_another_content_of_the_same_size(hub, online, cache, tmp_path):
    "A proxy's page instead of the file: nothing is loaded from it, and force=True repairs the cache."
    files = big(tmp_path)
    hub.repo("me/first", files)
    hub.fault("GET", r"sae_weights", 1, content=(b"<html>please log in</html>" * 30_000)[:len(files["sae_weights.safetensors"])])
    got = online(LOAD, repo="me/first", path="", cache=cache)
    assert got["error"] == "FormatError" and "force=True fetches it again" in got["message"], got
    assert online(LOAD, repo="me/first", path="", cache=cache)["error"] == "FormatError"
    same(online(LOAD, repo="me/first", path="", cache=cache, how=dict(force=True)), told(tmp_path/"local", files))
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))


@pytest.mark.parametrize("method, where", [("GET", "/api/models"), ("GET", "sae_weights"), ("HEAD", "sae_weights"), ("GET", r"cfg\.json")])
@pytest.mark.parametrize("status", [500, 503])
def test_overloaded_then_well(method, where, status, hub, online, cache, tmp_path):
    files = made(tmp_path/"a")
    hub.repo("me/first", files)
    hub.fault(method, where, 2 if method == "GET" else 1, status=status)
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))


def test_overloaded_for_good(hub, online, cache, tmp_path):
    files = made(tmp_path/"a")
    hub.repo("me/first", files)
    hub.fault("GET", "/api/models", 4, status=503)
    got = online(LOAD, repo="me/first", path="", cache=cache)
    assert got["error"] == "HubError" and got["message"].startswith("The hub answers 503 for me/first: try again later"), got
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))
    hub.fault("GET", "/api/models", 4, status=502)
    got = online(LOAD, repo="me/first", path="", cache=cache)                     # the cache helps out, and says so
    same(got, told(tmp_path/"local", files))
    assert any("answers 502" in w and "from the cache" in w for w in got["warnings"]), got


# ------------------------------------------------------------------------------------------------ refusals
def message(got:dict, kind:str="HubError") -> str:
    assert got.get("error") == kind, got
    assert "\n" not in got["message"] and len(got["message"]) < 600, got["message"]
    return got["message"]


def test_gated(hub, online, cache, tmp_path):
    files = made(tmp_path/"a")
    hub.repo("google/gemma", files, gated=True)
    m = message(online(LOAD, repo="google/gemma", path="", cache=cache))
    assert m == f"google/gemma is gated: accept its terms on {hub.url}/google/gemma, then log in here with `hf auth login`, or set HF_TOKEN."
    m = message(online("os.environ['HF_TOKEN'] = 'reader'\ntry:\n" + "".join("    " + l + "\n" for l in LOAD.strip().splitlines()) + "finally: del os.environ['HF_TOKEN']", repo="google/gemma", path="", cache=cache))
    assert "is gated: accept its terms on" in m and "the token that is set here has no access yet" in m
    assert "has no access yet" in message(online(LOAD, repo="google/gemma", path="", cache=cache, how=dict(token="reader")))
    assert not list(Path(cache).rglob("*.safetensors"))
    same(online(LOAD, repo="google/gemma", path="", cache=cache, how=dict(token="member")), told(tmp_path/"local", files))


@pytest.mark.parametrize("token", ["", "reader"])
def test_gated_language_model(token, hub, online):
    hub.repo("google/gemma", {"config.json": b"{}"}, gated=True)
    got = online("if token: os.environ['HF_TOKEN'] = token\ntry: jr.LanguageModel.load('google/gemma')\nfinally: os.environ.pop('HF_TOKEN', None)", token=token)
    assert message(got, "PermissionError").startswith(f"google/gemma is gated: accept its terms on {hub.url}/google/gemma, then log in")


def test_missing(hub, online, cache, tmp_path):
    files = made(tmp_path/"a")
    hub.repo("me/first", under("small", files))
    hub.repo("me/secret", files, private=True)
    m = message(online(LOAD, repo="me/frist", path="", cache=cache))
    assert m.startswith(f"There is no folder me/frist here, and no repository me/frist on {hub.url} that may be seen without a token")
    assert "log in with `hf auth login`" in message(online(LOAD, repo="me/secret", path="", cache=cache))
    assert "has no revision 'v2'" in message(online(LOAD, repo="me/first", path="small", cache=cache, how=dict(revision="v2")))
    assert "does not accept the token" in message(online(LOAD, repo="me/first", path="small", cache=cache, how=dict(token="stale")))
    m = message(online(LOAD, repo="me/first", path="smal", cache=cache), "FormatError")
    assert m == "me/first/smal: expected the files of an SAE, found nothing. There are SAEs in small."
    m = message(online(LOAD, repo="me/first", path="", cache=cache), "FormatError")
    assert "There are SAEs in small." in m
    assert "leads elsewhere" in message(online(LOAD, repo="me/first", path="../../etc", cache=cache), "FormatError")
    same(online(LOAD, repo="me/secret", path="", cache=cache, how=dict(token="member")), told(tmp_path/"local", files))
    assert "is a folder or file here" in online("jr.load_sae(path, revision='main')", path=str(tmp_path/"a"))["message"]


def test_no_network(hub, online, offline, unreachable, cache, tmp_path):
    files = made(tmp_path/"a")
    hub.repo("me/first", files)
    m = message(offline(LOAD, repo="me/first", path="", cache=cache))
    assert m.startswith("There is no folder me/first here, and nothing of me/first in the cache ") and cache in m and "HF_HUB_OFFLINE" in m and "HF_HUB_CACHE" in m
    m = message(unreachable(LOAD, repo="me/first", path="", cache=cache))
    assert "could not be reached for me/first" in m and cache in m and "HF_HUB_OFFLINE=1" in m
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))
    got = unreachable(LOAD, repo="me/first", path="", cache=cache)
    same(got, told(tmp_path/"local", files))
    assert any("could not be reached" in w and "from the cache" in w for w in got["warnings"])
    got = offline(LOAD, repo="me/first", path="", cache=cache)
    same(got, told(tmp_path/"local", files))
    assert not got["warnings"], "who wants to be offline is not told that he is"
    m = message(offline(LOAD, repo="me/first", path="large", cache=cache), "FormatError")
    assert "Only the cache was looked at" in m
    m = message(offline(LOAD, repo="me/first", path="", cache=cache, how=dict(force=True)))
    assert "HF_HUB_OFFLINE" in m


def test_disk_is_full(hub, online, cache, tmp_path):
    hub.repo("me/first", made(tmp_path/"a"))
    code = "import huggingface_hub, errno\nold = huggingface_hub.hf_hub_download\ndef full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\nhuggingface_hub.hf_hub_download = full\ntry:\n" + "".join("    " + l + "\n" for l in LOAD.strip().splitlines()) + "finally: huggingface_hub.hf_hub_download = old"
    assert "free some space, or set HF_HUB_CACHE" in message(online(code, repo="me/first", path="", cache=cache))


# ------------------------------------------------------------------------------------------------ revisions
def test_revisions(hub, online, offline, cache, tmp_path):
    old, new = made(tmp_path/"a", 0), made(tmp_path/"b", 1)
    r = hub.repo("me/first", old)
    first = r.refs["main"]
    r.refs["v1"] = first
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"old", old))
    second = r.commit(new)
    got = online(LOAD, repo="me/first", path="", cache=cache)
    same(got, told(tmp_path/"new", new))
    assert got["out"]["hub"]["revision"] == second
    for revision in (first, "v1"): same(online(LOAD, repo="me/first", path="", cache=cache, how=dict(revision=revision)), told(tmp_path/"old", old))
    hub.requests.clear()
    same(online(LOAD, repo="me/first", path="", cache=cache, how=dict(revision=first)), told(tmp_path/"old", old))
    assert not hub.requests, "a commit that the cache has is asked of nobody"
    same(offline(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"new", new))
    same(offline(LOAD, repo="me/first", path="", cache=cache, how=dict(revision="v1")), told(tmp_path/"old", old))


def test_branch_moves_while_loading(hub, online, cache, tmp_path):
    "All files are of one commit."
    old, new = made(tmp_path/"a", 0), made(tmp_path/"b", 1, F=96)
    r = hub.repo("me/first", old)
    hub_fetch = "import huggingface_hub\nold = huggingface_hub.hf_hub_download\nn = []\ndef after(*a, **k):\n    got = old(*a, **k)\n    n.append(1)\n    if len(n) == 1:\n        import urllib.request; urllib.request.urlopen(move, data=b'')\n    return got\nhuggingface_hub.hf_hub_download = after\ntry:\n"
    moved = []
    original = hub.server.RequestHandlerClass.answer
    def answer(self, method):
        if self.path == "/move": moved.append(r.commit(new)); return self.send(200, b"")
        return original(self, method)
    hub.server.RequestHandlerClass.answer = answer
    try: got = online(hub_fetch + "".join("    " + l + "\n" for l in LOAD.strip().splitlines()) + "finally: huggingface_hub.hf_hub_download = old", repo="me/first", path="", cache=cache, move=hub.url + "/move")
    finally: hub.server.RequestHandlerClass.answer = original
    assert moved
    same(got, told(tmp_path/"old", old))
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"new", new))


# ------------------------------------------------------------------------------------------------ hostile repositories
class _Evil:
    def __reduce__(self): return os.system, ("touch evil",)


def test_pickles(hub, online, cache, tmp_path):
    with zipfile.ZipFile(tmp_path/"ae.pt", "w") as z: z.writestr("archive/data.pkl", pickle.dumps(_Evil())); z.writestr("archive/version", "3")
    hub.repo("me/evil", {"a/ae.pt": (tmp_path/"ae.pt").read_bytes(), "a/config.json": b"{}", "b/sae.pkl": pickle.dumps(_Evil()), "c/pytorch_model.bin": pickle.dumps(_Evil())})
    m = message(online(LOAD, repo="me/evil", path="a", cache=cache), "FormatError")
    assert "Nothing of it was run" in m
    hub.requests.clear()
    for path in ("b", "c", "b/sae.pkl"): assert "expected the files of an SAE" in message(online(LOAD, repo="me/evil", path=path, cache=cache), "FormatError")
    assert not hub.bodies(), "what no reader takes is not fetched"
    assert not Path("evil").exists()


def test_names_that_lead_elsewhere(hub, online, cache, tmp_path):
    files = made(tmp_path/"a")
    hub.repo("me/evil", {"../../../../outside.json": b"{}", "/etc/cfg.json": b"{}", "a\\b": b"", **files})
    same(online(LOAD, repo="me/evil", path="", cache=cache), told(tmp_path/"local", files))
    assert not list(tmp_path.rglob("outside.json"))
    got = online("out = sorted(jr.listing('me/evil', cache_dir=cache).files)", cache=cache)
    assert got["out"] == sorted(files)


def test_strange_answers(hub, online, cache):
    "An answer that is no listing ends in an error, not in a crash of the reader."
    for body in (b"", b"[]", b"{}", b'{"id": 3}', b"<html>"):
        hub.repo("me/first", {})
        original = hub.server.RequestHandlerClass.info
        hub.server.RequestHandlerClass.info = lambda self, *a: self.send(200, body, {"Content-Type": "application/json"})
        try: got = online(LOAD, repo="me/first", path="", cache=cache)
        finally: hub.server.RequestHandlerClass.info = original
        assert got["error"] in ("HubError", "FormatError"), (body, got)


# ------------------------------------------------------------------------------------------------ listing
def test_listing(hub, online, offline, cache, tmp_path):
    gs = made(tmp_path/"g", format="gemma_scope")
    hub.repo("google/gemma-scope-2b-pt-res", {f"layer_{L}/width_16k/average_l0_{n}/params.npz": gs["params.npz"] for L in (3, 20) for n in (22, 71, 150)} | {"README.md": b"x"})
    got = online("l = jr.listing('google/gemma-scope-2b-pt-res', cache_dir=cache)\nout = [str(l), l.saes, sum(l.files.values())]", cache=cache)["out"]
    assert "6 SAEs in 7 files" in got[0] and "layer_20/width_16k/  average_l0_22, average_l0_71, average_l0_150  [gemma_scope]" in got[0] and len(got[1]) == 6
    assert got[2] == 6*len(gs["params.npz"]) + 1
    assert not hub.bodies()
    got = online("place = jr.gemma_scope('google/gemma-2-2b', 'resid_post.20', cache_dir=cache)\nout = [*place, jr.load_sae(*place, cache_dir=cache).metadata]", cache=cache)["out"]
    assert got[:2] == ["google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"]
    assert {k: got[2][k] for k in ("model_name", "site", "l0", "width")} == dict(model_name="google/gemma-2-2b", site="resid_post.20", l0=71, width="16k")
    got = offline("l = jr.listing('google/gemma-scope-2b-pt-res', cache_dir=cache)\nout = [str(l), list(l.saes)]", cache=cache)["out"]
    assert "(in the cache): 1 SAE in 1 file" in got[0] and got[1] == ["layer_20/width_16k/average_l0_71"]
    assert "no SAE of layer_4" in online("jr.gemma_scope('google/gemma-2-2b', 'resid_post.4', cache_dir=cache)", cache=cache)["message"]


def test_command_line(hub, online, tmp_path):
    if "listing" not in inspect.getsource(cli.info_command): pytest.skip("jumprelu info does not ask the hub yet")
    hub.repo("me/first", under("small", made(tmp_path/"a")))
    got = online("import io, contextlib\nfrom jumprelu_nb.share.cli import main\no, e = io.StringIO(), io.StringIO()\nwith contextlib.redirect_stdout(o), contextlib.redirect_stderr(e): codes = [main(['info', 'me/first']), main(['info', 'me/frist'])]\nout = [codes, o.getvalue(), e.getvalue()]")["out"]
    assert got[0] == [0, 1] and "me/first at" in got[1] and "small  [saelens]" in got[1]
    assert got[2].startswith("error: There is no folder me/frist here, and no repository") and got[2].count("\n") == 1


# ------------------------------------------------------------------------------------------------ upload
PUSH = """
sae = jr.load_sae(folder)
sae.metadata.update(recipe=dict(name="practical", lr=.01), training_tokens=1000)
out = jr.push_to_hub(sae, repo, path, metrics=dict(l0=31.8, fvu=.076), token=token, **globals().get('how', {}))
"""


def test_push_and_load(hub, online, cache, tmp_path):
    files = made(tmp_path/"a")
    got = online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="writer")
    assert got.get("out") == f"{hub.url}/me/first", got
    r = hub.repos["me/first"]
    there = r.commits[r.refs["main"]]
    assert set(there) == {".gitattributes", "README.md", "cfg.json", "metrics.json", "sae_weights.safetensors"} and len(r.commits) == 2, "one commit"
    card = there["README.md"].decode()
    for part in ("library_name: saelens", "# first", "| L0, active latents per token | 31.8 |", "| lr | 0.01 |", 'sae = jr.load_sae("me/first")', "`resid_post.6` of `gpt2`"): assert part in card, part
    assert json.loads(there["metrics.json"]) == dict(l0=31.8, fvu=.076)
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local", files))
    assert "has cfg.json already" in message(online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="writer"))
    other = made(tmp_path/"b", 1)
    assert "error" not in online(PUSH, folder=str(tmp_path/"b"), repo="me/first", path="", token="writer", how=dict(overwrite=True, message="better"))
    assert r.log[-1] == "better"
    same(online(LOAD, repo="me/first", path="", cache=cache), told(tmp_path/"local2", other))
    got = online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="layer_6/small", token="writer", how=dict(revision="draft"))
    assert got["out"] == f"{hub.url}/me/first/tree/draft/layer_6/small" and "layer_6/small/cfg.json" not in r.commits[r.refs["main"]]
    same(online(LOAD, repo="me/first", path="layer_6/small", cache=cache, how=dict(revision="draft")), told(tmp_path/"local", files))


def test_push_a_run(hub, online, cache, tmp_path):
    "The folder of a run: its metrics go with it."
    files = made(tmp_path/"run")
    (tmp_path/"run"/"metrics.json").write_text(json.dumps(dict(l0=7.5, seed=0)))
    got = online("out = jr.push_to_hub(folder, 'me/run', private=True, license='apache-2.0', token='writer')", folder=str(tmp_path/"run"))
    assert "error" not in got, got
    r = hub.repos["me/run"]
    assert r.private and json.loads(r.commits[r.refs["main"]]["metrics.json"])["l0"] == 7.5 and b"license: apache-2.0" in r.commits[r.refs["main"]]["README.md"]
    same(online(LOAD, repo="me/run", path="", cache=cache, how=dict(token="member")), told(tmp_path/"local", files))


def test_push_refused(hub, online, offline, tmp_path):
    made(tmp_path/"a")
    assert "HF_HUB_OFFLINE forbids to write" in message(offline(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="writer"))
    assert "needs a token" in message(online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token=None))
    assert not hub.requests, "nothing is asked"
    assert "may not do this with me/first" in message(online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="member"))
    assert "does not accept the token" in message(online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="stale"))
    assert "me/first" not in hub.repos
    assert "is no name of a repository" in message(online(PUSH, folder=str(tmp_path/"a"), repo="first", path="", token="writer"), "ValueError")


def test_push_breaks_off(hub, online, tmp_path):
    "All of it or nothing."
    made(tmp_path/"a")
    hub.fault("POST", "/commit/", 99, status=500)
    assert "answers 500 for me/first" in message(online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="writer"))
    assert set(hub.repos["me/first"].commits[hub.repos["me/first"].refs["main"]]) == {".gitattributes"}
    hub.faults.clear()
    assert "error" not in online(PUSH, folder=str(tmp_path/"a"), repo="me/first", path="", token="writer")
