"Synthetic truths under hostile settings, in every combination, and against enumeration."
import math, pickle, subprocess, sys, time
from itertools import islice, product
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import tensor
from jumprelu_nb.data.ingredients import (Hierarchy, apply_hierarchy, directions, draw_loadings, fire, fire_exactly, generator, geometric, given_causes,
    orthogonalise, probabilities, share_kept, zipf)
from jumprelu_nb.data.synthetic import PRESETS, Synthetic, preset, superposition
from jumprelu_nb.sae.model import SAE

presets = [name for name in PRESETS if name != "synth_sae_bench"]


# firing

def test_rare_events():
    "2⁻²⁶ is below float32's grid of uniform numbers: a plain comparison would find 32 of 8 events"
    q, n = torch.full((1024,), 2**-26), 2**15
    found = sum(len(fire(q, n, generator("rare", i))[0]) for i in range(16))
    assert abs(found - 8) < 4*8**.5

def test_probability_0_and_1():
    rows, feats = fire(tensor([0., 1., 0.]), 1000, generator())
    assert rows.tolist() == list(range(1000)) and (feats == 1).all()
    q = given_causes(tensor([0., 1., .5], dtype=torch.float64), draw_loadings(3, 2, 5., generator("strong")), torch.randn(100, 2, generator=generator("eps")))
    assert (q[:, 0] == 0).all() and (q[:, 1] == 1).all() and not q.isnan().any()

@pytest.mark.parametrize("p", [[1., 1., .5, .5], [.25]*8, [1.]*3, [.999999, .5, .5, 1e-6]])
def test_exactly(p):
    p, n = tensor(p, dtype=torch.float64), 20_000
    rows, feats = fire_exactly(p, n, generator("exact", len(p)))
    assert (rows.bincount(minlength=n) == p.sum().round()).all()
    assert ((feats.bincount(minlength=len(p))/n - p).abs() <= 4.5*(p*(1 - p)/n).sqrt() + 1e-12).all()

def test_copula_keeps_probabilities():
    "Integrated over its common causes, a correlated feature fires as often as it should, however strong they are"
    p = tensor([1e-4, .01, .3, .9], dtype=torch.float64).repeat(50)
    U = draw_loadings(200, 3, 2., generator("loadings"))
    assert U.square().sum(1).max() <= .9901
    x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(200))
    strength = U.norm(dim=1).clamp_max(.9).double()                                 # one cause of that strength
    q = given_causes(p, strength[:, None].float(), x[:, None].float())
    assert torch.allclose((q.double()*w[:, None]).sum(0)/w.sum(), p, rtol=1e-3)

@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_share_kept_by_enumeration(e):
    want = [sum(math.prod(e[j] if on else 1 - e[j] for j, on in enumerate(s))/sum(s) for s in product([0, 1], repeat=len(e)) if s[i]) for i in range(len(e))]
    assert torch.allclose(share_kept(tensor([e], dtype=torch.float64))[0], tensor(want, dtype=torch.float64), atol=1e-12)

def test_probabilities_in_many_forms():
    for p in (torch.full((3,), .1), [.1]*3, (.1, .1, .1), np.full(3, .1), .1, tensor(.1)):
        got = probabilities(p, 3)
        assert got.dtype == torch.float64 and torch.allclose(got, torch.full((3,), .1, dtype=torch.float64))
    x = torch.full((3,), .1, dtype=torch.float64)
    probabilities(x, 3).zero_()
    assert (x == .1).all(), "the caller's tensor is not ours"
    assert zipf(1).tolist() == [.4] and geometric(1).tolist() == pytest.approx([.15])


# trees

@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([None, 0., .1, 1.]), st.integers(0, 2), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_child_alone_no_two_siblings(roots, branching, depth, exclusive, scaled, conditional, rank, free):
    h = Hierarchy(roots, branching, depth, None if conditional is None else conditional/(branching if exclusive else 1), exclusive, scaled)
    n = h.levels[-1][1] + free
    truth = Synthetic(4, n, firing=.6, hierarchy=h, correlation_rank=rank, correlation_scale=.5*bool(rank), magnitude=("normal", 1., 1., .5, .5))
    on = truth.sample(500).codes > 0
    child = (truth.parents >= 0).nonzero().squeeze(1)
    assert len(child) == h.levels[-1][1] - roots and (truth.parents < torch.arange(n)).all()
    assert not (on[:, child] & ~on[:, truth.parents[child]]).any()
    siblings = torch.zeros(500, n, dtype=torch.long).index_add_(1, truth.parents[child], on[:, child].long())
    assert not exclusive or siblings.max() <= 1
    assert ((truth.proposal >= 0) & (truth.proposal <= 1)).all() and ((truth.rate >= 0) & (truth.rate <= 1)).all()

def test_always_exactly_one_child():
    on = Synthetic(4, 20, firing=.5, hierarchy=Hierarchy(4, 4, 1, conditional=.25)).sample(2000).codes > 0
    assert torch.equal(on[:, 4:].view(-1, 4, 4).any(-1), on[:, :4])

def test_siblings_that_are_not_exclusive():
    truth, n = Synthetic(4, 12, firing=.5, hierarchy=Hierarchy(4, 2, 1, conditional=.6, exclusive=False)), 50_000
    on = truth.sample(n).codes > 0
    both = on[:, 4:].view(n, 4, 2).all(-1).double().mean(0)
    assert torch.allclose(both, torch.full((4,), .5*.36, dtype=torch.float64), atol=4*(.18*.82/n)**.5)

@pytest.mark.parametrize("scaled", [True, False])
def test_magnitude_of_children(scaled):
    codes = Synthetic(4, 4, firing=1., hierarchy=Hierarchy(1, 3, 1, conditional=.3, scaled=scaled), magnitude=("uniform", 1., 3.)).sample(5000).codes
    parent = codes[:, :1].expand(-1, 3)[codes[:, 1:] > 0]
    own = codes[:, 1:][codes[:, 1:] > 0]/(parent/2 if scaled else 1)
    assert 1 <= own.min() and own.max() <= 3.0001 and abs(own.mean() - 2) < .05
    assert (abs(np.corrcoef(parent, codes[:, 1:][codes[:, 1:] > 0])[0, 1]) > .4) == scaled

def test_rules_on_nothing():
    h, none = Hierarchy(2, 2, 1), torch.empty(0, dtype=torch.long)
    apply_hierarchy(h, none, none, torch.empty(0), torch.ones(6), 5, generator())


# the stream

@pytest.mark.parametrize("name", presets)
def test_the_same_rows_however_read(name):
    truth = preset(name)
    truth._n = 256                                                                  # of both readers alike, to cross borders quickly
    x, codes = truth.sample(1000)
    assert x.shape == (1000, truth.d_in) and codes.shape == (1000, truth.n_features) and (codes >= 0).all() and x.isfinite().all()
    for size in (1, 7, 256, 999): assert torch.equal(torch.cat(list(islice(truth.blocks(size=size), 999//size))), x[:999//size*size])
    assert torch.equal(truth.sample(300).codes, codes[:300])
    assert torch.equal(next(truth.activations().rows("any", 517)), truth.sample(768).x[517:])
    assert torch.equal(truth.frequency(1000), (codes > 0).double().mean(0))
    rebuilt = codes @ truth.dictionary + truth.bias
    assert torch.allclose(rebuilt, x, atol=1e-4) == (truth.noise == 0)

def test_another_process_draws_the_same():
    code = "from jumprelu_nb.data.synthetic import preset; t = preset('hierarchy', noise=.1); x = t.sample(100, seed=3).x; print(t.mark, x.double().sum().item(), x[99, 5].item())"
    a, b = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    truth = preset("hierarchy", noise=.1)
    x = truth.sample(100, seed=3).x
    assert a == b == f"{truth.mark} {x.double().sum().item()} {x[99, 5].item()}\n"

def test_rows_do_not_repeat():
    truth = preset("toy")
    rows = torch.cat([truth.sample(20_000, seed=s).x[:, 0] for s in range(3)] + [preset("toy", seed=1).sample(20_000).x[:, 0]])
    assert len(rows.unique()) > .999*len(rows)

def test_global_seed_plays_no_part():
    torch.manual_seed(0)
    a = preset("toy").sample(100)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    b = preset("toy").sample(100)
    assert torch.equal(a.x, b.x)
    torch.set_rng_state(state)
    preset("correlated").sample(10)
    assert torch.equal(torch.get_rng_state(), state)

def test_silence():
    "No feature fires in a row, or ever: the row is the bias"
    truth = Synthetic(5, 7, firing=0., mean_offset=2.)
    assert torch.equal(truth.sample(50).x, truth.bias.expand(50, 5)) and truth.true_l0(50) == 0
    x, codes = Synthetic(5, 3, firing=.05).sample(500)
    assert (x[(codes == 0).all(1)] == 0).all()

def test_pickle():
    truth = preset("synth_sae_bench_cpu", dictionary="random")
    assert torch.equal(pickle.loads(pickle.dumps(truth)).sample(50).x, truth.sample(50).x)

base = dict(d_in=8, n_features=12, firing=.2)
variants = [dict(d_in=9), dict(n_features=13), dict(firing=.21), dict(firing=[.2]*11 + [.2001]), dict(seed=1), dict(noise=.1), dict(mean_offset=.1), dict(magnitude=2.), dict(magnitude=("product",)),
            dict(magnitude=("normal", 1., 1., .1)), dict(magnitude=("normal", 1., 1., .1, .1)), dict(dictionary="orthogonalised"), dict(dictionary=torch.ones(12, 8)), dict(exact_l0=2),
            dict(hierarchy=Hierarchy(2, 2, 1)), dict(hierarchy=Hierarchy(2, 2, 1, conditional=.2)), dict(hierarchy=Hierarchy(2, 2, 1, scaled=False)), dict(hierarchy=Hierarchy(2, 2, 1, exclusive=False)),
            dict(correlation_rank=1, correlation_scale=.1), dict(correlation_rank=2, correlation_scale=.1)]

def test_marks_tell_truths_apart():
    marks = [Synthetic(**(base | v)).activations().mark for v in [{}] + variants] + [Synthetic(**base).activations(1).mark]
    assert len(set(marks)) == len(marks)
    assert Synthetic(**base).activations().mark == Synthetic(**base, name="other").activations().mark == marks[0]

def test_resume_is_quick_and_exact():
    acts = preset("toy").activations(2)
    a = acts.loader(512, seed=1, buffer_tokens=8192)
    for _ in range(37): next(a)
    b = preset("toy").activations(2).loader(512, seed=1, buffer_tokens=8192)
    b.load_state_dict(a.state_dict())
    for x, y in islice(zip(a, b), 40): assert torch.equal(x, y)
    for other in (preset("toy").activations(), preset("toy", seed=1).activations(2), preset("toy", noise=.06).activations(2)):
        with pytest.raises(ValueError, match="source"): other.loader(512, seed=1, buffer_tokens=8192).load_state_dict(a.state_dict())
    start = time.process_time()
    next(acts.rows("seed 1", 50_000_000))
    assert time.process_time() - start < 2

def test_one_ingredient_at_a_time():
    codes = preset("toy").sample(200).codes
    for change in (dict(noise=0.), dict(mean_offset=3.), dict(dictionary="orthogonalised"), dict(d_in=30)): assert torch.equal(preset("toy", **change).sample(200).codes, codes)


# directions

@pytest.mark.parametrize("kind,n,d", [("random", 30, 8), ("orthogonal", 8, 8), ("orthogonal", 3, 8), ("orthogonalised", 30, 8), ("random", 1, 1), ("orthogonalised", 1, 1), ("orthogonal", 1, 1)])
def test_unit_rows(kind, n, d):
    D = directions(kind, n, d, generator(kind))
    assert D.shape == (n, d) and D.dtype == torch.float32 and D.is_contiguous() and torch.allclose(D.norm(dim=1), torch.ones(n), atol=1e-6)
    if kind == "orthogonal": assert torch.allclose(D @ D.T, torch.eye(n), atol=1e-6)

def test_orthogonalise_leaves_its_argument():
    D = torch.randn(6, 3, generator=generator())
    before = D.clone()
    orthogonalise(D, 10, .1)
    assert torch.equal(D, before) and D.grad is None

def test_truth_ignores_length_of_directions():
    D = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    assert torch.allclose(Synthetic(3, 6, dictionary=D*5).dictionary, Synthetic(3, 6, dictionary=D).dictionary)

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("d,n,m", [(20, 40, 60), (20, 60, 60), (64, 64, 64)])
def test_sae_starts_ignorant(seed, d, n, m):
    score = lambda D, W: (D @ W.T).amax(1).mean().item()
    W = SAE(d, m).init_(seed).W_dec.detach()
    chance = tensor([score(directions("random", n, d, generator("a", s)), directions("random", m, d, generator("b", s))) for s in range(100)])
    for kind in ("random", "orthogonalised"):
        got = score(Synthetic(d, n, dictionary=kind, firing=.1, seed=seed).dictionary, W)
        assert got < .6 and abs(got - chance.mean()) < 4.5*chance.std()


# presets

@pytest.mark.parametrize("name", presets)
def test_rates(name):
    truth, n = preset(name), 60_000
    f, p = truth.frequency(n, seed=5), truth.rate
    exact = truth.parents < 0 if truth.loadings.shape[1] else torch.ones(truth.n_features, dtype=torch.bool)   # correlations touch children
    often = exact & (p*n > 20)
    z = (f - p)[often]/(p*(1 - p)/n).sqrt()[often]
    assert z.abs().max() < 4.8 and .6 < z.std() < 1.35
    assert abs(f.sum() - p.sum()) < .02*p.sum()

def test_published_settings():
    truth = preset("synth_sae_bench")
    assert (truth.d_in, truth.n_features, truth.seed, truth.loadings.shape) == (768, 16_384, 42, (16_384, 25))
    assert [b - a for a, b in truth.hierarchy.levels] == [128, 512, 2048, 8192] and (truth.parents >= 0).sum() == 10_752
    assert truth.bias.norm().item() == pytest.approx(.5) and "dictionary" not in vars(truth)
    means = [truth.rate[a:b].mean().item() for a, b in truth.hierarchy.levels]
    assert means == pytest.approx([.064, .0143, .0036, .00087], rel=.02)            # measured with the published generator
    assert truth.probability[[0, -1]].tolist() == pytest.approx([.4, 5e-4])

def test_presets_are_data():
    assert preset("toy", seed=3).seed == 3 and preset("synth_sae_bench_cpu").seed == 42 and preset("toy", noise=.5).noise == .5
    for name in presets: assert name in repr(preset(name)) and name in preset(name).activations().name
    assert preset("toy_constant_l0").sample(500).codes.gt(0).sum(1).eq(2).all()
    assert preset("choice").rate.sum().item() == pytest.approx(4, abs=.01)
    p = preset("cunningham").probability
    assert p[1]/p[0] == pytest.approx(.99) and p[0] == pytest.approx(5/512)


# hostile settings

@pytest.mark.parametrize("change,match", [
    (dict(d_in=0), "whole numbers"), (dict(n_features=0), "whole numbers"), (dict(d_in=2.5), "whole numbers"), (dict(n_features=-3), "whole numbers"),
    (dict(firing=1.01), "between 0 and 1"), (dict(firing=-1e-9), "between 0 and 1"), (dict(firing=math.nan), "between 0 and 1"), (dict(firing=[.1]*11), "12 features"),
    (dict(firing=torch.zeros(12, 1)), "12 features"), (dict(firing=("uniform", .1)), "not known"), (dict(firing=("zipf", .4, .1, 0.)), "exponent"), (dict(firing=("zipf", 1.4, .1, 1.)), "between 0 and 1"),
    (dict(firing=("geometric", .1, 0.)), "above 0"), (dict(dictionary="orthogonal"), "cannot be orthogonal"), (dict(dictionary="qr"), "not known"), (dict(dictionary=torch.ones(8, 12)), "shape"),
    (dict(dictionary=torch.zeros(12, 8)), "length"), (dict(dictionary=torch.full((12, 8), math.nan)), "length"), (dict(dictionary=torch.full((12, 8), math.inf)), "length"),
    (dict(noise=-1.), "noise"), (dict(noise=math.nan), "noise"), (dict(mean_offset=math.inf), "mean_offset"), (dict(correlation_rank=-1, correlation_scale=.1), "correlation_rank"),
    (dict(correlation_rank=3), "both"), (dict(correlation_scale=.3), "both"), (dict(exact_l0=0), "whole number"), (dict(exact_l0=13), "whole number"), (dict(exact_l0=1.5), "whole number"),
    (dict(exact_l0=2, firing=[.9] + [.01]*11), "flatter"), (dict(exact_l0=2, firing=0.), "flatter"), (dict(exact_l0=2, hierarchy=Hierarchy(1, 2, 1)), "leave those out"), (dict(hierarchy=Hierarchy(4, 3, 1)), "too few"),
    (dict(hierarchy=Hierarchy(1, 2, 1), firing=0.), "probability 0"), (dict(magnitude=-1.), "positive"), (dict(magnitude=0.), "positive"), (dict(magnitude=("uniform", 2., 1.)), "low ≤ high"),
    (dict(magnitude=("uniform", -1., 2.)), "positive"), (dict(magnitude=("uniform", 1.)), "not known"), (dict(magnitude=("normal",)), "not known"), (dict(magnitude=("lognormal", 1.)), "not known"),
    (dict(magnitude=("normal", 0., 1.)), "positive"), (dict(magnitude=math.nan), "positive"), (dict(magnitude=math.inf), "positive")])
def test_one_clear_sentence(change, match):
    with pytest.raises(ValueError, match=match) as e: Synthetic(**(base | change))
    assert "\n" not in str(e.value) and len(str(e.value)) < 250

def test_other_refusals():
    truth = preset("toy")
    for call in (lambda: truth.sample(0), lambda: next(truth.blocks(size=0)), lambda: truth.frequency(0)):
        with pytest.raises(ValueError, match="at least one row"): call()
    for settings_ in (dict(roots=0), dict(branching=0), dict(depth=0)):
        with pytest.raises(ValueError, match="at least one root"): Hierarchy(**settings_)
    for c in (-.1, .26):
        with pytest.raises(ValueError, match="between 0 and 0.25"): Hierarchy(1, 4, 1, conditional=c)
    with pytest.raises(ValueError, match="no preset"): preset("none")
    with pytest.raises(TypeError): preset("toy", nosie=.1)
    for p in (0., -1., 1.1, math.nan):
        with pytest.raises(ValueError, match="density"): superposition(4, 2, p)
    with pytest.raises(ValueError, match="importance"): superposition(4, 2, .1, torch.ones(3))
    with pytest.raises(ValueError, match="whole numbers"): superposition(4, 0, .1)


# superposition

def test_opposite_pair():
    "Two sparse features share one dimension as +1 and −1 (where they start on the same side they stay there, and lose more); two dense ones do not"
    sparse = min((superposition(2, 1, .05, steps=800, batch_size=256, seed=s) for s in range(4)), key=lambda m: m.lost)
    dense = superposition(2, 1, 1., tensor([1., .5]), steps=800, batch_size=256)
    a, b = sparse.W[0]
    assert a*b < 0 and min(abs(a), abs(b)) > .8
    assert torch.allclose(sparse.dimensionality, torch.full((2,), .5), atol=.03)
    assert dense.W[0, 0].abs() > .8 and dense.W[0, 1].abs() < .35
    x = torch.eye(2)
    assert torch.allclose(sparse(x), x, atol=.3)

def test_superposition_as_a_truth():
    m = superposition(6, 3, .1, steps=50)
    x, codes = m.truth.sample(500)
    assert torch.allclose(x, codes/m.W.norm(dim=0) @ m.W.T, atol=1e-5)
    assert 0 < (codes/m.W.norm(dim=0)).max() <= 1 and m.lost > 0
    assert m.truth.mark == superposition(6, 3, .1, steps=50).truth.mark != superposition(6, 3, .1, steps=51).truth.mark
