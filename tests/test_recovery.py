"evaluate/recovery: what protects the numbers and teaches nobody. Everything is compared with loops that follow the definitions."
from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from jumprelu_nb.data.synthetic import preset
from jumprelu_nb.evaluate.recovery import (Absorption, RecoveryStats, absorption, best_threshold, mcc, mmcs, oracle, recovered, recovery, similarity, uniqueness)
from jumprelu_nb.sae.gates import JumpReLUGate, ReLUGate
from jumprelu_nb.sae.model import SAE


def gen(seed=0): return torch.Generator().manual_seed(seed)


def toy(seed=0, n=400, M=7, G=9, d=5):
    "Random decoder, dictionary, latents and codes that have nothing to do with each other."
    g = gen(seed)
    W, D = torch.randn(M, d, generator=g), torch.randn(G, d, generator=g)
    acts = torch.randn(n, M, generator=g).relu()*(torch.rand(n, M, generator=g) < .5)
    codes = torch.rand(n, G, generator=g)*(torch.rand(n, G, generator=g) < .4)
    x = codes @ D
    return W, D, acts, codes, x, acts @ W


class Signed:
    "An SAE whose activations are all negative, along −D."
    device, dtype, metadata = torch.device("cpu"), torch.float32, {}
    def __init__(self, D): self.W_dec, (self.d_sae, self.d_in), self.inverse = -D, D.shape, torch.linalg.pinv(D)
    def encode(self, x): return -(a := x @ self.inverse)*(a > .1)
    def decode(self, acts): return acts @ self.W_dec


# ------------------------------------------------------------------------------------------------ directions
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_mcc_tries_all_assignments(M, G, d, seed):
    g = gen(seed)
    W, D = torch.randn(M, d, generator=g, dtype=torch.float64), torch.randn(G, d, generator=g, dtype=torch.float64)
    c = [[abs(float(w @ v))/float(w.norm()*v.norm()) for v in D] for w in W]
    short, long = (c, list(zip(*c)))[M > G], max(M, G)
    want = max(sum(short[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(long), min(M, G)))/min(M, G)
    assert mcc(W, D) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_scores_by_loops(seed):
    W, D = (torch.randn(k, 4, generator=gen(seed + i), dtype=torch.float64) for i, k in enumerate((6, 8)))
    W[2] = 0
    c = [[0. if w.norm() == 0 else float(w @ v)/float(w.norm()*v.norm()) for v in D] for w in W]
    assert similarity(W, D).tolist() == [pytest.approx(r, abs=1e-12) for r in c]
    assert mmcs(W, D) == pytest.approx(sum(map(max, c))/6)
    assert mmcs(W, D, signed=False) == pytest.approx(sum(max(map(abs, r)) for r in c)/6)
    assert mmcs(W, D, of="features") == pytest.approx(sum(max(r[j] for r in c) for j in range(8))/8)
    assert recovered(W, D, at=.5) == sum(max(r[j] for r in c) > .5 for j in range(8))/8
    nearest = {max(range(8), key=lambda j: abs(r[j])) for i, r in enumerate(c) if i != 2}
    assert uniqueness(W, D) == len(nearest)/6


def test_signed_mmcs_of_chance():
    "E max of G cosines, from the density of one: ∫ 1 − Fᴳ over [0, 1] − ∫ Fᴳ over [−1, 0]"
    from scipy.special import betainc
    d, G, u = 16, 50, torch.linspace(0, 1, 4001, dtype=torch.float64)
    half = torch.from_numpy(betainc(.5, (d - 1)/2, u.square().numpy()))
    want = torch.trapezoid(1 - ((1 + half)/2)**G, u) - torch.trapezoid(((1 - half)/2)**G, u)
    g = gen()
    assert mmcs(torch.randn(20_000, d, generator=g), torch.randn(G, d, generator=g)) == pytest.approx(float(want), abs=.01)


def test_bounds_with_few_and_many_latents():
    D = torch.eye(6)
    assert (mcc(D[:2], D), mmcs(D[:2], D), recovered(D[:2], D), uniqueness(D[:2], D)) == (1, 1, 2/6, 1)
    many = torch.cat([D, D])
    assert (mcc(many, D), mmcs(many, D, of="features"), recovered(many, D), uniqueness(many, D)) == (1, 1, 1, .5)
    assert (mcc(D[:1], D[:1]), mcc(D[:1], D[1:2])) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    D = torch.randn(5, 8, generator=gen())
    assert mcc(D.to(dtype), D) == pytest.approx(1, abs=1e-4) and mmcs(D, D.to(dtype)) == pytest.approx(1, abs=1e-4)


def test_trained_parameters_need_no_detach():
    D = torch.randn(5, 8, generator=gen())
    sae = SAE(8, 5).init_(0)
    assert sae.W_dec.requires_grad
    for score in (mcc, mmcs, recovered, uniqueness): assert 0 <= score(sae.W_dec, D) <= 1
    assert not similarity(sae.W_dec, D).requires_grad
    RecoveryStats(sae.W_dec, D); Absorption(sae.W_dec, D, torch.tensor([-1, 0, 0, 0, 0]))


@pytest.mark.parametrize("W, match", [(torch.zeros(3), "one direction per row"), (torch.zeros(0, 4), "one direction per row"), (torch.full((2, 4), math.nan), "NaN"), (torch.full((2, 4), math.inf), "NaN"),
                                      (torch.ones(2, 5), "different data")])
def test_hostile_directions(W, match):
    for score in (mcc, mmcs, recovered, uniqueness, similarity, RecoveryStats):
        with pytest.raises(ValueError, match=match): score(W, torch.eye(4))
    with pytest.raises(ValueError, match="latents"): mmcs(torch.eye(4), torch.eye(4), of="rows")


# ------------------------------------------------------------------------------------------------ firing
def by_loops(W, D, acts, codes, transposed=False):
    c = similarity(W, D).abs()
    out = []
    for k in range(len(D) if transposed else len(W)):
        i, j = (int(c[:, k].argmax()), k) if transposed else (k, int(c[k].argmax()))
        f, t = acts[:, i] != 0, codes[:, j] != 0
        tp, fp, fn = int((f & t).sum()), int((f & ~t).sum()), int((~f & t).sum())
        p, r = tp/(tp + fp) if tp + fp else 0., tp/(tp + fn) if tp + fn else 0.
        out.append((p, r, 2*p*r/(p + r) if p + r else 0., float((f == t).double().mean())))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_firing_by_loops(seed):
    W, D, acts, codes, x, x_hat = toy(seed)
    acts[:, 0] = 0; codes[:, 1] = 0; acts[:, 2] = -acts[:, 2]                        # a dead latent, an absent feature, a negative latent
    s = RecoveryStats(W, D); s.update(acts, codes, x, x_hat)
    for per, transposed in ((s.per_latent(), False), (s.per_feature(), True)):
        assert torch.allclose(torch.stack([per[k] for k in ("precision", "recall", "f1", "accuracy")], 1), by_loops(W, D, acts, codes, transposed), atol=1e-12)
    r = s.result()
    assert r["f1"] == pytest.approx(float(by_loops(W, D, acts, codes)[:, 2].mean())) and r["f1_features"] == pytest.approx(float(by_loops(W, D, acts, codes, True)[:, 2].mean()))
    assert r["true_l0"] == pytest.approx(float((codes != 0).sum(1).double().mean())) and r["l0"] == pytest.approx(float((acts != 0).sum(1).double().mean())) and s.negative
    assert r["norm_ratio"] == pytest.approx(float((x_hat.norm(dim=1)/x.norm(dim=1))[x.norm(dim=1) > 1e-6].double().mean()), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 399), max_size=5, unique=True), st.booleans())
def test_any_split_and_merge(cuts, merge):
    W, D, *data = toy(3)
    parents = torch.tensor([-1, 0, 0, 1, 1, -1, 5, 5, 5])
    edges = [0, *sorted(cuts), 400]
    parts = [[t[a:b] for t in data] for a, b in zip(edges, edges[1:])]
    whole, s, a, b = RecoveryStats(W, D), RecoveryStats(W, D), Absorption(W, D, parents), Absorption(W, D, parents)
    whole.update(*data); b.update(*data[:2])
    for p in parts:
        if merge:
            one, two = RecoveryStats(W, D), Absorption(W, D, parents)
            one.update(*p); two.update(*p[:2]); s.merge(one); a.merge(two)
        else: s.update(*p); a.update(*p[:2])
    for k, v in whole.result().items(): assert s.result()[k] == pytest.approx(v, rel=1e-11), k
    for k, v in b.per_parent().items(): assert torch.equal(v.nan_to_num(-1), a.per_parent()[k].nan_to_num(-1)), k


def test_the_sums_are_small():
    "Nothing of the size latents × features is kept"
    s = RecoveryStats(torch.randn(64, 8, generator=gen()), torch.randn(256, 8, generator=gen(1)))
    assert max(t.numel() for t in vars(s).values() if isinstance(t, torch.Tensor)) <= 256


def test_hostile_tokens():
    W, D, acts, codes, x, x_hat = toy()
    for bad in ((acts[:5], codes, x, x_hat), (acts, codes[:, :3], x, x_hat), (acts, codes, x[:5], x_hat), (acts[:, :3], codes, x, x_hat)):
        with pytest.raises(ValueError, match="same tokens"): RecoveryStats(W, D).update(*bad)
    for bad in ((acts*math.nan, codes, x, x_hat), (acts, codes/0, x, x_hat), (acts, codes, x*math.nan, x_hat), (acts, codes, x, x_hat/0)):
        s = RecoveryStats(W, D); s.update(*bad)
        with pytest.raises(ValueError, match="NaN"): s.result()
    with pytest.raises(ValueError, match="too few"): RecoveryStats(W, D).result()
    s = RecoveryStats(W, D); s.update(acts[:0], codes[:0], x[:0], x_hat[:0]); s.update(acts, codes, x, x_hat)
    assert s.result()["tokens"] == 400
    with pytest.raises(ValueError, match="merged"): s.merge(RecoveryStats(W.flip(0), D))


# ------------------------------------------------------------------------------------------------ absorption
def absorbed_by_loops(W, D, acts, codes, parents, carried=.4):
    c = similarity(W, D).abs()
    latent = c.argmax(0).tolist()
    out = {}
    for p in sorted({int(p) for p in parents if p >= 0}):
        kids, n = [k for k in range(len(D)) if parents[k] == p], dict(with_child=0, alone=0, heard_with=0, heard_alone=0, taken=0)
        for a, t in zip(acts, codes):
            if t[p] == 0: continue
            here = [k for k in kids if t[k] != 0]
            heard = bool(a[latent[p]] != 0)
            n["with_child" if here else "alone"] += 1
            n["heard_with" if here else "heard_alone"] += heard
            n["taken"] += not heard and any(latent[k] != latent[p] and a[latent[k]] != 0 and float(a[latent[k]]*(W[latent[k]] @ D[p])/(D[p] @ D[p])) >= carried*float(t[p]) for k in here)
        out[p] = n
    return out


@pytest.mark.parametrize("seed, M", [(0, 7), (1, 12), (2, 3), (3, 1)])
def test_absorption_by_loops(seed, M):
    W, D, acts, codes, *_ = toy(seed, M=M)
    parents = torch.tensor([-1, 0, 0, 1, 1, -1, 5, 6, 6])                             # 0 → 1 → 3, 4 and 5 → 6 → 7, 8
    per = absorption(acts, codes, W.double(), D.double(), parents).per_parent()
    want = absorbed_by_loops(W.double(), D.double(), acts.double(), codes.double(), parents)
    assert per["parent"].tolist() == list(want)
    for i, n in enumerate(want.values()):
        assert (int(per["tokens_with_child"][i]), int(per["tokens_alone"][i])) == (n["with_child"], n["alone"])
        assert float(per["recall_with_child"][i]) == pytest.approx(n["heard_with"]/n["with_child"]) and float(per["recall_alone"][i]) == pytest.approx(n["heard_alone"]/n["alone"])
        assert float(per["absorption"][i]) == pytest.approx(n["taken"]/n["with_child"])
    assert M == 1 or any(n["taken"] for n in want.values()), "nothing was absorbed, so nothing was tested"


def test_absorption_knows_no_scale_and_no_order():
    W, D, acts, codes, *_ = toy(1, M=12)
    parents, scale, order = torch.tensor([-1, 0, 0, 1, 1, -1, 5, 6, 6]), torch.rand(12, generator=gen(5)) + .1, torch.randperm(12, generator=gen(6))
    a = absorption(acts, codes, W, D, parents).to_dict()
    b = absorption((acts/scale)[:, order], codes, (W*scale[:, None])[order], D, parents).to_dict()
    c = absorption(-acts, codes, -W, D, parents).to_dict()                             # a signed gate
    d = absorption(acts, codes/2, W, D*2, parents).to_dict()                           # truth written in other units
    for other in (b, c, d): assert other == pytest.approx(a, abs=1e-6, nan_ok=True)


def test_parents_without_a_latent_count_in_no_mean():
    D, parents = torch.eye(6), torch.tensor([-1, -1, 0, 0, 1, 1])
    codes = torch.tensor([[1., 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]])
    half = absorption(codes[:, [0, 2, 3]], codes, D[[0, 2, 3]], D, parents)            # nothing for feature 1 and its children
    assert half.to_dict() == dict(parents_found=.5, parent_recall_with_child=1., parent_recall_alone=1., absorption_rate=0.)
    none = absorption(codes[:, [2]], codes, D[[2]], D, torch.tensor([-1, -1, -1, -1, 1, 1]))
    assert none.parents_found == 0 and math.isnan(none.absorption_rate)


def test_a_latent_shared_by_parent_and_child_absorbs_nothing():
    D, parents = torch.eye(2), torch.tensor([-1, 0])
    codes = torch.tensor([[1., 1], [1, 0]])
    shared = absorption(codes[:, [1]], codes, (D[0] + D[1])[None], D, parents)
    assert (shared.parent_recall_with_child, shared.parent_recall_alone, shared.absorption_rate) == (1, 0, 0) and math.isnan(shared.per_parent()["child_cosine"])


@pytest.mark.parametrize("parents", [torch.tensor([0., 0]), torch.tensor([-2, 0]), torch.tensor([2, 0]), torch.tensor([0]), torch.tensor([[0, 0]])])
def test_hostile_parents(parents):
    with pytest.raises(ValueError, match="one index per true feature"): Absorption(torch.eye(2), torch.eye(2), parents)


def test_absorption_of_other_tokens():
    a = Absorption(torch.eye(2), torch.eye(2), torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="same tokens"): a.update(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="merged"): a.merge(Absorption(torch.eye(2).flip(0), torch.eye(2), torch.tensor([-1, 0])))
    assert math.isnan(a.absorption_rate)                                               # nothing seen


# ------------------------------------------------------------------------------------------------ oracle
@pytest.mark.parametrize("name, n", [("toy", None), ("hierarchy", None), ("toy", 10), ("hierarchy", 20), ("synth_sae_bench_cpu", 64)])
def test_the_oracle_is_perfect(name, n):
    t = preset(name)
    r = recovery(oracle(t.dictionary, t.sample(2000, 0).codes, n, bias=t.bias), t, tokens=2000, control=False)
    for k in ("mcc", "mmcs_latents", "uniqueness", "precision", "recall", "f1", "accuracy"): assert r.to_dict()[k] == pytest.approx(1, abs=1e-6), k
    assert r.recovered >= (n or t.n_features)/t.n_features and r.dead_fraction == 0
    if n is None:
        assert r.mmcs_features == pytest.approx(1) and r.f1_features == pytest.approx(1) and r.fvu < .01
        if name == "hierarchy": assert (r.parents_found, r.parent_recall_with_child, r.parent_recall_alone, r.absorption_rate) == (1, 1, 1, 0)


def test_a_linear_reader_is_not():
    t = preset("toy")
    x, codes = t.sample(5000, 0)
    o = oracle(t.dictionary)
    best = recovery(o.linear(x, codes), t, tokens=5000, control=False)
    assert best.mcc == pytest.approx(1, abs=1e-6) and .3 < best.f1 < .95
    for theta in (.1, .3, .5): assert recovery(o.linear(x, codes, theta), t, tokens=5000, control=False).f1 < best.f1 + .02


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_best_threshold_tries_all(n, seed, ties):
    g = gen(seed)
    z = torch.randint(-2, 4, (n, 3), generator=g).float() if ties else torch.randn(n, 3, generator=g)
    on = torch.rand(n, 3, generator=g) < .4
    theta, f1 = best_threshold(z, on)
    assert (theta >= 0).all()
    for j in range(3):
        def score(t): f = z[:, j] > t; return 2*int((f & on[:, j]).sum())/max(1, int(f.sum() + on[:, j].sum()))
        want = max(score(t) for t in [0., *z[:, j].clamp_min(0).tolist(), math.inf])
        assert float(f1[j]) == pytest.approx(want, abs=1e-6) and score(float(theta[j])) == pytest.approx(want, abs=1e-6)


def test_oracle_errors():
    with pytest.raises(ValueError, match="give codes"): oracle(torch.eye(3), n=2)
    for n in (0, 4):
        with pytest.raises(ValueError, match="not between 1 and"): oracle(torch.eye(3), torch.ones(5, 3), n)
    with pytest.raises(ValueError, match="different data"): oracle(torch.eye(3)).read(torch.ones(5, 4))


# ------------------------------------------------------------------------------------------------ all of it
def sae_of(D, theta=.3):
    sae = SAE(D.shape[1], len(D), JumpReLUGate(len(D), theta), decoder_norm="free").requires_grad_(False)
    sae.W_dec.copy_(D); sae.W_enc.copy_(D.T)
    return sae


def test_recovery_knows_no_scale_and_no_order():
    t = preset("hierarchy")
    D = F.normalize(t.dictionary + .1*torch.randn(t.dictionary.shape, generator=gen()), dim=-1)
    a, scale, order = sae_of(D), torch.rand(len(D), generator=gen(1)) + .2, torch.randperm(len(D), generator=gen(2))
    b = sae_of((D*scale[:, None])[order]); b.W_enc.copy_((D/scale[:, None])[order].T); b.gate.set_threshold_((.3/scale)[order])
    one, two = (recovery(s, t, tokens=3000, control=False) for s in (a, b))
    assert two.to_dict() == pytest.approx(one.to_dict(), abs=1e-4)
    assert 0 < one.f1 < 1
    assert torch.allclose(one.per_latent["f1"][order], two.per_latent["f1"], atol=1e-3)


def test_a_signed_gate_is_treated_as_such():
    D = torch.linalg.qr(torch.randn(6, 6, generator=gen()))[0][:4]
    codes = (.5 + torch.rand(500, 4, generator=gen(1)))*(torch.rand(500, 4, generator=gen(2)) < .3)
    r = recovery(Signed(D), dictionary=D, x=codes @ D, codes=codes)
    for k in ("mcc", "mmcs_latents", "mmcs_features", "recovered", "uniqueness", "f1", "f1_features"): assert r.to_dict()[k] == pytest.approx(1, abs=1e-5), k
    wrong = sae_of(-D); wrong.gate.set_threshold_(0.)                                  # positive activations along −D are wrong, though parallel
    r = recovery(wrong, dictionary=D, x=codes @ D, codes=codes, control=False)
    assert r.mcc == pytest.approx(1, abs=1e-5) and r.recovered == 0 and r.mmcs_latents < .1


def test_control_has_the_same_width_and_l0():
    t = preset("toy")
    r = recovery(sae_of(t.dictionary), t, tokens=6000)
    assert r.control_l0 == pytest.approx(r.l0, rel=.05) and r.control_recovered == 0 and r.control_f1 < .4
    m = r.to_dict()
    assert {k.removeprefix("control_") for k in m if k.startswith("control_")} <= set(m) and m["features"] == 40
    assert "control_mcc" not in recovery(sae_of(t.dictionary), t, tokens=500, control=False).to_dict()


def test_dead_and_dense_saes():
    t = preset("toy")
    r = recovery(sae_of(t.dictionary, math.inf), t, tokens=1000)
    assert (r.l0, r.f1, r.precision, r.dead_fraction, r.control_l0, r.control_f1) == (0, 0, 0, 1, 0, 0)
    full = SAE(20, 8, ReLUGate(8)).requires_grad_(False); full.b_enc.fill_(1.)         # every latent fires on every token, and writes nothing
    r = recovery(full, t, tokens=1000)
    assert r.l0 == 8 and math.isfinite(r.control_l0) and r.uniqueness == r.mcc == 0


def test_blocks_do_not_matter_and_seeds_do():
    t = preset("toy")
    x, codes = t.sample(9000, 1)
    a = recovery(sae_of(t.dictionary), dictionary=t.dictionary, x=x, codes=codes, control=False).to_dict()          # three blocks
    s = RecoveryStats(t.dictionary, t.dictionary); acts = sae_of(t.dictionary).encode(x); s.update(acts, codes, x, sae_of(t.dictionary)(x))
    for k, v in s.result().items(): assert a[k] == pytest.approx(v, rel=1e-9), k
    one, same, other = (recovery(sae_of(t.dictionary), t, tokens=5000, seed=s).to_dict() for s in (1, 1, 2))
    assert one == same and one["f1"] != other["f1"] and one["control_mcc"] != other["control_mcc"] and one["tokens"] == 5000


def test_what_is_missing_is_said():
    t, sae = preset("toy"), sae_of(preset("toy").dictionary)
    x, codes = t.sample(50, 0)
    for kw in ({}, dict(x=x, codes=codes), dict(dictionary=t.dictionary), dict(dictionary=t.dictionary, x=x), dict(dictionary=t.dictionary, codes=codes)):
        with pytest.raises(ValueError, match="Recovery needs the truth"): recovery(sae, **kw)
    with pytest.raises(ValueError, match="same tokens"): recovery(sae, dictionary=t.dictionary, x=x, codes=codes[:7])
    for n in (0, -5):
        with pytest.raises(ValueError, match="no tokens"): recovery(sae, t, tokens=n)
    with pytest.raises(ValueError, match="no tokens"): recovery(sae, dictionary=t.dictionary, x=x[:0], codes=codes[:0])
    with pytest.raises(ValueError, match="different data"): recovery(sae, preset("hierarchy"))
    with pytest.raises(ValueError, match="too few"): recovery(sae, t, tokens=1, control=False)
    with pytest.raises(ValueError, match="NaN"): recovery(sae, dictionary=t.dictionary, x=x*math.nan, codes=codes, control=False)
    with pytest.raises(ValueError, match="same tokens"): recovery(sae, dictionary=t.dictionary, x=x, codes=codes[:, :9], control=False)


def test_result_prints_and_serialises():
    r = recovery(oracle(preset("hierarchy").dictionary), preset("hierarchy"), tokens=1000)
    m = r.to_dict()
    json.dumps(m)
    assert "random" in repr(r) and "absorption" in repr(r) and "–" in repr(r) and "<table>" in r._repr_html_() and r._repr_html_().count("<tr>") == len(r.rows())
    assert (r.mcc, r.at) == (m["mcc"], .9) and r.absorption.absorption_rate == m["absorption_rate"]
    with pytest.raises(AttributeError, match="no metric 'nothing'"): r.nothing
    plain = recovery(oracle(preset("toy").dictionary), preset("toy"), tokens=1000)
    assert plain.absorption is None and "absorption" not in repr(plain) and "absorption_rate" not in plain.to_dict()
