"What protects the auxiliary losses: both forms, any share of dead latents, targets that are not the input, hostile input, state."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.auxiliary import AuxK, AuxZipf, MultiTopK, default_k_aux, explain, explained_share, through, zipf_densities
from jumprelu_nb.sae.gates import GATES, JumpReLUGate, ReLUGate, TopKGate, make_gate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import Balanced, Objective, Together, fit
from jumprelu_nb.sae.sparse import codes_of

slow = settings(max_examples=20, deadline=None)


def make(d_in, d_sae, batch, seed, form="auto", gate=None, dead=.4, pre=True):
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, gate or TopKGate(d_sae, min(3, d_sae)), pre_encoder_bias=pre).init_(seed)
    for p in (sae.b_enc, sae.b_dec): p.data = .2*torch.randn(p.shape, generator=g)
    u, silent = torch.randn(batch, d_in, generator=g), 1e9*(torch.rand(d_sae, generator=g) < dead)
    return sae, codes_of(sae, u, form, target=torch.randn(batch, d_in, generator=g), silent=silent)


@slow
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99), st.sampled_from([0., .3, 1.]), st.integers(1, 8), st.booleans())
def test_auxk_against_the_definition(d_in, d_sae, batch, seed, dead, k, pre):
    for form in ("table", "list"):
        sae, codes = make(d_in, d_sae, batch, seed, form, dead=dead, pre=pre)
        loss, D = AuxK(k).penalty(sae, codes, 0.), (codes.silent > 0).nonzero().flatten()
        if not len(D): assert loss == 0.; continue
        z = sae.pre_acts(codes.u)[:, D]
        kept = torch.where(z >= z.topk(min(k, len(D)), dim=-1).values[:, -1:], z, 0).relu()
        e = (codes.target - codes.u_hat).detach()
        norm = (e - e.mean(0)).square().sum(-1).mean()
        want = (e - kept @ sae.W_dec[D]).square().sum(-1).mean()/norm/32*min(len(D)/k, 1) if batch > 1 else torch.tensor(0.)
        torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-3)


@slow
@given(st.integers(1, 12), st.integers(8, 40), st.integers(1, 30), st.integers(0, 99), st.booleans(), st.sampled_from(["topk", "relu", "jumprelu"]))
def test_another_gate(d_in, d_sae, batch, seed, pre, name):
    "The codes of another gate are those that an SAE with that gate has, gradients included"
    gate = {"topk": lambda: TopKGate(d_sae, 8), "relu": lambda: ReLUGate(d_sae), "jumprelu": lambda: JumpReLUGate(d_sae, .2, bandwidth=.1)}[name]()
    for form in ("table", "list"):
        sae, codes = make(d_in, d_sae, batch, seed, form, pre=pre)
        twin = SAE(d_in, d_sae, gate, pre_encoder_bias=pre); twin.load_state_dict({k: v for k, v in sae.state_dict().items() if not k.startswith("gate.")}, strict=False)
        a, b = through(codes, gate), codes_of(twin, codes.u, form, target=codes.target)
        torch.testing.assert_close(a.u_hat, b.u_hat, atol=1e-5, rtol=1e-4)
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        for x, y in zip(torch.autograd.grad(a.u_hat.square().sum(), [getattr(sae, n) for n in names]), torch.autograd.grad(b.u_hat.square().sum(), [getattr(twin, n) for n in names])):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_gate_can_have_it(name):
    "Dead latents are woken past the gate, so AuxK asks nothing of it"
    try: gate = make_gate(name, 24, **({"k": 3} if "k" in GATES[name].__init__.__code__.co_varnames else {}))
    except ValueError: pytest.skip("this gate needs settings of its own")
    sae, codes = make(8, 24, 40, 1, gate=gate)
    loss = AuxK(4).penalty(sae, codes, 0.)
    loss.backward()
    assert loss.isfinite() and sae.W_enc.grad.isfinite().all() and sae.W_enc.grad.abs().sum() > 0


def test_it_leaves_the_error_and_the_living_alone():
    sae, codes = make(8, 24, 40, 1)
    AuxK(4).penalty(sae, codes, 0.).backward()
    alive = codes.silent == 0
    assert sae.W_dec.grad[alive].abs().max() == 0 and sae.W_enc.grad[:, alive].abs().max() == 0 and sae.b_enc.grad[alive].abs().max() == 0
    free = SAE(8, 24, TopKGate(24, 3)).init_(0); c = codes_of(free, codes.u, silent=codes.silent)
    AuxK(4).penalty(free, c, 0.).backward()
    assert free.b_dec.grad is None


def test_hostile_batches():
    sae, _ = make(8, 24, 40, 1)
    one = codes_of(sae, torch.randn(1, 8), silent=torch.full((24,), 1e9))
    assert AuxK(4).penalty(sae, one, 0.).item() == 0                          # a single token has no variance
    huge = codes_of(sae, 1e15*torch.randn(20, 8), silent=torch.full((24,), 1e9))
    assert AuxK(4).penalty(sae, huge, 0.).isfinite()
    e = torch.full((5, 3), 2.)
    assert explained_share(e, torch.zeros(5, 3)).item() == 0                  # nor has a constant error
    assert explain(one, torch.arange(24), 100).shape == (1, 8)                # more asked for than there are


def test_fade_and_refusals():
    sae, codes = make(8, 24, 40, 1)
    n = int((codes.silent > 0).sum())
    faded, full = AuxK(64).penalty(sae, codes, 0.), AuxK(64, fade=False).penalty(sae, codes, 0.)
    torch.testing.assert_close(faded, full*n/64)
    with pytest.raises(ValueError, match="at least 1"): AuxK(0)
    with pytest.raises(ValueError, match="must be larger than the first"): MultiTopK(3, 1.)
    assert [default_k_aux(d) for d in (3, 128)] == [2, 64]


def test_zipf_state_survives():
    sae, codes = make(8, 24, 40, 1)
    a, b = AuxZipf(4, window=60), AuxZipf(4, window=60)
    for _ in range(3): a.penalty(sae, codes, 0.)
    assert 0 < a.tokens <= 120 and a.seen == 120 and a.dying().any()
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(a.penalty(sae, codes, 0.), b.penalty(sae, codes, 0.))
    both, fresh = Together(Objective(), a), Together(Objective(), AuxZipf(4, window=60)); fresh.load_state_dict(both.state_dict())
    assert torch.equal(fresh.parts[1].count, a.count)
    torch.testing.assert_close(zipf_densities(50, 2., .7).sum(), torch.tensor(2.))


def test_density_is_counted_in_tokens():
    "The same tokens in batches of 10 and of 40 give the same densities"
    sae, _ = make(8, 24, 1, 1)
    u = torch.randn(400, 8, generator=torch.Generator().manual_seed(5))
    small, large = AuxZipf(window=1e5), AuxZipf(window=1e5)
    for part in u.split(10): small.candidates(sae, codes_of(sae, part))
    for part in u.split(40): large.candidates(sae, codes_of(sae, part))
    torch.testing.assert_close(small.count/small.tokens, large.count/large.tokens, atol=1e-3, rtol=1e-2)


def test_it_trains_with_a_controller_beside_it():
    g = torch.Generator().manual_seed(0)
    sae = SAE(8, 32, JumpReLUGate(32, .2, parametrisation="log", relative_bandwidth=.5)).init_(0, enc_scale=.5)
    with torch.no_grad(): sae.W_enc[:, :10] *= .01
    log = fit(sae, Together(Balanced(3.), AuxK(dead_after=500)), lambda n: torch.randn(n, 8, generator=g)/8**.5, steps=150, batch_size=128)
    assert log[-1]["l0"] == pytest.approx(3., rel=.3)
