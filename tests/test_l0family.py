"What protects l0family: both forms of the codes for any shape, steering, conversions there and back, hostile input."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.gates import JumpReLUGate, TopKGate
from jumprelu_nb.sae.l0family import SCALE_POWERS, FrequencyPenalty, QuadraticFrequency, QuadraticL0, TanhL0, active, anthropic_init_, pre_act_penalty, tanh_penalty, to_unit_scale
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import Together, fit
from jumprelu_nb.sae.sparse import codes_of

slow = settings(max_examples=20, deadline=None)


def make(d_in, d_sae, batch, seed, form="auto", norm="free", pre=True, parametrisation="raw", kernel="rectangle", ste=True):
    g = torch.Generator().manual_seed(seed)
    gate = JumpReLUGate(d_sae, .05 + .4*torch.rand(d_sae, generator=g), bandwidth=.15, kernel=kernel, parametrisation=parametrisation, ste_to_input=ste)
    sae = SAE(d_in, d_sae, gate, decoder_norm=norm, pre_encoder_bias=pre).init_(seed)
    for p in (sae.b_enc, sae.b_dec): p.data = .2*torch.randn(p.shape, generator=g)
    if norm == "free": sae.W_dec.data *= .3 + torch.rand(d_sae, 1, generator=g)
    return sae, codes_of(sae, torch.randn(batch, d_in, generator=g)/d_in**.5, form, silent=1e9*(torch.rand(d_sae, generator=g) < .3))


objectives = {"per token": lambda: QuadraticL0(3.), "frequency": lambda: QuadraticFrequency(.1, .05), "surcharge": lambda: FrequencyPenalty(.1, .05), "tanh": lambda: TanhL0(1., 0., pre_act=.1, d_in=4),
              "tanh, dead": lambda: TanhL0(1., 0., pre_act=.1, d_in=4, pre_act_on="dead"), "together": lambda: Together(QuadraticL0(3.), FrequencyPenalty(.1))}


@slow
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99), st.sampled_from(sorted(objectives)), st.booleans(), st.sampled_from(["raw", "log"]), st.sampled_from(["rectangle", "gaussian", "triangle"]))
def test_tables_and_lists_agree(d_in, d_sae, batch, seed, name, pre, parametrisation, kernel):
    got = []
    for form in ("table", "list"):
        sae, codes = make(d_in, d_sae, batch, seed, form, pre=pre, parametrisation=parametrisation, kernel=kernel)
        loss = objectives[name]().penalty(sae, codes, 1.)
        loss.backward()
        got.append([loss.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in sae.parameters()])
    for a, b in zip(*got): torch.testing.assert_close(a, b, atol=3e-5*max(1., a.abs().max().item()), rtol=1e-3)


@slow
@given(st.integers(1, 10), st.integers(1, 30), st.integers(1, 20), st.integers(0, 99), st.booleans(), st.sampled_from(["free", "unit"]))
def test_pre_act_penalty_is_the_dense_sum(d_in, d_sae, batch, seed, pre, norm):
    sae, codes = make(d_in, d_sae, batch, seed, "list", norm, pre)
    some = torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < .5
    dense = (sae.gate.threshold - sae.pre_acts(codes.u)).relu() * sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(pre_act_penalty(codes), dense.sum(-1).mean(), atol=1e-5*d_sae, rtol=1e-4)
    torch.testing.assert_close(pre_act_penalty(codes, some), dense[:, some].sum(-1).mean(), atol=1e-5*d_sae, rtol=1e-4)


def test_unit_rows_count_as_one():
    "With rows kept at norm 1, the gradient that norms would have is along the row, which the projection removes"
    sae, codes = make(6, 20, 30, 1, "list", "unit")
    ours = torch.autograd.grad(tanh_penalty(codes, 3.), sae.gate.param)[0]
    sae2, codes2 = make(6, 20, 30, 1, "list", "unit"); sae2.decoder_norm = "free"
    theirs = torch.autograd.grad(tanh_penalty(codes2, 3.), (sae2.gate.param, sae2.W_dec))
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-4)
    d = sae2.W_dec.detach(); across = theirs[1] - (theirs[1]*d).sum(-1, keepdim=True)*d
    assert across.abs().max() < 1e-5


@pytest.mark.parametrize("kind", sorted(SCALE_POWERS))
def test_conversions_there_and_back(kind):
    for d, norm in ((1, 1.), (20, .9), (2304, .97)):
        there = to_unit_scale(kind, .37, d, norm)
        assert there == pytest.approx(.37*(math.sqrt(d)/norm)**SCALE_POWERS[kind])
        assert to_unit_scale(kind, there, d, norm, back=True) == pytest.approx(.37)


def test_d_in_of_one_means_our_own_scale():
    o = TanhL0(.3, scale=7., pre_act=.2, d_in=1)
    assert (o.coefficient.item(), o.scale, o.pre_act) == (pytest.approx(.3), 7., .2)


def test_steered_objectives_reach_their_l0():
    for make_objective in (lambda: QuadraticFrequency(.01, .1, .2, 3.), lambda: TanhL0(.2, .3, 3., gain=.02, d_in=10)):
        g, truth = torch.Generator().manual_seed(0), torch.nn.functional.normalize(torch.randn(20, 10, generator=torch.Generator().manual_seed(9)), dim=-1)
        sae = SAE(10, 32, JumpReLUGate(32, .15, parametrisation="log", relative_bandwidth=.5), pre_encoder_bias=True).init_(0, enc_scale=.5)
        objective = make_objective()
        log = fit(sae, objective, lambda n: ((torch.rand(n, 20, generator=g) < .12)*(.5 + torch.rand(n, 20, generator=g))) @ truth/1.6, steps=400, batch_size=256)
        assert sum(r["l0"] for r in log[-8:])/8 == pytest.approx(3., rel=.2)
        other = make_objective(); other.load_state_dict(objective.state_dict())
        assert other.coefficient == objective.coefficient


def test_refusals():
    sae, codes = make(6, 20, 30, 1)
    with pytest.raises(ValueError, match="must be positive"): QuadraticL0(0.)
    with pytest.raises(ValueError, match="choose warmup < 1"): QuadraticFrequency(.1, warmup=1., l0=3.)
    with pytest.raises(ValueError, match="frequency, so it must be positive"): FrequencyPenalty(.1, 0.)
    with pytest.raises(ValueError, match="choose 'all' or 'dead'"): TanhL0(1., d_in=4, pre_act_on="some")
    with pytest.raises(ValueError, match="give silent="): TanhL0(1., d_in=6, pre_act_on="dead").penalty(sae, codes_of(sae, codes.u), 1.)
    topk = SAE(6, 20, TopKGate(20, 3)).init_(0)
    for o in (QuadraticL0(3.), QuadraticFrequency(.1), FrequencyPenalty(.1), TanhL0(1., d_in=6)):
        with pytest.raises(ValueError, match="use a JumpReLU gate"): o.penalty(topk, codes_of(topk, codes.u), 1.)
    with pytest.raises(ValueError, match="decoder_norm='free'"): anthropic_init_(SAE(6, 20), codes.u)
    wide = SAE(6, 20, decoder_norm="free"); wide.W_dec = torch.nn.Parameter(torch.zeros(20, 9))
    with pytest.raises(ValueError, match="inputs have 6 dimensions and outputs 9"): anthropic_init_(wide, codes.u, l0=3.)


def test_a_batch_in_which_nothing_fires():
    sae, _ = make(6, 20, 30, 1)
    sae.gate.set_threshold_(100.)
    codes = codes_of(sae, torch.randn(4, 6), "list")
    assert active(codes).numel() == 0
    for o in (QuadraticL0(3., 1.), QuadraticFrequency(.1), FrequencyPenalty(.1), TanhL0(1., 0., d_in=6)):
        loss = o.penalty(sae, codes, 1.)
        assert loss.isfinite()
        torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True, retain_graph=True)
    assert QuadraticL0(3., 1.).penalty(sae, codes, 1.).item() == pytest.approx(2/3*9)


def test_init_is_reproducible_and_apart_from_the_data():
    u = torch.randn(500, 12, generator=torch.Generator().manual_seed(3))
    a, b, c = (anthropic_init_(SAE(12, 64, JumpReLUGate(64, .3), decoder_norm="free"), u, l0=6., seed=s) for s in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)
    assert a.W_dec.abs().max() <= 12**-.5 and (a.gate(a.pre_acts(u)) != 0).sum(-1).float().mean().item() == pytest.approx(6., rel=.02)
