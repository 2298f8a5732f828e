"evaluate/metrics: what protects the sums and teaches nobody."
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from jumprelu_nb.data.activations import Activations
from jumprelu_nb.evaluate.metrics import ReconstructionStats, Variance, blocks_of, frequency_histogram, random_control, reconstruction
from jumprelu_nb.sae.gates import JumpReLUGate, TopKGate
from jumprelu_nb.sae.model import SAE

g = torch.Generator().manual_seed(0)
x = torch.randn(600, 6, generator=g, dtype=torch.float64) + 2
x_hat = x + .3*torch.randn(600, 6, generator=g, dtype=torch.float64)
acts = (torch.randn(600, 10, generator=g) - 1).relu()


def stats_of(*parts, scale=1., offset=0.):
    s = ReconstructionStats(6, 10)
    for p in parts: s.update(x[p]*scale + offset, x_hat[p]*scale + offset, acts[p])
    return s


def brute():
    fired = acts > 0
    return dict(l0=fired.sum(1).double().mean(), fvu=(x - x_hat).square().sum()/(x - x.mean(0)).square().sum(), cosine=torch.cosine_similarity(x, x_hat).mean(),
                shrinkage=x_hat.square().sum()/(x*x_hat).sum(), dead_fraction=(~fired.any(0)).double().mean(), dense_fraction=(fired.double().mean(0) > .1).double().mean())


def test_against_definitions():
    r = stats_of(slice(None)).result()
    for k, v in brute().items(): assert r[k] == pytest.approx(float(v), rel=1e-12), k
    assert r["explained_variance"] == 1 - r["fvu"] and r["tokens"] == 600


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 599), max_size=6, unique=True), st.booleans())
def test_any_split_and_merge(cuts, merge):
    edges = [0, *sorted(cuts), 600]
    parts = [slice(a, b) for a, b in zip(edges, edges[1:])]
    s = sum((stats_of(p) for p in parts[1:]), stats_of(parts[0])) if merge else stats_of(*parts)
    for k, v in stats_of(slice(None)).result().items(): assert s.result()[k] == pytest.approx(v, rel=1e-11), k


@pytest.mark.parametrize("scale", [1e-6, 1., 1e6])
def test_scale_does_not_matter(scale):
    a, b = stats_of(slice(None)).result(), stats_of(slice(None), scale=scale).result()
    for k in a: assert a[k] == pytest.approx(b[k], rel=1e-9), k


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_offset_does_not_matter_to_the_fvu(offset):
    assert stats_of(*[slice(i, i + 50) for i in range(0, 600, 50)], offset=offset).result()["fvu"] == pytest.approx(float(brute()["fvu"]), rel=1e-6)


def test_adding_leaves_the_summands_alone():
    a, b = stats_of(slice(0, 100)), stats_of(slice(100, 300))
    before = a.result(), b.result()
    a + b
    assert (a.result(), b.result()) == before and (a + b).n == 300 and (ReconstructionStats(6, 10) + a).result() == before[0]


def test_predict_the_mean_and_the_truth():
    s = ReconstructionStats(6, 10); s.update(x, x.mean(0).expand_as(x), acts)
    assert s.result()["fvu"] == pytest.approx(1, abs=1e-12)
    s = ReconstructionStats(6, 10); s.update(x, x, acts)
    assert s.result()["fvu"] == 0 and s.result()["cosine"] == pytest.approx(1)


def test_half_precision_and_leading_dimensions():
    s = ReconstructionStats(6, 10)
    s.update(x.view(3, 200, 6).half(), x.view(3, 200, 6).half(), acts.view(3, 200, 10).bfloat16())
    assert s.n == 600 and s.result()["fvu"] == 0


def test_errors():
    with pytest.raises(ValueError, match="too few"): ReconstructionStats(6, 10).result()
    with pytest.raises(ValueError, match="same tokens"): ReconstructionStats(6, 10).update(x[:5], x_hat[:4], acts[:5])
    with pytest.raises(ValueError, match="NaN or infinity"): (s := ReconstructionStats(6, 10)).update(x, x_hat/0, acts); s.result()
    with pytest.raises(ValueError, match="merged"): ReconstructionStats(6, 10).merge(ReconstructionStats(5, 10))
    with pytest.raises(ValueError, match="tokens, d_in"): list(blocks_of([torch.zeros(3)]))


def test_constant_data_has_no_fvu():
    s = ReconstructionStats(6, 10); s.update(torch.ones(5, 6), torch.ones(5, 6), acts[:5])
    assert s.result()["fvu"] != s.result()["fvu"]


def test_empty_batches_do_nothing():
    assert (Variance(x) + Variance(x[:0])).n == 600 and (Variance() + Variance()).n == 0


@pytest.mark.parametrize("source", [x.float(), x.float().numpy(), Activations.from_tensor(x.float()), list(x.float().split(7)), iter(x.float().split(90))])
def test_sources(source):
    got = torch.cat(list(blocks_of(source, tokens=500, batch=64)))
    assert got.shape == (500, 6)


def test_activations_are_read_once():
    assert sum(len(b) for b in blocks_of(Activations.from_tensor(x.float()))) == 600
    assert sum(len(b) for b in blocks_of(Activations.from_tensor(x.float()), tokens=10_000)) == 600


@pytest.mark.parametrize("gate", [JumpReLUGate(64, .8), TopKGate(64, 5)])
def test_control_has_the_same_width_and_l0(gate):
    sae, y = SAE(6, 64, gate).init_(3), x.float()
    c = random_control(sae, y, seed=1)
    assert (c.d_in, c.d_sae) == (6, 64)
    assert (c.encode(y) != 0).sum(1).float().mean() == pytest.approx(float((sae.encode(y) != 0).sum(1).float().mean()), rel=.01)
    r = reconstruction(c, y).result()
    assert 0 < r["fvu"] < 1 and r["shrinkage"] == pytest.approx(1, abs=.05)
    assert torch.equal(c.W_dec, random_control(sae, y, seed=1).W_dec) and not torch.equal(c.W_dec, random_control(sae, y, seed=2).W_dec)


def test_control_of_a_dead_sae_predicts_the_mean():
    sae = SAE(6, 64, JumpReLUGate(64, 1e9)).init_(3)
    assert reconstruction(random_control(sae, x.float()), x.float()).result()["fvu"] == pytest.approx(1, abs=1e-6)


def test_histogram_counts_every_latent():
    f = torch.rand(1000, generator=g)**6; f[:7] = 0
    edges, counts, dead = frequency_histogram(f)
    assert counts.sum() + dead == 1000 and dead == int((f == 0).sum()) and len(edges) == len(counts) + 1
