"The Gated gate against its definition, whatever its parameters are."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.gated import GatedGate
from jumprelu_nb.sae.gates import GATES, make_gate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.sparse import codes_of

some = settings(max_examples=25, deadline=None)


def make(d_in, d_sae, seed, spread=1., **kw):
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, "gated", **kw).init_(seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(d_in, generator=g))
        if sae.decoder_norm == "free": sae.W_dec.mul_(.2 + 2 * torch.rand(d_sae, 1, generator=g))
        for p in sae.gate.parameters(): p.copy_(spread * torch.randn(d_sae, generator=g) * (torch.rand(d_sae, generator=g) < .8))   # some exactly 0
    return sae, g


def by_definition(sae, u):
    "Entry by entry, in the paper's words"
    z = (u - sae.b_dec if sae.pre_encoder_bias else u) @ sae.W_enc
    open_ = (z + sae.gate.b_gate > 0).to(z)
    return open_ * torch.relu(torch.exp(sae.gate.r_mag) * z + sae.gate.b_mag)


@some
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 999), st.sampled_from([.1, 1., 3.]), st.sampled_from([.125, 1., 37.]), st.booleans(), st.sampled_from(["unit", "free"]))
def test_folding_is_exact(d_in, d_sae, seed, spread, C, pre, norm):
    sae, g = make(d_in, d_sae, seed, spread, scale=C, pre_encoder_bias=pre, decoder_norm=norm)
    sae = sae.double()
    u = torch.randn(60, d_in, generator=g, dtype=torch.float64)
    acts = by_definition(sae, u).detach()
    torch.testing.assert_close(sae.encode(C * u).detach() / C, acts)
    folded = sae.fold()
    big = 1 + acts.abs().max()
    assert folded.gate.name == "jumprelu" and (folded.threshold >= 0).all()
    length = sae.W_dec.norm(dim=-1).detach() if norm == "free" else 1.
    off = (folded.encode(C * u) > 0) != (acts > 0)
    near = ((folded.pre_acts(C * u) - folded.gate.threshold).abs() < 1e-5 * C * big)             # θ is kept in float32
    assert not (off & ~near).any()
    torch.testing.assert_close(folded.encode(C * u)[~off] / C, (acts * length)[~off], atol=1e-6 * big.item(), rtol=1e-6)
    if not off.any(): torch.testing.assert_close(folded(C * u) / C, sae(C * u).detach() / C, atol=1e-6 * big.item() * d_sae, rtol=1e-6)


@some
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 999), st.booleans())
def test_list_equals_table(d_in, d_sae, seed, pre):
    def one(form):
        sae, g = make(d_in, d_sae, seed, pre_encoder_bias=pre)
        codes = codes_of(sae, torch.randn(50, d_in, generator=g), form)
        a, f = sae.gate.gate_path(codes.z, codes.at), codes.f
        loss = codes.mean(a * a) + codes.mean(f * f) + codes.mean(a * f)
        loss.backward()
        return loss.detach(), codes.table(a).detach(), codes.table(f).detach(), {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    (la, aa, fa, da), (lb, ab, fb, db) = one("table"), one("list")
    for x, y in ((la, lb), (aa, ab), (fa, fb)): torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    for n in da: torch.testing.assert_close(da[n], db.get(n, torch.zeros_like(da[n])), atol=1e-3, rtol=1e-3)


def test_saved_and_loaded(tmp_path):
    sae, g = make(6, 20, 1, scale=3., pre_encoder_bias=True)
    x = 3 * torch.randn(40, 6, generator=g)
    again = SAE.load(sae.save(tmp_path))
    assert again.gate.name == "jumprelu"
    torch.testing.assert_close(again(x), sae(x).detach(), atol=1e-4, rtol=1e-4)


def test_registered():
    assert GATES["gated"] is GatedGate
    gate = make_gate("gated", 7)
    assert gate.owns_bias and not gate.batch_dependent and sum(p.numel() for p in gate.parameters()) == 21
    assert torch.equal(gate(x := torch.randn(5, 7)), x.relu())                # as it starts


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (0, 7)])
def test_any_leading_shape(shape):
    gate = make_gate("gated", 7)
    assert gate(torch.zeros(shape)).shape == gate.gate_path(torch.zeros(shape)).shape == gate.select(torch.zeros(shape)).shape == shape
