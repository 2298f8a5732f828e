"What protects the SAE chapter: folding, thresholds, files and objectives against independent computations."
import json
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.gates import GATES, JumpReLUGate, TopKGate, make_gate
from jumprelu_nb.sae.model import SAE, fold, threshold_for_l0, write_atomically
from jumprelu_nb.sae.sparse import codes_of
from jumprelu_nb.sae.objectives import Balanced, L0Target, l0_penalty, reconstruction_loss

slow = settings(max_examples=25, deadline=None)


def make(d_in, d_sae, seed, gate="jumprelu", **kw):
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, make_gate(gate, d_sae, **({"k": min(3, d_sae)} if "topk" in gate or "choice" in gate else {})), **kw).init_(seed, enc_scale=.8)
    with torch.no_grad():
        sae.b_enc.copy_(.2 * torch.randn(d_sae, generator=g)); sae.b_dec.copy_(.5 * torch.randn(d_in, generator=g))
        if sae.decoder_norm == "free": sae.W_dec.mul_(.2 + 2 * torch.rand(d_sae, 1, generator=g))
        if gate == "jumprelu": sae.gate.set_threshold_(.5 * torch.rand(d_sae, generator=g))
    return sae, g


@slow
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 99), st.sampled_from([k for k, g in sorted(GATES.items()) if not g.batch_dependent]), st.sampled_from([.1, 1., 37.]), st.booleans(), st.sampled_from(["unit", "free"]))
def test_folding_changes_nothing(d_in, d_sae, seed, gate, C, pre, norm):
    sae, g = make(d_in, d_sae, seed, gate, scale=C, pre_encoder_bias=pre, decoder_norm=norm)
    sae = sae.double()
    x = C * torch.randn(50, d_in, generator=g, dtype=torch.float64)
    folded = sae.fold()
    torch.testing.assert_close(folded(x) / C, sae(x).detach() / C, atol=1e-5, rtol=1e-4)
    assert folded.scale.item() == 1 and not folded.pre_encoder_bias
    again = fold(folded)
    torch.testing.assert_close(again(x), folded(x), atol=1e-5 * C, rtol=1e-5)


@slow
@given(st.integers(2, 50), st.integers(2, 30), st.integers(0, 99), st.floats(.05, .95))
def test_threshold_for_l0_is_exact(n, m, seed, share):
    g = torch.Generator().manual_seed(seed)
    z, theta = torch.randn(n, m, generator=g), .1 + torch.rand(m, generator=g)
    l0 = share * m
    if not 0 < round(l0 * n) < n * m: return
    s = threshold_for_l0(z, l0, theta)
    positive = int((z > 0).sum())
    assert int((z > s * theta).sum()) == min(round(l0 * n), positive)


def test_pre_encoder_bias_is_what_it_says():
    sae, g = make(7, 20, 3, pre_encoder_bias=True)
    u = torch.randn(5, 7, generator=g)
    torch.testing.assert_close(sae.pre_acts(u), (u - sae.b_dec) @ sae.W_enc + sae.b_enc)


@pytest.mark.parametrize("how", ["table", "list"])
@pytest.mark.parametrize("form", ["raw", "log"])
def test_balanced_price_is_the_mean_marginal_benefit(form, how):
    "λ = −(B/n_W) Σ_W θ_i G_bi over all entries inside the window, written out entry by entry"
    sae = SAE(6, 12, JumpReLUGate(12, .2, bandwidth=.15, parametrisation=form)).init_(2, enc_scale=.5)
    u = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) / 6**.5
    codes = codes_of(sae, u, how)
    z, u_hat = sae.pre_acts(u), codes.u_hat
    reconstruction_loss(u, u_hat).backward()
    objective = Balanced(3.); objective.adjust_grads_(sae, codes)
    theta, eps, B = .2, .15, 40
    total, n, by_latent = 0., 0, torch.zeros(12)
    with torch.no_grad():
        G = 2 / B * (u_hat - u) @ sae.W_dec.T
        window = [(b, i) for b in range(B) for i in range(12) if abs(z[b, i] - theta) < eps / 2]
        for b, i in window: total += theta * G[b, i].item(); n += 1
        price = -B / n * total
        for b, i in window: by_latent[i] += -(theta * G[b, i] + price / B) / eps
    assert n > 20
    assert objective.price.item() == pytest.approx(price, rel=1e-4)
    torch.testing.assert_close(sae.gate.param.grad / (theta if form == "log" else 1), by_latent, atol=1e-5, rtol=1e-3)


def test_l0_target_is_for_the_batch_mean():
    sae = SAE(4, 4, JumpReLUGate(4, .5)); sae.W_enc.data = torch.eye(4)
    for form in ("table", "list"):
        codes = codes_of(sae, torch.tensor([[1., 1., -1., -1.], [1., 1., 1., 1.]]), form)
        assert L0Target(3.).penalty(sae, codes, 1.).item() == 0.
        assert l0_penalty(codes).item() == 3.


def test_thresholds_are_projected_in_memory_and_in_the_file(tmp_path):
    sae, _ = make(4, 6, 0)
    with torch.no_grad(): sae.gate.param.fill_(-.1)
    opt = torch.optim.SGD(sae.parameters(), lr=0.)
    sae(torch.randn(8, 4)).sum().backward(); opt.step(); sae.project_()
    assert (sae.gate.threshold >= 0).all()
    with torch.no_grad(): sae.gate.param.fill_(-.1)       # even unprojected, a file never holds negative ones
    assert (SAE.load(sae.save(tmp_path/"x")).threshold >= 0).all()


def test_training_and_inference_activations_agree_for_any_threshold():
    z = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    for theta in (0., .3): assert (JumpReLUGate(5, theta)(z) >= 0).all()


def test_topk_ties_and_negatives():
    gate = TopKGate(5, 3)
    assert (gate(torch.full((2, 5), -1.)) == 0).all()
    assert ((gate(torch.ones(2, 5)) > 0).sum(-1) == 3).all()


def test_saelens_files_are_read(tmp_path):
    "as its 6.54.12 writes a JumpReLU that centres its input: top-level keys, five tensors"
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(0)
    t = dict(W_enc=torch.randn(8, 16, generator=g), b_enc=torch.randn(16, generator=g), W_dec=torch.randn(16, 8, generator=g), b_dec=torch.randn(8, generator=g), threshold=torch.rand(16, generator=g))
    save_file(t, tmp_path/"sae_weights.safetensors")
    cfg = dict(architecture="jumprelu", d_in=8, d_sae=16, dtype="float32", device="cpu", apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
               metadata=dict(sae_lens_version="6.54.12", hook_name="blocks.2.hook_resid_post"))
    (tmp_path/"cfg.json").write_text(json.dumps(cfg))
    sae, x = SAE.load(tmp_path), torch.randn(30, 8, generator=g)
    z = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = z.relu() * (z > t["threshold"])
    torch.testing.assert_close(sae.encode(x), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), f @ t["W_dec"] + t["b_dec"], atol=1e-5, rtol=1e-5)
    files = SAE.load(sae.save(tmp_path/"ours"))
    torch.testing.assert_close(files(x), sae(x), atol=1e-5, rtol=1e-4)
    written = json.loads((tmp_path/"ours"/"cfg.json").read_text())
    assert written["apply_b_dec_to_input"] is False and written["metadata"]["sae_lens_version"] >= "6"


def test_nan_weights_are_not_saved(tmp_path):
    sae, _ = make(4, 6, 0)
    with torch.no_grad(): sae.W_dec[0, 0] = float("nan")
    with pytest.raises(ValueError, match="diverged"): sae.save(tmp_path/"x")
    assert not (tmp_path/"x"/"cfg.json").exists()


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path/"f"
    write_atomically(path, "old")
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError): write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_bfloat16_sae_encodes_like_float32():
    sae, g = make(16, 64, 1, scale=3.)
    folded, half = sae.fold(), sae.fold().to(torch.bfloat16)
    x = 3 * torch.randn(100, 16, generator=g)
    assert half.threshold.dtype == torch.float32
    err = (half(x).float() - folded(x)).square().sum() / folded(x).square().sum()
    assert err < 1e-2
