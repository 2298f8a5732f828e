"What protects the Matryoshka loss: any prefixes in both forms, every hook of the objective inside, state, folding."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.gates import JumpReLUGate, TopKGate
from jumprelu_nb.sae.matryoshka import Matryoshka, chunks, nested, nested_reconstructions, prefixes
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import L1, Balanced, Objective, Together, fit, reconstruction_loss
from jumprelu_nb.sae.sparse import codes_of

slow = settings(max_examples=25, deadline=None)


def make(d_in, d_sae, batch, seed, form="auto", gate="jumprelu"):
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, JumpReLUGate(d_sae, .3, bandwidth=.2) if gate == "jumprelu" else TopKGate(d_sae, min(3, d_sae)), pre_encoder_bias=True).init_(seed)
    for p in (sae.b_enc, sae.b_dec): p.data = .2*torch.randn(p.shape, generator=g)
    return sae, codes_of(sae, torch.randn(batch, d_in, generator=g), form, target=torch.randn(batch, d_in, generator=g))


@slow
@given(st.integers(1, 10), st.integers(1, 40), st.integers(1, 25), st.integers(0, 99), st.sampled_from(["jumprelu", "topk"]), st.data())
def test_any_prefixes(d_in, d_sae, batch, seed, gate, data):
    inner = data.draw(st.sets(st.integers(0, d_sae - 1), max_size=6))
    p = (*sorted(inner), d_sae)
    w = data.draw(st.lists(st.floats(.1, 3), min_size=len(p), max_size=len(p)))
    for form in ("table", "list"):
        sae, codes = make(d_in, d_sae, batch, seed, form, gate)
        f = sae.gate(sae.pre_acts(codes.u))
        want = sum(wj*(codes.target - f[:, :m] @ sae.W_dec[:m] - sae.b_dec).square().sum(-1).mean() for wj, m in zip(w, p))/sum(w)
        got = Matryoshka(p, weights=w).reconstruction(sae, codes)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        for a, b in zip(*(torch.autograd.grad(x, list(sae.parameters()), allow_unused=True) for x in (got, want))): torch.testing.assert_close(a, b, atol=2e-4*max(1, b.abs().max().item()), rtol=1e-3)
        assert len(chunks(codes, p)) == len(nested_reconstructions(codes, p)) == len(p)


def test_nothing_fires():
    sae, _ = make(6, 20, 5, 1); sae.gate.set_threshold_(100.)
    codes = codes_of(sae, torch.randn(4, 6), "list")
    loss = Matryoshka(prefixes(20, (.25, .5, 1))).reconstruction(sae, codes); loss.backward()
    torch.testing.assert_close(loss.detach(), reconstruction_loss(codes.u, sae.b_dec.detach().expand(4, -1)))


class Noted(Objective):
    "An objective that notes which of its moments came."
    state = ("seen",)
    def __init__(self): self.seen = []
    def before_step_(self, sae, progress): self.seen.append("before")
    def penalty(self, sae, codes, progress): self.seen.append("penalty"); return 0.
    def adjust_grads_(self, sae, codes): self.seen.append("adjust")
    def after_step_(self, sae, l0, progress): self.seen.append("after")


def test_every_moment_reaches_the_objective_inside():
    sae, _ = make(6, 20, 5, 1); inside = Noted(); inside.needs_table = True
    objective = Matryoshka((5, 20), inside)
    fit(sae, objective, lambda n: torch.randn(n, 6), steps=1, batch_size=8)
    assert inside.seen == ["before", "penalty", "adjust", "after"] and objective.needs_table
    assert objective.state == ("seen",) and objective.state_dict() == {"seen": inside.seen} and objective.seen is inside.seen
    with pytest.raises(AttributeError): objective.nonsense


def test_state_goes_through_together_and_copies():
    a = Matryoshka((5, 20), L1(.3, l0=4.)); b = copy.deepcopy(a)
    sae, codes = make(6, 20, 5, 1)
    a.after_step_(sae, torch.tensor(9.), 1.)
    assert a.coefficient > b.coefficient
    t = Together(Objective(), b); t.load_state_dict(Together(Objective(), a).state_dict())
    assert b.coefficient == a.coefficient
    with pytest.raises(ValueError, match="belongs to another objective"): Matryoshka((5, 20), Balanced(3.)).load_state_dict(a.state_dict())


def test_refusals():
    sae, codes = make(6, 20, 5, 1)
    for p in ((5, 10), (5, 40)):
        with pytest.raises(ValueError, match="must be the whole dictionary of 20"): Matryoshka(p).reconstruction(sae, codes)
    for w in ((1,), (0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(ValueError, match="one weight ≥ 0 per prefix"): Matryoshka((5, 20), weights=w)
    for p, why in (((True, 20), "whole numbers"), (("5", 20), "whole numbers"), ((0,), "the last one holds latents"), ((20, 5), "do not nest")):
        with pytest.raises(ValueError, match=why): nested(p)


def test_it_folds_as_ever():
    g = torch.Generator().manual_seed(0)
    sae, _ = make(6, 32, 5, 1)
    fit(sae, Matryoshka(prefixes(32, (.25, .5, 1)), Balanced(3.)), lambda n: torch.randn(n, 6, generator=g)/6**.5, steps=60, batch_size=64)
    x = torch.randn(20, 6, generator=g)/6**.5
    torch.testing.assert_close(sae.fold()(x), sae(x).detach(), atol=1e-5, rtol=1e-4)
