"interpret/tally, reading, relations, store and collect: against brute force, in pieces, interrupted, on disk, with bad input."
from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.interpret import latents as room
from jumprelu_nb.interpret.latents import LatentStats, collect
from jumprelu_nb.interpret.reading import latent_at
from jumprelu_nb.interpret.relations import co_activation, decoder_neighbours, logit_effects, top_of_rows
from jumprelu_nb.interpret.store import model_fingerprint, read_tensors, sae_fingerprint, write_tensors
from jumprelu_nb.interpret.streams import Best, TokenSample, random_keys, window_marks
from jumprelu_nb.interpret.tally import Tally, n_cells, n_pre
from jumprelu_nb.sae import loops
from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.sparse import Active

g = torch.Generator().manual_seed(1)
C, T, M = 40, 9, 15
tokens = torch.randint(12, (C, T), generator=g)
acts = (torch.randn(C, T, M, generator=g) - 1).relu().mul(8).ceil()/8*torch.rand(M, generator=g).mul(6).exp2()
acts[..., 14] = 0
keep = torch.ones(C, T, dtype=torch.bool); keep[:, 0] = False
document = torch.arange(C*T).div(31, rounding_mode="floor").view(C, T)
offset = torch.arange(C*T).remainder(31).view(C, T)
theta = torch.rand(M, generator=g)
z = torch.randn(C, T, M, generator=g)


def run(*parts, listed=False, docs=True, **kw):
    s = LatentStats(M, **{"top_k": 4, "sample": 3, "window": (2, 1), "threshold": theta, "room": 300} | kw)
    for p in parts:
        a = acts[p]
        if listed:
            flat = a.flatten(0, 1)
            i, f = flat.nonzero(as_tuple=True)
            a = Active(i, f, flat[i, f], tuple(flat.shape))
        s.update(tokens[p], a, keep[p], first=p.start, documents=(document[p], offset[p]) if docs else None)
        s.update_pre(z[p][keep[p]])
    return s


def same(a, b):
    assert (a.tokens, a.contexts, a.pre_tokens) == (b.tokens, b.contexts, b.pre_tokens)
    for k in (*Tally.sums, "peak", "exponent"): assert torch.allclose(getattr(a, k).double(), getattr(b, k).double(), atol=1e-9), k
    for s in Tally.stores:
        for k in Best.fields: assert torch.equal(getattr(getattr(a, s), k), getattr(getattr(b, s), k)), (s, k)
    a.lists.settle(); b.lists.settle()
    assert whole(a.lists) == whole(b.lists)


def whole(lists): return sorted((k, tuple(l.tolist())) for k, l in zip(lists.key.tolist(), lists.latents.split(lists.size.tolist())))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, C - 1), max_size=5, unique=True), st.booleans(), st.booleans(), st.booleans(), st.randoms())
def test_any_split_and_any_order_of_merges(cuts, merge, listed, compiled, random):
    was = loops.compiled()
    try:
        loops.compiled(compiled and was)
        edges = [0, *sorted(cuts), C]
        parts = [slice(a, b) for a, b in zip(edges, edges[1:])]
        if merge:
            runs = [run(p, listed=listed) for p in parts]
            random.shuffle(runs)
            s = runs[0]
            for r in runs[1:]: s.merge(r)
        else: s = run(*parts, listed=listed)
    finally: loops.compiled(was)
    same(s, run(slice(0, C)))


def firings(f): # (|a|, position, window, document) of everything that counts
    for c in range(C):
        for t in range(1, T):
            if (a := float(acts[c, t, f])): yield a, c*T + t, (*tokens[c, max(0, t - 2):t + 1].tolist(), t < 2), int(document[c, t])


@pytest.mark.parametrize("k", [1, 4, 12, 40])
def test_one_per_document_and_no_window_twice(k):
    s = run(slice(0, C), top_k=k)
    for f in range(M):
        ranked = sorted(firings(f), key=lambda x: (-x[0], x[1]))
        docs, windows, of_docs, of_windows = set(), set(), [], []
        for e in ranked:
            if e[3] not in docs: docs.add(e[3]); of_docs.append(e)
            if e[2] not in windows: windows.add(e[2]); of_windows.append(e)
        kept = sorted({*of_docs[:k], *of_windows[:(k + 1)//2]}, key=lambda x: (-x[0], x[1]))
        chosen, docs, windows = [], set(), set()
        for strict in (True, False):
            for e in kept:
                if len(chosen) < k and e[2] not in windows and not (strict and e[3] in docs): chosen.append(e); docs.add(e[3]); windows.add(e[2])
        expected = sorted(chosen, key=lambda x: (-x[0], x[1]))
        top = s[f].top
        assert [(c.value, c.position, c.document) for c in top] == [(pytest.approx(a), p, d) for a, p, _, d in expected]
        assert all(c.offset == int(offset.flatten()[c.position]) for c in top)
        if len(of_docs) >= k and k <= 4: assert len({c.document for c in top}) >= min(len(top), k) - 1


def test_strata():
    s = run(slice(0, C), strata=2)
    for f in range(M):
        every = list(firings(f))
        if not every: assert s[f].strata == []; continue
        top = 2.
        while top <= max(a for a, *_ in every): top *= 2
        while top/2 > max(a for a, *_ in every): top /= 2
        strata = s[f].strata
        assert [x.low for x in strata] == sorted((x.low for x in strata), reverse=True) and sum(x.count for x in strata) == len(every) and strata[0].high == pytest.approx(max(a for a, *_ in every))
        for x in strata:
            inside = [e for e in every if x.low <= e[0] < x.low + top/n_cells]
            assert len(inside) == x.count
            best = {}
            for a, p, w, _ in inside:
                mark = window_marks(tokens, 2).flatten()[p:p + 1]
                key = float(random_keys(torch.tensor([f]), torch.tensor([p]), mark))
                if w not in best or key > best[w][0]: best[w] = (key, p)
            assert [c.position for c in x.contexts] == [p for _, p in sorted(best.values(), reverse=True)[:2]]


def test_pre_activations():
    s = run(slice(0, C))
    flat = z[keep]
    edges = s.pre_edges
    for f in range(M):
        rel = ((flat[:, f] - theta[f])/theta[f]).double()
        below = [int(((rel >= a) & (rel < b) & (rel <= 0)).sum()) for a, b in zip(edges[:n_pre//2].tolist(), edges[1:].tolist())]
        assert sum(abs(a - b) for a, b in zip(s.pre_hist[f, :n_pre//2].tolist(), below)) <= 4          # bins are found in float32
    assert LatentStats(3).pre_hist is None and LatentStats(3, threshold=torch.zeros(3)).pre_hist is None
    with pytest.raises(ValueError, match="have none"): LatentStats(3).update_pre(torch.zeros(1, 3))
    assert s[0].pre_histogram.tolist() == s.pre_hist[0].tolist() and s[0].threshold == pytest.approx(float(theta[0]))


def test_list_and_table_compiled_or_not():
    was, out = loops.compiled(), []
    for on in {False, was}:
        loops.compiled(on)
        try: out += [run(slice(0, 20), slice(20, C), listed=l) for l in (False, True)]
        finally: loops.compiled(was)
    for s in out[1:]: same(out[0], s)


def test_partners_are_those_of_a_dense_table():
    s = run(slice(0, C), room=10**6)
    on = (acts[keep] > 0).double()
    phi = torch.corrcoef(on.T).nan_to_num(-2).fill_diagonal_(-2)
    together = on.T @ on
    ids, score = co_activation(s.lists, M, k=5)
    expected = torch.where(together >= 3, phi, -2.).topk(5)
    assert torch.allclose(score.double(), expected.values.clamp_min(0), atol=1e-6)
    assert ((ids >= 0) == (expected.values > 0)).all()
    s = run(slice(0, C))                                                             # and from a part: exact on the tokens that were kept
    lists = s.lists.settle()
    assert int(lists.size.sum()) <= 300 and len(lists.key) < int(keep.sum())
    every = random_keys(torch.arange(C*T), window_marks(tokens, 2).flatten(), seed=1)
    chosen = torch.isin(every, lists.key) & keep.flatten()
    on = (acts.flatten(0, 1)[chosen] > 0).double()
    phi = torch.where(on.T @ on >= 3, torch.corrcoef(on.T).nan_to_num(-2).fill_diagonal_(-2), -2.)
    assert torch.allclose(co_activation(lists, M, k=4)[1].double(), phi.topk(4).values.clamp_min(0), atol=1e-6)
    assert co_activation(TokenSample(10), 4, k=2)[0].tolist() == [[-1, -1]]*4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 700), st.integers(1, 9), st.integers(0, 99))
def test_top_of_rows(n, m, k, seed):
    x = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    k = min(k, m)
    values, at = top_of_rows(x, k, block=8)
    assert torch.equal(values, x.topk(k).values) and torch.equal(x.gather(1, at), values) and all(len(set(r.tolist())) == k for r in at)


def test_neighbours():
    sae = SAE(8, 900).init_(0)
    sae.W_dec.data *= torch.rand(900, 1, generator=g) + .5
    d = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    ids, cosine = decoder_neighbours(sae, 6)
    assert torch.allclose(cosine, (d @ d.T).fill_diagonal_(-2).topk(6).values, atol=1e-6) and not (ids == torch.arange(900)[:, None]).any()


def test_index():
    s = run(slice(0, C))
    for t in range(12):
        found = {l: (n, share) for l, n, share in s.latents_of(t)}
        for f in range(M):
            latent = s[f]
            kept = {c.position: c for store in s.stores for i in (range(f*n_cells, f*n_cells + n_cells) if store == "strata" else [f]) for c in room_contexts(s, store, i)}
            n = sum(c.ids[c.at] == t for c in kept.values())
            assert found.get(f, (0, 0.)) == ((n, pytest.approx(n/len(kept))) if n else (0, 0.)), (t, f, latent)
    counts = [n for _, n, _ in s.latents_of(3)]
    assert counts == sorted(counts, reverse=True) and s.latents_of(99) == [] and s.latents_of("nothing") == []
    s.strings = {3: " import", 4: "import", 5: "\n"}
    assert s.latents_of(" import") == s.latents_of(3) and s.latents_of("import") == s.latents_of(4) and s.latents_of("\n") == s.latents_of(5)
    del s.strings[4]
    assert s.latents_of("import") == s.latents_of(3) and s.latents_of("") == []


def room_contexts(s, store, i):
    from jumprelu_nb.interpret.reading import _contexts
    return _contexts(s, getattr(s, store), i)


def test_size_does_not_grow():
    few, many = run(slice(0, 5), room=50), run(slice(0, C), room=50)
    few.lists.settle(); many.lists.settle()
    assert abs(few.nbytes - many.nbytes) <= 50*20 and few.nbytes < 15*15_000


def test_dead_latent():
    dead = run(slice(0, C))[14]
    assert (dead.frequency, dead.max, dead.top, dead.strata, dead.sample) == (0., 0., [], [], []) and dead.mean != dead.mean and "never fires" in str(dead)


# ------------------------------------------------------------------------------------------------ files
def test_files(tmp_path):
    s = run(slice(0, C))
    s.relate(SAE(4, M).init_(0), k=3)
    s.about, s.strings = dict(site="x", fingerprint=dict(sae="a"*24, model="b"*24)), {3: "é<b>"}
    s.save(tmp_path)
    again = LatentStats.load(tmp_path)
    same(s, again)
    assert again.about == s.about and again.strings == s.strings and torch.equal(again.partners, s.partners) and torch.equal(again.neighbour_cosine, s.neighbour_cosine) and again.latents_of(3) == s.latents_of(3)
    assert str(again[2]) == str(s[2]) and again[2].strata == s[2].strata and again[2].partners == s[2].partners
    half = run(slice(0, 20)); half.save(tmp_path/"half")
    half = LatentStats.load(tmp_path/"half")
    half.update(tokens[20:], acts[20:], keep[20:], documents=(document[20:], offset[20:])); half.update_pre(z[20:][keep[20:]])
    same(half, run(slice(0, C)))
    same(LatentStats.load(tmp_path/"half"), run(slice(0, 20)))                       # what is mapped may change, the file does not


def test_damaged_files(tmp_path):
    path = run(slice(0, C)).save(tmp_path)
    data = path.read_bytes()
    for bad in (b"", data[:7], data[:200], data[:-1], b"\xff"*8 + data[8:], data[:8] + b"{" + data[9:].replace(b"count", b"cou\xffnt", 1)):
        path.unlink(); path.write_bytes(bad)
        with pytest.raises(ValueError, match="collect the statistics again") as e: LatentStats.load(tmp_path)
        assert "\n" not in str(e.value)
    head, t = read_tensors(write_tensors(path, {"count": torch.zeros(3)}, {}))
    with pytest.raises(ValueError, match="another version"): LatentStats.load(tmp_path)
    with pytest.raises(ValueError, match="another version"): old_file(path); LatentStats.load(tmp_path)


def old_file(path): # as this library wrote it before there were strata
    from safetensors.torch import save_file
    t = dict(count=torch.zeros(3, dtype=torch.long)) | {f"{b}.{k}": torch.zeros(3, 1) for b in ("top", "sample") for k in ("key", "value", "position", "mark", "tokens", "acts")}
    save_file(t, path, {"jumprelu_nb": json.dumps(dict(window=[1, 1], seed=0, tokens=0, contexts=0, strings={}, about={}))})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the resident memory")
def test_opening_does_not_read(tmp_path):
    def resident(): return 1024*int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS:")).split()[1])
    s = LatentStats(8000, room=1000)
    path, size = s.save(tmp_path), s.nbytes
    del s
    before = resident()
    again = LatentStats.load(tmp_path)
    assert again[5].index == 5 and path.stat().st_size > .9*size > 60e6
    assert resident() - before < .2*size


# ------------------------------------------------------------------------------------------------ whose they are
def test_fingerprints(tmp_path):
    a, b = (SAE(8, 30, JumpReLUGate(30, .1)).init_(s) for s in (0, 1))
    assert sae_fingerprint(a) != sae_fingerprint(b) and sae_fingerprint(a) == sae_fingerprint(SAE.load(a.save(tmp_path)))
    wide = SAE(64, 100, JumpReLUGate(100, .1)).init_(0)
    mark = sae_fingerprint(wide); wide.W_enc.data[:, 50:] += 1
    assert sae_fingerprint(wide) != mark
    lm = LanguageModel.load("embedded")
    mark = model_fingerprint(lm)
    assert mark == model_fingerprint(LanguageModel.load("embedded"))
    lm.model.gpt_neox.layers[3].mlp.dense_h_to_4h.weight.data += .01
    assert mark != model_fingerprint(lm)


def test_merges_that_are_refused():
    s = run(slice(0, C))
    for other, said in ((run(slice(0, C), threshold=theta + 1), "thresholds"), (run(slice(0, C), seed=1), "differ in seed"), (run(slice(0, C), window=(1, 1)), "differ in window"), (run(slice(0, C), room=5), "room")):
        before = s.tokens
        with pytest.raises(ValueError, match=said): s.merge(other)
        assert s.tokens == before
    other = run(slice(0, C))
    s.about, other.about = (dict(sae=n, model_name="m", fingerprint=dict(sae=n*12, model="x")) for n in "ab")
    with pytest.raises(ValueError, match=r"SAE a \[aaaaaa\].*SAE b \[bbbbbb\]"): s.merge(other)


# ------------------------------------------------------------------------------------------------ collect
docs = [f"class A{i}:\n    def f(self, x):\n        return self.g(x) + {i}\n"*12 for i in range(6)] + ["import os, sys\nfor i in range(10): print(i)\n"*40]


@pytest.fixture(scope="module")
def lm(): return LanguageModel.load("embedded")


def made(seed=0, theta=20.): return SAE(128, 150, JumpReLUGate(150, theta), metadata=dict(site="resid_post.1", model_name="embedded", context_size=32)).init_(seed)


def test_collected(lm):
    sae = made()
    s = collect(sae, lm, docs, None, tokens=1600, batch_tokens=256)
    ids = torch.cat([i for i, _ in room.batches_of(lm, room._documents(docs, None, 0), 32, 8, 50)])
    x = lm.capture(ids, "resid_post.1")["resid_post.1"]
    dense = sae.encode(x)*room.keep_mask(lm, ids)[..., None]
    assert s.tokens == int(room.keep_mask(lm, ids).sum()) and torch.allclose(s.count.double(), (dense > 0).sum((0, 1)).double(), atol=2)
    zs = sae.pre_acts(x)[room.keep_mask(lm, ids)]
    assert s.pre_tokens == s.tokens, "a narrow SAE: all tokens"
    near = ((zs <= 20) & (zs > 0)).sum(0)
    assert (s.pre_hist[:, n_pre//4:n_pre//2].sum(1) - near).abs().max() <= 2
    read = [lm.tokenizer(d, add_special_tokens=False)["input_ids"] for d in room._documents(docs, None, 0)]
    some = [c for i in range(150) for c in [*s[i].top, *s[i].sample, *(c for x in s[i].strata for c in x.contexts)]]
    assert some and all(read[c.document][c.offset] == c.ids[c.at] for c in some), "document and place of every context"
    latent = s[int(s.count.argmax())]
    assert latent.promoted and len(latent.promoted_by) == len(latent.promoted) and latent.promoted_by[0] > 0 > latent.suppressed_by[0] and len(latent.neighbours) == 10
    ids_, by = logit_effects(sae, lm)
    assert torch.equal(ids_, s.effects) and torch.equal(by, s.effect_values)


def test_check(lm):
    sae = made()
    s = collect(sae, lm, docs, None, tokens=640)
    s.check(sae, lm); s.check(); s.check(lm=lm)
    with pytest.raises(ValueError, match=r"collected for SAE jumprelu 128 → 150 at resid_post.1 \[.*\] and model embedded \[.*\], not for SAE jumprelu 128 → 150 at resid_post.1 \[.*\] and model embedded"): s.check(made(1))
    with pytest.raises(ValueError, match="has 151"): s.check(SAE(128, 151).init_(0))
    other = LanguageModel.load("embedded"); other.name = "another"
    other.model.gpt_neox.embed_in.weight.data += .1
    with pytest.raises(ValueError, match="and model another"): s.check(lm=other)
    LatentStats(5).check(SAE(4, 5).init_(0))                                          # made by hand: they belong to nobody


class Killed(Exception): pass


@pytest.mark.parametrize("after", [1, 3, 6])
def test_resumed_is_uninterrupted(lm, tmp_path, monkeypatch, after):
    sae, kw = made(), dict(text=docs, split=None, tokens=1600, batch_tokens=256, save_every=-1)
    whole_ = collect(sae, lm, **kw)
    real, seen = room.take, []
    def take(*a, **k):
        if len(seen) == after: raise Killed
        seen.append(1)
        return real(*a, **k)
    monkeypatch.setattr(room, "take", take)
    with pytest.raises(Killed): collect(sae, lm, out=tmp_path, **kw)
    half = LatentStats.load(tmp_path)
    assert half.tokens < whole_.tokens
    seen = []
    monkeypatch.setattr(room, "take", lambda *a, **k: (seen.append(1), real(*a, **k)))
    s = collect(sae, lm, out=tmp_path, **kw)
    assert len(seen) == 7 - after
    same(s, whole_)
    assert s.about == whole_.about and s.strings == whole_.strings and torch.equal(s.partners, whole_.partners) and [p.name for p in tmp_path.iterdir()] == ["latents.safetensors"]
    same(LatentStats.load(tmp_path), whole_)
    seen = []
    same(collect(sae, lm, out=tmp_path, **kw), whole_)
    assert not seen, "it is complete"


def test_resume_of_something_else(lm, tmp_path):
    kw = dict(split=None, tokens=640, batch_tokens=256)
    collect(made(), lm, docs, out=tmp_path, **kw)
    with pytest.raises(ValueError, match="not the one from which"): collect(made(), lm, [*docs[1:], docs[0]], out=tmp_path, **kw)
    with pytest.warns(UserWarning, match="collected anew"): s = collect(made(1), lm, docs, out=tmp_path, **kw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(s, collect(made(1), lm, docs, out=tmp_path, **kw))


def test_nan(lm):
    bad = LanguageModel.load("embedded")
    bad.model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN or infinity at resid_post.1"): collect(made(), bad, docs, None, tokens=640)
    sae = made(); sae.b_enc.data[7] = float("inf")
    with pytest.raises(ValueError, match="activation of latent 7"): collect(sae, lm, docs, None, tokens=640)


@pytest.mark.parametrize("gate", ["relu", "topk", "abs_topk", "gated"])
def test_other_gates(lm, gate):
    sae = SAE(128, 150, dict(name=gate, k=5) if "topk" in gate else gate, metadata=dict(site="resid_post.1")).init_(0)
    s = collect(sae, lm, docs, None, tokens=640)
    on = sae.encode(lm.capture(torch.cat([i for i, _ in room.batches_of(lm, room._documents(docs, None, 0), lm.context_size, 8, 5)]), "resid_post.1")["resid_post.1"])[:, 1:].flatten(0, 1)
    assert (s.count - (on != 0).sum(0)).abs().max() <= 30 and s.alive.any()
    if gate == "abs_topk": assert any(c.value < 0 for i in range(150) for c in s[i].top) and (s.max >= 0).all()
    if gate in ("topk", "abs_topk", "relu"): assert s.pre_hist is None and s[0].pre_histogram is None
    i = int(s.count.argmax())
    assert latent_at(s, i).strata and s[i].top[0].value == pytest.approx(float(s.max[i])*(1 if s[i].top[0].value > 0 else -1))
