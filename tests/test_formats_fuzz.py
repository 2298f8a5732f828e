"""Mutated files of every format: each loads, or ends in one `FormatError`; no crash, no hang, no write, no code run, nothing allocated that the file is not large enough for.

    pytest tests/test_formats_fuzz.py                                      1,000 mutations per format
    JUMPRELU_FUZZ=10000 pytest -p no:xdist tests/test_formats_fuzz.py      the full count; JUMPRELU_FUZZ_SEED=n draws others"""
from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from _formats import variants

from jumprelu_nb.share import files
from jumprelu_nb.share.exchange import load_sae
from jumprelu_nb.share.files import FormatError
from jumprelu_nb.share.formats import FORMATS

N, SEED = int(os.environ.get("JUMPRELU_FUZZ", 1000)), int(os.environ.get("JUMPRELU_FUZZ_SEED", 0))
strange = [None, True, False, -1, 0, 1, 2, 3.5, -0.0, 1e308, 2**31, 2**63, 2**70, 10**400, "", "x", "../../etc/passwd", "/etc/passwd", "nan", "\0", "x" * 1000, [], [1], {}, {"a": 1}, [[[[]]]], "topk", "jumprelu", "none", "float32", "I64", "F8_E4M3", "F64"]
values = [float("nan"), float("inf"), -float("inf"), -1., 0., -0., 1e-45, 3e38, 65504.]


# -- what must not happen --------------------------------------------------------------------------------------------------------
forbidden = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "socket.connect", "socket.bind", "shutil.rmtree", "exec",
             "compile", "ctypes.dlopen", "pickle.find_class", "tempfile.mkstemp", "webbrowser.open"}
watching: list[str]|None = None


def watch(event, args):
    if watching is None: return
    if event in forbidden: watching.append(f"{event} {args!r}"[:200])
    elif event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+") or args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)): watching.append(f"open {args!r}"[:200])


sys.addaudithook(watch)


# -- how files are spoiled -------------------------------------------------------------------------------------------------------
def spoil_bytes(data:bytes, r:random.Random) -> bytes:
    "Cut, flip, overwrite, insert, delete, repeat, zero, append."
    b, n = bytearray(data), len(data)
    if not n: return b"\0"
    at = r.choice([r.randrange(n), r.randrange(min(n, 400)), n - 1 - r.randrange(min(n, 400))])        # the directories are at both ends
    length = min(r.choice([1, 1, 2, 4, 8, 16, 100]), n - at)
    match r.randrange(9):
        case 0: del b[at:]
        case 1: b[at] ^= 1 << r.randrange(8)
        case 2: b[at:at + length] = r.randbytes(length)
        case 3: b[at:at] = r.randbytes(length)
        case 4: del b[at:at + length]
        case 5: b[at:at] = b[at:at + length]
        case 6: b[at:at + length] = bytes(length)
        case 7: b += r.randbytes(length)
        case 8: b[at:at + length] = b"\xff" * length
    return bytes(b)


def spoil_json(data:bytes, r:random.Random) -> bytes:
    "Remove, replace, add, rename or nest an entry, at any depth."
    try: tree = json.loads(data)
    except ValueError: return spoil_bytes(data, r)
    node = tree
    while isinstance(node, dict) and (inner := [v for v in node.values() if isinstance(v, (dict, list)) and v]) and r.random() < .6: node = r.choice(inner)
    if isinstance(node, list): node[r.randrange(len(node))] = r.choice(strange)
    elif node:
        k = r.choice(list(node))
        match r.randrange(5):
            case 0: del node[k]
            case 1: node[k] = r.choice(strange)
            case 2: node[r.choice(["W_enc", "k", "x" * 300, "threshold", "\0", "../x", "n" + k])] = r.choice(strange)
            case 3: node[k + "_"] = node.pop(k)
            case 4: node[k] = {k: node[k]}
    text = json.dumps(tree)
    if r.random() < .03: text = r.choice(['{"a": ' * 20_000, "[" * 20_000, text[:-1] + ', "k": NaN}', text[:-1] + ', "a": 1, "a": 2}', text + " " * 9_000_000, text.replace("1", "9" * 5000, 1)])
    return text.encode()


def spoil_safetensors(data:bytes, r:random.Random) -> bytes:
    "Spoil the header as JSON and put a fitting length before it."
    n, = struct.unpack("<Q", data[:8])
    head = spoil_json(data[8:8 + n], r)
    if r.random() < .5 and len(head) <= n: head = head.ljust(n)
    return struct.pack("<Q", len(head)) + head + data[8 + n:]


def spoil_zip(data:bytes, r:random.Random) -> bytes:
    "Spoil a member and pack the archive again, with sound checksums; or rename, drop, add, repeat or deflate members."
    with zipfile.ZipFile(io.BytesIO(data)) as z: members = [(i.filename, z.read(i)) for i in z.infolist()]
    i = next((j for j, (n, _) in enumerate(members) if n.endswith("data.pkl")), r.randrange(len(members))) if r.random() < .7 else r.randrange(len(members))
    name, content = members[i]
    if name.endswith(".npy") and r.random() < .7: content = content[:10] + spoil_bytes(content[10:128], r) + content[128:]
    match r.randrange(7):
        case 0 | 1 | 2: members[i] = name, spoil_bytes(content, r)
        case 3: members[i] = r.choice(["../../x", "/x", "x", name + "_", name.upper(), "W_enc.npy", "C:x", "a\0b"]), content
        case 4: del members[i]
        case 5: members.append((r.choice([name, "extra.npy", "a/data.pkl", "../x"]), content))
        case 6: members[i] = name, content * r.choice([0, 2, 3])
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", r.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])) as z:
        warnings.simplefilter("ignore")
        for n, c in members: z.writestr(n, c)
    out = bytearray(out.getvalue())
    if r.random() < .2 and (at := out.rfind(b"PK\x01\x02")) >= 0: out[at + r.choice([8, 10, 16, 20, 24, 42])] ^= 1 << r.randrange(8)
    return bytes(out)


def spoil_tensors(file:Path, r:random.Random) -> None:
    "Whole and well-formed, but with the wrong tensors: poisoned, negative, zero, mis-shaped, of another type, missing, surplus, renamed."
    import numpy as np
    from safetensors.torch import load_file, save_file
    if file.suffix == ".safetensors": t, put = load_file(file), lambda t: save_file(t, file)
    elif file.suffix == ".npz": t, put = {k: torch.from_numpy(v) for k, v in np.load(file).items()}, lambda t: np.savez(file, **{k: v.float().numpy() if v.dtype == torch.bfloat16 else v.numpy() for k, v in t.items()})
    else: t, put = torch.load(file, weights_only=True), lambda t: torch.save(t, file)
    table = t["ae"] if isinstance(t.get("ae"), dict) else t["sae"] if isinstance(t.get("sae"), dict) else t
    tensors = [k for k, v in table.items() if isinstance(v, torch.Tensor)]
    k = r.choice(tensors)
    v = table[k].clone()
    match r.randrange(10):
        case 0 if v.numel(): v.view(-1)[r.randrange(v.numel())] = r.choice(values) if v.is_floating_point() else -1
        case 1: v = -v.abs() if v.is_floating_point() else v
        case 2: v = torch.zeros_like(v)
        case 3: v = v.T.contiguous() if v.dim() == 2 else v[None].clone()
        case 4: v = v.flatten()[:r.choice([0, 1, 3])].clone()
        case 5: v = v.to(r.choice([torch.int64, torch.int8, torch.uint8, torch.bool, torch.float16, torch.float64]))
        case 6: table[r.choice(["extra", "W_enc", "threshold", "decoder.bias", "b_mag", "scaling_factor", "k"])] = v.clone()
        case 7: v = torch.cat([v, v]) if v.dim() else v.repeat(3)
        case 8: v = None
        case 9: table[r.choice(["w", "x.y", k.upper(), k.lower()])] = v.clone(); v = None
    if v is None: table.pop(k)
    else: table[k] = v
    put(t)


def spoil(file:Path, r:random.Random) -> str:
    "Spoil one file in one of the ways that fit it; what is spoiled already may fit only the plainest."
    data, how = file.read_bytes(), r.random()
    try: return _spoil(file, r, data, how)
    except (AssertionError, KeyboardInterrupt): raise
    except Exception: file.write_bytes(spoil_bytes(data, r)); return "bytes"


def _spoil(file:Path, r:random.Random, data:bytes, how:float) -> str:
    if file.suffix == ".json": name, new = ("json", spoil_json(data, r)) if how < .7 else ("bytes", spoil_bytes(data, r))
    elif how < .3: spoil_tensors(file, r); return "tensors"
    elif how < .6: name, new = "bytes", spoil_bytes(data, r)
    elif file.suffix == ".safetensors": name, new = "header", spoil_safetensors(data, r)
    else: name, new = "archive", spoil_zip(data, r)
    file.write_bytes(new)
    return name


# -- the test --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files(form, tmp_path, monkeypatch):
    "Loads or ends in FormatError."
    global watching
    
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    root = base/f"jumprelu_fuzz_{os.getpid()}_{form}"
    sources = []
    for i, (name, (f, make)) in enumerate(variants.items()):
        if f == form:
            case = make(tmp_path/str(i), 6, 12)
            load_sae(case.path, **case.given)                                       # and whatever is imported late
            sources.append((name, case.path.relative_to(tmp_path/str(i)), tmp_path/str(i)))
    asked = []
    plain = files.empty
    monkeypatch.setattr(files, "empty", lambda shape, dtype, device=None: (asked.append(torch.Size(shape).numel() * dtype.itemsize), plain(shape, dtype, device))[1])
    counts, slowest, r = Counter(), 0., random.Random(f"{form} {SEED}")
    try:
        for n in range(N):
            name, inside, source = r.choice(sources)
            shutil.rmtree(root, ignore_errors=True); shutil.copytree(source, root)
            todo = [p for p in root.rglob("*") if p.is_file()]
            ways = [spoil(r.choice(todo), r) for _ in range(r.choice([1, 1, 1, 2]))] if r.random() < .98 else [r.choice(todo).unlink() or "missing"]
            before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}
            size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
            asked.clear(); watching = []; start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sae = load_sae(root/inside, format=form, mmap=r.random() < .2)
                outcome = "loaded"
            except FormatError as e: outcome, said = "refused", str(e)
            finally: seen, watching = watching, None
            slowest = max(slowest, time.perf_counter() - start)
            where = f"{form}: mutation {n} of {name} ({ways})"
            assert not seen, f"{where}: {seen}"
            assert before == {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}, where
            assert sum(asked) <= 8*size + 1024, f"{where}: {sum(asked)} bytes for files of {size}"
            if outcome == "refused": assert len(said) < 2000 and "\n" not in said and "expected" in said and "found" in said, f"{where}: {said}"
            else:
                x = torch.randn(3, sae.d_in, dtype=sae.dtype)
                assert sae(x).shape[0] == 3 and sae.encode(x).shape == (3, sae.d_sae), where
            for w in ways: counts[f"{w} {outcome}"] += 1
    finally: shutil.rmtree(root, ignore_errors=True)
    assert slowest < 5, f"{slowest:.1f} s for one file"
    loaded = sum(v for k, v in counts.items() if k.endswith("loaded"))
    assert .05 < loaded / sum(counts.values()) < .8, counts                          # neither everything nor nothing
    print(f"\n{form}: {N} mutated files, {dict(sorted(counts.items()))}, slowest {1e3*slowest:.0f} ms")
