"Text, store and activations under hostile input, interruption and restarts."
import json, os, random, subprocess, sys
from itertools import islice
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.data.activations import Activations, harvest, keep_mask
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.store import open_rows, write_rows
from jumprelu_nb.data.text import pack, stream_contexts, texts, token_stream

HASHED = 60   # files enough for some of them to be held out by their hash

@pytest.fixture(scope="module")
def lm(): return LanguageModel.load("embedded", device="cpu")

@pytest.fixture(scope="module")
def tokens(lm): return pack(lm, texts("stdlib", "validation"), 32, max_tokens=32*150)

@pytest.fixture
def no_bos(lm, monkeypatch):
    "The embedded model as if its tokenizer had no special token."
    other = LanguageModel(lm.model, lm.tokenizer, "no-bos")
    class Plain:
        eos_token_id = None
        def __call__(self, *a, **k): return lm.tokenizer(*a, **k)
    other.tokenizer, other.bos_id, other.special_ids = Plain(), None, torch.empty(0, dtype=torch.long)
    return other


# texts

def test_files(tmp_path):
    f = tmp_path/"f.txt"
    f.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert list(texts(f, None)) == list(texts(str(f), None)) == ["a\nb"]
    for bad in (b"a\0b", "é".encode("latin-1"), "é".encode("utf-16")):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match="f.txt' is not UTF-8 text"): texts(f)
    f.write_bytes(b"")
    assert list(texts(f)) == []

@pytest.mark.parametrize("text", ["x"*10_000, "line\n"*2000, "x"*9990 + "\n", "a", "ab\n", "é"*777])
def test_split_by_position(text):
    train, held = ("".join(texts([text], s)) for s in ("train", "validation"))
    assert train + held == text
    assert len(held) > 0
    assert len(text) < 2000 or .01*len(text) < len(held) <= .05*len(text) + 1

@given(st.lists(st.text(max_size=40), max_size=8))
@settings(max_examples=60, deadline=None)
def test_split_loses_nothing(docs):
    sides = [list(texts(docs, s)) for s in ("train", "validation")]
    assert "".join(sides[0] + sides[1]) == "".join(docs) == "".join(texts(docs, None))

def test_folder(tmp_path):
    with pytest.raises(ValueError, match="no UTF-8 text file"): texts(tmp_path)
    for i in range(HASHED):
        (tmp_path/f"d{i % 3}").mkdir(exist_ok=True)
        (tmp_path/f"d{i % 3}"/f"{i}.md").write_text(f"text {i}")
    assert len(list(texts(tmp_path, None))) == HASHED                      # no warning: all of it is text
    (tmp_path/".git").mkdir()
    (tmp_path/".git"/"x").write_text("hidden")
    (tmp_path/"weights.bin").write_bytes(bytes(range(256)))
    (tmp_path/"late.txt").write_bytes(b"fine "*5000 + b"\xff")             # undecodable far behind its start
    with pytest.warns(UserWarning, match=f"2 of {HASHED + 2} files left out"): train = list(texts(tmp_path, "train"))
    with pytest.warns(UserWarning): held = list(texts(tmp_path, "validation"))
    assert set(train) | set(held) == {f"text {i}" for i in range(HASHED)} and not set(train) & set(held)
    assert 0 < len(held) < HASHED/4
    with pytest.warns(UserWarning): assert train == list(texts(str(tmp_path), "train"))

def test_small_folder_by_position(tmp_path):
    for i in range(5): (tmp_path/f"{i}.txt").write_text(f"{i}\n"*1000)
    train, held = ("".join(texts(tmp_path, s)) for s in ("train", "validation"))
    assert train + held == "".join(f"{i}\n"*1000 for i in range(5)) and set(held) == {"4", "\n"}

def test_dataset_names(monkeypatch):
    import datasets
    docs = [{"text": str(i)} for i in range(100)]
    have, asked = {}, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or have)
    have.update(train=docs, test=docs[:3], validation=docs[:2])
    assert len(list(texts("org/name:config"))) == 100 and list(texts("org/name:config", "validation")) == ["0", "1"]
    assert asked[0] == (("org/name", "config"), {"streaming": True})
    del have["validation"]
    assert list(texts("org/name", "validation")) == ["0", "1", "2"]
    del have["test"]
    assert list(texts("org/name", "validation")) == ["19", "39", "59", "79", "99"] and len(list(texts("org/name"))) == 95
    have.clear(); have["other"] = docs
    with pytest.raises(ValueError, match="no split 'train', only other"): texts("org/name")

def test_dataset_objects():
    from datasets import Dataset
    d = Dataset.from_dict({"content": [str(i) for i in range(39)] + [None]})
    for source in (d, d.to_iterable_dataset()):
        assert list(texts(source, "validation")) == ["19"] and len(list(texts(source))) == 38

def test_unknown_dataset():
    for name in ("no/such-dataset", "a sentence, not a name", "nul\0byte", "x"*5000):
        with pytest.raises(ValueError, match="to use the string itself as text, pass a list"): texts(name)
    with pytest.raises(TypeError, match="not int"): texts(3)


# pack

@given(st.lists(st.text(alphabet="abc =\n\té\ud800", max_size=60), min_size=1, max_size=6), st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_pack_keeps_the_stream(lm, docs, T):
    stream = torch.cat([*token_stream(lm, docs), torch.empty(0, dtype=torch.int32)])
    if len(stream) < T - 1:
        with pytest.raises(ValueError, match=f"the text has {len(stream)} tokens"): pack(lm, docs, T)
        return
    c = pack(lm, docs, T)
    assert c.dtype == torch.long and (c[:, 0] == lm.bos_id).all()
    assert torch.equal(c[:, 1:].flatten(), stream[:len(c)*(T - 1)].long()) and len(stream) - len(c)*(T - 1) < T - 1

def test_pack_in_pieces_is_pack(lm):
    "Cutting long documents at line ends changes next to nothing, and never the text."
    doc = "".join(texts("stdlib", "validation"))[:250_000]
    ids = torch.cat(list(token_stream(lm, [doc])))
    assert lm.tokenizer.decode(ids.tolist()) == doc
    assert abs(len(ids) - len(lm.tokenize(doc))) < 10

def test_pack_without_bos(no_bos):
    c = pack(no_bos, ["a = 1\n"*50, "b"*100], 8)
    ids = torch.cat([no_bos.tokenize("a = 1\n"*50), no_bos.tokenize("b"*100)])
    assert torch.equal(c.flatten(), ids[:c.numel()])
    assert keep_mask(no_bos, c).sum() == c.numel() - len(c)

def test_separator_in_the_text(lm):
    c = pack(lm, ["x = 1<|endoftext|>"*20], 8)
    assert not keep_mask(lm, c)[c == 0].any()


# sources

ROWS = torch.randn(1003, 5, generator=torch.Generator().manual_seed(0))

def sources(lm, tokens, tmp_path):
    return dict(
        tensor=lambda: Activations.from_tensor(ROWS),
        blocks=lambda: Activations.from_blocks(lambda: iter(ROWS.split(37))),
        iterable=lambda: Activations.from_blocks(list(ROWS.split(300))),
        generator=lambda: Activations.from_blocks(x for _ in range(40) for x in ROWS.split(37)),
        lm=lambda: Activations.from_lm(lm, "resid_post.1", tokens, batch_contexts=7),
        stored=lambda: Activations.from_lm(lm, "resid_post.1", tokens, batch_contexts=7, cache=tmp_path),
        streamed=lambda: Activations.from_lm(lm, "resid_post.1", _Again(), context_size=32, batch_contexts=7))

class _Again:
    "A dataset of 20 documents."
    text = next(t for t in texts("stdlib", "train") if len(t) > 60_000)
    def __iter__(self): return ({"text": self.text[i*3000:i*3000 + 3000]} for i in range(20))
    def __repr__(self): return "records"

@pytest.mark.parametrize("name", ["tensor", "blocks", "iterable", "generator", "lm", "stored", "streamed"])
def test_resume_anywhere(lm, tokens, tmp_path, name):
    make = sources(lm, tokens, tmp_path)[name]
    kw = dict(batch_size=61, seed=3, buffer_tokens=700)
    loader, rng = make().loader(**kw), random.Random(name)
    whole, states = [], []
    for _ in range(100):
        states.append(json.loads(json.dumps(loader.state_dict())))
        whole.append(next(loader))
    assert all(x.shape == (61, loader.acts.d_in) and x.dtype == torch.float32 for x in whole)
    for at in [0, 1, 11, 99, *(rng.randrange(100) for _ in range(3))]:     # 11 batches are a round
        again = make().loader(**kw)
        if rng.random() < .5 and name != "generator": next(again)          # a loader that was already in use
        again.load_state_dict(states[at])
        for x, y in zip(islice(again, 25), whole[at:]): assert torch.equal(x, y)
    assert not torch.equal(next(make().loader(**{**kw, "seed": 4})), whole[0])

def test_the_mark_knows_rows_and_not_their_container(tmp_path):
    x = torch.randn(300, 8)
    np.save(tmp_path/"x.npy", x.numpy())
    marks = {Activations.from_tensor(v).mark for v in (x, x.numpy(), np.load(tmp_path/"x.npy", mmap_mode="r"))}
    assert len(marks) == 1 and Activations.from_tensor(x.double()).mark not in marks and Activations.from_tensor(x + 1e-6).mark not in marks

FRESH = """
import json, sys, torch
torch.set_num_threads(1)
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.text import pack, texts
lm = LanguageModel.load("embedded", device="cpu")
loader = Activations.from_lm(lm, "resid_post.2", pack(lm, texts("stdlib", "validation"), max_tokens=128*60)).loader(256, buffer_tokens=2048)
loader.load_state_dict(json.loads(sys.argv[1]))
torch.save([next(loader) for _ in range(20)], sys.argv[2])
"""

def test_resume_in_a_fresh_process(lm, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loader = Activations.from_lm(lm, "resid_post.2", pack(lm, texts("stdlib", "validation"), max_tokens=128*60)).loader(256, buffer_tokens=2048)
        for _ in range(13): next(loader)
        state = json.dumps(loader.state_dict())
        ours = [next(loader) for _ in range(20)]
    finally: torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", FRESH, state, str(tmp_path/"theirs.pt")], check=True)
    for x, y in zip(ours, torch.load(tmp_path/"theirs.pt", weights_only=True)): assert torch.equal(x, y)

@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_every_row_once_per_epoch(n, batch, buffer):
    if n < batch: return
    loader, seen = Activations.from_tensor(torch.arange(float(n))[:, None]).loader(batch, buffer_tokens=buffer), torch.zeros(n, dtype=torch.long)
    for _ in range(6):
        for x in islice(loader, loader.per_round): seen += x.flatten().long().bincount(minlength=n)
        assert seen.max() - seen.min() <= 1

def test_every_token_once(lm, tokens):
    acts = Activations.from_lm(lm, "resid_post.0", tokens)
    x = torch.cat([harvest(lm, "resid_post.0", t) for t in tokens.split(50)])
    assert acts.n_rows == len(x) == keep_mask(lm, tokens).sum()
    loader = acts.loader(acts.n_rows)
    for _ in range(2): torch.testing.assert_close(next(loader).sum(1).sort()[0], x.sum(1).sort()[0], rtol=1e-3, atol=1e-2)

def test_streamed_text_in_its_order(lm, tmp_path):
    acts = sources(lm, None, tmp_path)["streamed"]()
    expected = torch.cat([harvest(lm, "resid_post.1", t) for big in stream_contexts(lm, texts(_Again()), 32) for t in big.split(7)])
    assert acts.n_rows is None and torch.equal(acts.sample(2000), expected[:2000])
    got = torch.cat(list(islice(acts.loader(100, buffer_tokens=400), 4)))
    assert torch.equal(got.sum(1).sort()[0], expected[:400].sum(1).sort()[0])
    with pytest.raises(ValueError, match="a cache needs an end"): Activations.from_lm(lm, "resid_post.1", _Again(), context_size=32, cache=tmp_path)
    assert Activations.from_lm(lm, "resid_post.1", _Again(), context_size=32, max_tokens=32*9, cache=tmp_path).n_rows == 31*9

def test_sample(lm, tokens, tmp_path):
    for name, make in sources(lm, tokens, tmp_path).items():
        acts = make()
        a = acts.sample(600)
        assert torch.equal(a, acts.sample(600)) and torch.equal(a[:100], acts.sample(100)), name
        assert torch.equal(a, make().sample(600)), name
    assert len(Activations.from_tensor(ROWS).sample(9999)) == 1003
    front = harvest(lm, "resid_post.1", tokens[:8])
    assert not torch.equal(sources(lm, tokens, tmp_path)["lm"]().sample(len(front)), front)     # not the first file

@pytest.mark.parametrize("x", [
    ROWS.double(), ROWS.half(), ROWS.bfloat16(), (ROWS*10).int(), ROWS.T.contiguous().T, ROWS.clone().requires_grad_(), ROWS.numpy(), ROWS.double().numpy(),
    (ROWS*10).short().numpy(), ROWS.numpy()[::2], ROWS[:300].tolist()], ids=list("abcdefghijk"))
def test_makes_of_matrix(x):
    a = Activations.from_tensor(x)
    loader = a.loader(100)
    b = torch.cat([next(loader) for _ in range(a.n_rows//100)])
    assert b.dtype == a.sample(3).dtype == torch.float32 and not b.requires_grad
    full = {tuple(r) for r in torch.as_tensor(np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x)).float().tolist()}
    assert {tuple(r) for r in b.tolist()} <= full and len({tuple(r) for r in b.tolist()}) > 200

def test_memory_mapped_array(tmp_path):
    np.save(tmp_path/"x.npy", ROWS.numpy())
    x = np.load(tmp_path/"x.npy", mmap_mode="r")
    assert torch.equal(next(Activations.from_tensor(x).loader(50)), next(Activations.from_tensor(ROWS).loader(50)))

@pytest.mark.parametrize("x, error", [
    (torch.zeros(5), "shape"), (torch.zeros(5, 0), "shape"), (torch.zeros(0, 5), "no rows"), (torch.zeros(2, 3, 4), "shape"), (torch.zeros(3, 3, dtype=torch.cfloat), "real"),
    (torch.zeros(3, 3, dtype=torch.bool), "real"), (np.array([["a"]]), "real"), (np.array([[None]]), "real"), ([[1.], [2., 3.]], "array"), (7., "shape")])
def test_not_a_matrix(x, error):
    with pytest.raises((ValueError, TypeError), match=error): Activations.from_tensor(x)
    if isinstance(x, (torch.Tensor, np.ndarray)) and len(x):
        with pytest.raises((ValueError, TypeError), match=error): Activations.from_blocks([x])

def test_bad_blocks():
    for x in ([], iter([]), lambda: []):
        with pytest.raises(ValueError, match="no rows"): Activations.from_blocks(x)
    with pytest.raises(TypeError, match="iterable"): Activations.from_blocks(3)
    with pytest.raises(ValueError, match="no rows"): next(Activations.from_blocks([torch.zeros(0, 3)]).loader(2))
    with pytest.raises(ValueError, match="block 2 of mine is 4 wide"): next(Activations.from_blocks(lambda: [ROWS[:3], ROWS[:3], ROWS[:3, :4]], "mine").loader(8))

def test_loader_arguments():
    acts = Activations.from_tensor(ROWS)
    for kw in (dict(batch_size=0), dict(batch_size=8, buffer_tokens=0), dict(batch_size=1004)):
        with pytest.raises(ValueError): acts.loader(**kw)
    assert next(acts.loader(1003, buffer_tokens=1)).shape == (1003, 5)     # a buffer holds at least one batch
    loader = acts.loader(10)
    good = loader.state_dict()
    for bad in ({**good, "seed": 5}, {**good, "batch_size": 11}, {**good, "buffer_tokens": 3}, {**good, "source": "x"}, {"batches": 3}, {}):
        with pytest.raises(ValueError, match="state"): loader.load_state_dict(bad)
    assert loader.batches == 0
    with pytest.raises(ValueError, match="source"): Activations.from_tensor(ROWS + 1).loader(10).load_state_dict(good)

def test_generator_is_read_once():
    acts = Activations.from_blocks(x for x in ROWS.split(100))
    first = acts.loader(10)
    next(first)
    with pytest.raises(ValueError, match="only once"): next(acts.loader(10))
    with pytest.raises(ValueError, match="only once"): acts.sample(5)
    assert len(list(islice(first, 99))) == 99
    with pytest.raises(ValueError, match="only once"): next(first)
    with pytest.raises(ValueError, match="only once"): next(first)

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_blame_names_the_batch(bad):
    x = torch.arange(1000.)[:, None].repeat(1, 3)
    numbered = list(islice(Activations.from_tensor(x).loader(10, buffer_tokens=300), 100))
    for row in (0, 500, 999):
        k = next(i for i, b in enumerate(numbered) if (b == row).any())
        y = x.clone()
        y[row, 1] = bad
        loader = Activations.from_tensor(y).loader(10, buffer_tokens=300)
        with pytest.raises(ValueError, match=f"in 1 of 300 activations, first in batch {k} "):
            for served, b in enumerate(loader): assert torch.isfinite(b).all()
        with pytest.raises(ValueError, match=f"batch {k} "): next(loader)  # and again, if one insists

def test_large_finite_values_pass():
    x = torch.full((100, 4), 3e38)
    assert torch.equal(next(Activations.from_tensor(x).loader(50)), x[:50])

def test_interrupted_fill(lm, tokens, monkeypatch):
    make = lambda: Activations.from_lm(lm, "resid_post.1", tokens, batch_contexts=7).loader(100, buffer_tokens=1000)
    expected = list(islice(make(), 30))
    loader, capture, calls = make(), lm.capture, []
    def sometimes(*a):
        calls.append(1)
        if len(calls) % 9 == 0: raise KeyboardInterrupt
        return capture(*a)
    monkeypatch.setattr(lm, "capture", sometimes)
    got = []
    while len(got) < 30:
        try: got.append(next(loader))
        except KeyboardInterrupt: pass
    assert len(calls) > 9
    for x, y in zip(got, expected): assert torch.equal(x, y)


# on disk

def test_cache_is_reused(lm, tokens, tmp_path, monkeypatch):
    kw = dict(site="resid_post.1", text=tokens, cache=tmp_path/"deep"/"er")
    a = next(Activations.from_lm(lm, **kw).loader(500))
    assert len(list((tmp_path/"deep"/"er").iterdir())) == 1
    fresh = next(Activations.from_lm(lm, "resid_post.1", tokens).loader(500))
    torch.testing.assert_close(a, fresh, rtol=1e-3, atol=1e-2)             # the same rows, up to the last bits of a product
    monkeypatch.setattr(lm, "capture", None)
    assert torch.equal(next(Activations.from_lm(lm, **kw).loader(500)), a)
    assert torch.equal(next(Activations.from_lm(lm, **kw, batch_contexts=3).loader(500)), a)    # however it was or will be cut

def test_cache_knows_its_weights(lm, tokens, tmp_path):
    other = LanguageModel.load("embedded", device="cpu")
    Activations.from_lm(lm, "resid_post.1", tokens, cache=tmp_path)
    Activations.from_lm(other, "resid_post.1", tokens, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad(): other.model.get_submodule(other.site("resid_post.0").module).mlp.dense_h_to_4h.weight.mul_(1.01)
    Activations.from_lm(other, "resid_post.1", tokens, cache=tmp_path)
    Activations.from_lm(lm, "resid_post.1", tokens, cache=tmp_path, cache_dtype="float16")
    Activations.from_lm(lm, "resid_post.1", tokens[:-1], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4

def test_broken_caches(lm, tokens, tmp_path):
    make = lambda: Activations.from_lm(lm, "resid_post.1", tokens, cache=tmp_path)
    good = next(make().loader(500))
    path, = tmp_path.iterdir()
    data = path.read_bytes()
    for broken in (b"", b"garbage"*99, data[:100], data[:len(data)//3], data[:-9]):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match="damaged"): acts = make()
        assert torch.equal(next(acts.loader(500)), good)
    write_rows(path, [torch.zeros(len(open_rows(path)), 128)], 128, {"key": "another"})
    with pytest.warns(UserWarning, match="damaged"): assert torch.equal(next(make().loader(500)), good)

def test_killed_while_writing(tmp_path):
    code = f"""
import os, signal, torch
from jumprelu_nb.data.store import write_rows
def blocks():
    for i in range(10): yield torch.ones(1000, 8)
    os.kill(os.getpid(), signal.SIGKILL)
write_rows({str(tmp_path/'x.arrow')!r}, blocks(), 8, {{}})"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not (tmp_path/"x.arrow").exists() and open_rows(tmp_path/"x.arrow") is None

def test_unwritable(lm, tokens, tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(OSError, match="cannot write the activations to .*file"): Activations.from_lm(lm, "resid_post.1", tokens[:9], cache=tmp_path/"file")

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    import pyarrow as pa
    real = pa.OSFile
    monkeypatch.setattr(pa, "OSFile", lambda path, mode: (Path(path).touch(), real("/dev/full", mode))[1])
    with pytest.raises(OSError, match="cannot write the activations"): write_rows(tmp_path/"x.arrow", torch.zeros(50, 1000, 8), 8, {})
    assert list(tmp_path.iterdir()) == []

def test_context_of_special_tokens_only(lm, tokens, tmp_path):
    t = tokens[:40].clone()
    t[[0, 5, 39]] = 0
    for cache in (None, tmp_path):
        acts = Activations.from_lm(lm, "resid_post.0", t, cache=cache, batch_contexts=1)
        assert acts.n_rows == len(acts.sample(10**6)) == keep_mask(lm, t).sum()
    with pytest.raises(ValueError, match="no rows"): Activations.from_lm(lm, "resid_post.0", torch.zeros(3, 8, dtype=torch.long))


# memory

MEMORY = """
import torch
from jumprelu_nb.data.activations import Activations
acts = Activations.from_blocks(lambda: (torch.randn(4096, 128) for _ in range(1000)))
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))*1024
next(acts.loader(2048, buffer_tokens=8192))
before = peak()
loader = acts.loader(2048)
for _ in range(loader.per_round + 1): next(loader)
print((peak() - before)/(262_144*128*4))
"""

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_one_buffer():
    out = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout
    assert .5 < float(out) < 1.25, out
