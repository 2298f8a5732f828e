"A list of entries is the same SAE as the tables: losses, codes and all gradients, for every gate and random shapes."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.gates import GATES, JumpReLUGate, make_gate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.sparse import Layout, codes_of, positions
from jumprelu_nb.sae.ste import KERNELS

few = settings(max_examples=40, deadline=None)


def gate_of(name, d_sae, g):
    gate = make_gate(name, d_sae, **({"k": min(3, d_sae)} if "topk" in name or "choice" in name else {}))
    with torch.no_grad():
        for p in gate.parameters(): p.add_(.3 * torch.randn(p.shape, generator=g))
    gate.project_()
    return gate


def run(name, d_in, d_sae, batch, seed, pre, form):
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, gate_of(name, d_sae, g), pre_encoder_bias=pre, decoder_norm="free").init_(seed, enc_scale=.8)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec): p.copy_(.2 * torch.randn(p.shape, generator=g))
    codes = codes_of(sae, torch.randn(batch, d_in, generator=g), form)
    w = torch.randn(d_sae, generator=g)
    loss = (codes.target - codes.u_hat).square().sum() + codes.mean(codes.f * codes.spread(w)) + codes.per_token(codes.f).square().sum() + codes.per_latent(codes.f).square().mean()
    if hasattr(sae.gate, "step"): loss = loss + codes.mean(sae.gate.step(codes.z, codes.at) * codes.spread(w))
    loss.backward()
    return [loss.detach(), codes.l0, codes.fired.float(), codes.table(codes.f.detach())] + [torch.zeros_like(p) if p.grad is None else p.grad for p in sae.parameters()]


@few
@given(st.sampled_from(sorted(GATES)), st.integers(1, 20), st.integers(1, 40), st.integers(1, 50), st.integers(0, 999), st.booleans())
def test_list_equals_table(name, d_in, d_sae, batch, seed, pre):
    for a, b in zip(run(name, d_in, d_sae, batch, seed, pre, "table"), run(name, d_in, d_sae, batch, seed, pre, "list")):
        torch.testing.assert_close(a, b, atol=2e-4 * max(1., a.abs().max().item()), rtol=1e-3)


@few
@given(st.integers(1, 60), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))
def test_positions_and_products(n, m, share, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, m, generator=g) < share
    rows, at = positions(mask)
    assert torch.equal(torch.stack((rows, at)), mask.nonzero().T)
    layout, table, x, W = Layout(rows, at, n, m), torch.where(mask, torch.randn(n, m, generator=g), 0.), torch.randn(n, 5, generator=g), torch.randn(m, 5, generator=g)
    torch.testing.assert_close(layout.decode(table[mask], W), table @ W, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layout.collect(table[mask], x), table.T @ x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layout.products(x, W), (x @ W.T)[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_every_kernel_and_ste_to_input(kernel):
    for ste in (False, True):
        out = []
        for form in ("table", "list"):
            g = torch.Generator().manual_seed(5)
            sae = SAE(6, 30, JumpReLUGate(30, .4, bandwidth=.3, kernel=kernel, ste_to_input=ste, parametrisation="log"), pre_encoder_bias=True).init_(1)
            codes = codes_of(sae, torch.randn(64, 6, generator=g) / 2, form)
            ((codes.target - codes.u_hat).square().sum() + 3 * codes.mean(sae.gate.step(codes.z, codes.at))).backward()
            out.append([p.grad for p in sae.parameters()])
        for a, b in zip(*out): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_auto_takes_the_table_when_the_list_would_be_long():
    sae = SAE(8, 64, "relu").init_(0)
    assert codes_of(sae, torch.randn(32, 8)).layout is None
    sae = SAE(8, 64, JumpReLUGate(64, 3.)).init_(0)
    assert codes_of(sae, torch.randn(32, 8)).layout is not None


def test_fired_counts_only_what_is_active():
    "Entries inside the window but below the threshold are on the list and have not fired."
    sae = SAE(4, 4, JumpReLUGate(4, 1., bandwidth=1.)); sae.W_enc.data = torch.eye(4)
    codes = codes_of(sae, torch.tensor([[.8, 2., 0., 0.]]), "list")
    assert codes.at.tolist() == [0, 1] and codes.fired.tolist() == [False, True, False, False] and codes.l0.item() == 1
