"interpret/streams and interpret/latents: exactness against sorting everything, hostile tokens, files."
from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.interpret.latents import LatentStats, collect, final_gain, interesting, logit_effects, selectivity, visible
from jumprelu_nb.interpret.streams import Best, bin_middle, bin_of, n_bins, random_keys, window_marks
from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE

g = torch.Generator().manual_seed(0)
tokens = torch.randint(12, (40, 9), generator=g)                                  # few tokens: many equal windows
acts = (torch.randn(40, 9, 15, generator=g) - 1).relu().mul(8).ceil()/8           # coarse: many ties
acts[..., 14] = 0
keep = torch.ones(40, 9, dtype=torch.bool); keep[:, 0] = False


def run(*parts, **kw):
    s = LatentStats(15, **{"top_k": 4, "sample": 3, "window": (2, 1)} | kw)
    for p in parts: s.update(tokens[p], acts[p], keep[p], first=p.start)
    return s


def same(a, b):
    assert (a.tokens, a.contexts) == (b.tokens, b.contexts)
    for k in ("count", "sum", "sum_sq", "hist"): assert torch.allclose(getattr(a, k).double(), getattr(b, k).double(), atol=1e-9), k
    for s in ("top", "sample"):
        for k in Best.fields: assert torch.equal(getattr(getattr(a, s), k), getattr(getattr(b, s), k)), (s, k)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 39), max_size=5, unique=True), st.booleans())
def test_any_split_and_merge_gives_the_same(cuts, merge):
    edges = [0, *sorted(cuts), 40]
    parts = [slice(a, b) for a, b in zip(edges, edges[1:])]
    s = run(*parts)
    if merge:
        s = run(parts[-1])
        for p in parts[:-1]: s.merge(run(p))
    same(s, run(slice(0, 40)))


def test_against_sorting_everything():
    s = run(slice(0, 40))
    for f in range(15):
        best = {}
        for c in range(40):
            for t in range(1, 9):
                if (a := float(acts[c, t, f])) > 0:
                    mark = tuple(tokens[c, max(0, t - 2):t + 1].tolist()) + (t < 2,)
                    if mark not in best or (-a, c*9 + t) < best[mark]: best[mark] = (-a, c*9 + t)
        expected = sorted(best.values())[:4]
        assert [(-c.value, c.position) for c in s[f].top] == expected
        for c in s[f].top:
            b, t = divmod(c.position, 9)
            lo, hi = max(0, t - 2), min(9, t + 2)
            assert c.ids == tokens[b, lo:hi].tolist() and c.at == t - lo
            assert c.acts == pytest.approx((acts[b, lo:hi, f]*keep[b, lo:hi]).tolist(), rel=.01)


def test_moments():
    s, a = run(slice(0, 40)), (acts*keep[..., None]).flatten(0, 1).double()
    assert s.tokens == 40*8 and torch.equal(s.count, (a > 0).sum(0)) and torch.equal(s.hist.sum(1), s.count)
    assert torch.allclose(s.frequency, (a > 0).double().sum(0)/s.tokens)
    for f in range(14):
        on = a[:, f][a[:, f] > 0]
        assert s.mean[f] == pytest.approx(on.mean().item()) and s.std[f] == pytest.approx(on.std(correction=0).item()) and s.max[f] == on.max()
        exact = on.sort().values
        for q in (.1, .5, .9): assert s.quantile(q)[f] == pytest.approx(float(exact[max(0, -int(-q*len(on)//1) - 1)]), rel=.0906)
    assert not s.alive[14] and "never fires" in str(s[14]) and s[14]._repr_html_() and s[14].top == []


def test_sample_is_uniform():
    "A latent that fires 400 times; over many seeds every firing is drawn equally often."
    T = torch.arange(400).view(4, 100)
    hits = torch.zeros(400)
    for seed in range(300):
        s = LatentStats(1, top_k=1, sample=10, window=(0, 0), seed=seed)
        s.update(T, torch.ones(4, 100, 1))
        hits[s.sample.position[0]] += 1
    assert hits.sum() == 3000 and hits.var() < 1.3*7.5*.975 and hits[:200].sum() == pytest.approx(1500, abs=150)


def test_signed_activations_are_ranked_by_magnitude():
    s = LatentStats(1, top_k=2, window=(0, 0))
    s.update(torch.tensor([[1, 2, 3]]), torch.tensor([[[1.], [-5.], [2.]]]))
    assert [c.value for c in s[0].top] == [-5., 2.] and s.sum[0] == -2 and s.count[0] == 3


def test_no_sample():
    s = run(slice(0, 40), sample=0)
    assert s[0].sample == [] and torch.equal(s.top.key, run(slice(0, 40)).top.key)
    with pytest.raises(ValueError, match="sample=10"): interesting(s)


def test_size_does_not_grow():
    def size(s): return sum(getattr(b, k).nbytes for b in (s.top, s.sample) for k in Best.fields) + s.hist.nbytes
    assert size(run(slice(0, 2))) == size(run(slice(0, 40)))


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-30, 1e30))
def test_bins(a):
    b = bin_of(torch.tensor([a]))
    assert 0 <= b < n_bins and (not 1e-3 < a < 4e3 or float(bin_middle(b)) == pytest.approx(a, rel=.0906))


def test_keys_depend_on_every_id_and_on_the_seed():
    i = torch.arange(1000)
    a = random_keys(i, i)
    assert torch.equal(a, random_keys(i, i)) and len(torch.cat([a, random_keys(i, i + 1), random_keys(i + 1, i), random_keys(i, i, seed=1)]).unique()) == 4000
    assert a.min() >= 0 and a.max() < 1


def test_marks_see_the_past_and_nothing_else():
    a, b = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[9, 2, 3, 4, 6]])
    assert (window_marks(a, 2) == window_marks(b, 2))[0].tolist() == [False, False, False, True, False]


hostile = ["<script>window.__xss=1</script>", "<img src=x onerror='window.__xss=2'>", "</script><b>", "\u202e", "&lt;", "'\"`", "\n", "\t", "\x00", "\u200b"]


def test_hostile_tokens_are_text():
    n = len(hostile)
    s = LatentStats(1, window=(n, n))
    s.update(torch.arange(n)[None], torch.ones(1, n, 1))
    s.strings, s.effects = dict(enumerate(hostile)), torch.arange(n, dtype=torch.int32).expand(1, 2, n)
    page = s[0]._repr_html_()
    assert not re.search(r"<(script|img|/script)", page) and not any(c in page for c in "\u202e\x00\u200b\t\n")
    for shown in ("&lt;script&gt;window.__xss=1&lt;/script&gt;", "&amp;lt;", "\\u202E", "↵", "⇥", "\\u0000", "\\u200B"): assert shown in page, shown
    assert page.count('dir="ltr"') == 2*len(s[0].top) - max(0, len(s[0].top) - 5)
    assert "\u202e" not in str(s[0]) and "\n" not in str(s[0].top[0])


@given(st.text())
def test_visible_is_printable(text): assert visible(text).isprintable()


def test_files(tmp_path):
    s = run(slice(0, 40))
    s.strings, s.about, s.effects = {1: "é\n", 2: "<b>"}, dict(site="resid_post.1"), torch.zeros(15, 2, 3, dtype=torch.int32)
    path = s.save(tmp_path/"new")
    again = LatentStats.load(tmp_path/"new")
    same(s, again)
    assert again.strings == s.strings and again.about == s.about and torch.equal(again.effects, s.effects) and str(again[2]) == str(s[2])
    assert [p.name for p in path.parent.iterdir()] == ["latents.safetensors"]
    again.merge(run(slice(0, 40)))
    for cut in (0, 5, 100, len(path.read_bytes()) - 1):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match="damaged"): LatentStats.load(tmp_path/"new")
    with pytest.raises(FileNotFoundError, match="no latents.safetensors"): LatentStats.load(tmp_path)


def test_errors():
    s = run(slice(0, 40))
    with pytest.raises(ValueError, match="differ in d_sae"): s.merge(LatentStats(3, window=(2, 1)))
    with pytest.raises(ValueError, match="differ in window"): s.merge(LatentStats(15, window=(3, 1)))
    with pytest.raises(ValueError, match="expected"): s.update(tokens, acts[..., :3])
    with pytest.raises(IndexError, match="no latent 15"): s[15]
    with pytest.raises(ValueError, match="at least one"): LatentStats(3, top_k=0)
    assert s[-1].index == 14


@pytest.mark.parametrize("kind,extra", [("llama", {}), ("gemma2", dict(head_dim=8)), ("gpt2", None), ("gpt_neox", {}), ("olmo", {})])
def test_final_gain_is_the_norm(kind, extra):
    "gain ⊙ (x − mean if centred), divided by its rms, is what the final norm computes, up to its bias."
    base = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, max_position_embeddings=40)
    cfg = dict(n_embd=32, n_layer=2, n_head=4, n_positions=40) if extra is None else base | extra
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=None, **cfg))
    for p in m.parameters(): torch.nn.init.normal_(p, 1., .3)
    class Tokenizer: bos_token_id, eos_token_id, pad_token_id = 0, 1, None
    lm = LanguageModel(m, Tokenizer(), kind)
    gain, centred = final_gain(lm)
    norm = [mod for name, mod in m.named_modules() if "norm" in type(mod).__name__.lower() and ".layers." not in name and ".h." not in name][-1]
    x = torch.randn(32, generator=g) + .5
    y = x - x.mean() if centred else x
    expected = gain*y/y.square().mean().sqrt()
    with torch.no_grad(): got = norm(x[None])[0] - (norm.bias if getattr(norm, "bias", None) is not None else 0)
    assert torch.allclose(got, expected, atol=1e-3) and centred == (kind in ("gpt2", "gpt_neox", "olmo"))
    assert logit_effects(SAE(32, 5).init_(0), lm, k=3)[0].shape == (5, 2, 3)
    with pytest.raises(ValueError, match="residual stream"): logit_effects(SAE(16, 5), lm)


@pytest.fixture(scope="module")
def found():
    lm = LanguageModel.load("embedded")
    sae = SAE(128, 200, JumpReLUGate(200, 20.), metadata=dict(site="resid_post.1", model_name="embedded", context_size=64)).init_(0)
    text = ["class A:\n    def f(self, x):\n        return self.g(x) + 1\n"*30, "import os, sys\nfor i in range(10): print(i)\n"*60]
    return lm, sae, text, collect(sae, lm, text, None, tokens=2500)


def test_collect(found):
    lm, sae, text, s = found
    assert s.tokens <= 2500 and s.about["site"] == "resid_post.1" and s.about["context_size"] == 64 and s.effects.shape == (200, 2, 8)
    assert all(t in s.strings for t in s.top.tokens[s.top.tokens >= 0].unique().tolist())
    latent = s[int(s.count.argmax())]
    joined = "".join(latent.top[0].tokens).replace(lm.tokenizer.decode([0]), "")
    assert any(part in "".join(text) for part in (joined, joined[:10])) and latent.promoted
    assert all(c.ids[c.at] not in lm.special_ids for c in latent.top + latent.sample), "special tokens are left out"
    smaller = collect(sae, lm, text, None, tokens=2500, batch_tokens=200)          # a matrix product rounds differently in another batch
    assert torch.allclose(s.count.double(), smaller.count.double(), atol=2) and torch.allclose(s.sum, smaller.sum, rtol=1e-3, atol=1)
    assert LatentStats.collect(sae, text=text, split=None, tokens=2500, effects=False).effects is None


def test_interesting_is_deterministic(found):
    s = found[3]
    assert s.interesting(4, seed=1) == s.interesting(4, seed=1) and len(set(s.interesting(4))) == len(s.interesting(4))
    assert all(bool(s.alive[i]) for i in s.interesting(10)) and s.interesting(0) == []
    share, token = selectivity(s)
    assert share.max() <= 1 and (share[~s.alive] == 0).all()


def test_collect_errors(found):
    lm, sae, text, _ = found
    with pytest.raises(ValueError, match="another site or model"): collect(SAE(64, 5, metadata=dict(site="resid_post.1")), lm)
    with pytest.raises(ValueError, match="names no site"): collect(SAE(128, 5), lm)
    with pytest.raises(ValueError, match="names no language model"): collect(SAE(128, 5))
    with pytest.raises(ValueError, match="more text"): collect(sae, lm, ["x"], None)
