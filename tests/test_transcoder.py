"What protects transcoders: folding, files and starts against independent computations and hostile input."
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from jumprelu_nb.sae.gates import GATES, Gate, JumpReLUGate, make_gate
from jumprelu_nb.sae.model import SAE, fold
from jumprelu_nb.sae.objectives import Balanced, Objective, fit, l0_penalty, reconstruction_loss, update_
from jumprelu_nb.sae.sparse import codes_of
from jumprelu_nb.sae.transcoder import Transcoder, best_affine

slow = settings(max_examples=25, deadline=None)


def make(d_in, d_sae, d_out, seed=0, gate="jumprelu", skip=True, **kw):
    g = torch.Generator().manual_seed(seed)
    tc = Transcoder(d_in, d_sae, make_gate(gate, d_sae, **({"k": min(3, d_sae)} if gate == "topk" else {})), d_out=d_out, skip=skip, **kw).init_(seed, .8)
    with torch.no_grad():
        tc.b_enc.copy_(.2*torch.randn(d_sae, generator=g)); tc.b_dec.copy_(.5*torch.randn(d_out, generator=g))
        if skip: tc.W_skip.copy_(torch.randn(d_in, d_out, generator=g))
        if tc.decoder_norm == "free": tc.W_dec.mul_(.2 + 2*torch.rand(d_sae, 1, generator=g))
        if gate == "jumprelu": tc.gate.set_threshold_(.5*torch.rand(d_sae, generator=g))
    return tc, g


def by_hand(tc, x):
    "the definition, in the units of training"
    C = tc.scale.double()
    t = tc.gate(x/C @ tc.W_enc + tc.b_enc) @ tc.W_dec + tc.b_dec
    return C*(t if tc.W_skip is None else t + x/C @ tc.W_skip)


@slow
@given(st.integers(1, 12), st.integers(3, 30), st.integers(1, 12), st.integers(0, 99), st.sampled_from(["jumprelu", "relu", "topk"]), st.sampled_from([.1, 1., 37.]), st.booleans(), st.sampled_from(["unit", "free"]))
def test_folding_changes_nothing(d_in, d_sae, d_out, seed, gate, C, skip, norm):
    "§8 #8: scale and decoder norm, thresholds included, for any width of the output"
    tc, g = make(d_in, d_sae, d_out, seed, gate, skip, scale=C, decoder_norm=norm)
    tc = tc.double()
    x = C*torch.randn(50, d_in, generator=g, dtype=torch.float64)
    torch.testing.assert_close(tc(x), by_hand(tc, x), atol=1e-9*C, rtol=1e-9)
    folded = tc.fold()
    torch.testing.assert_close(folded(x)/C, tc(x).detach()/C, atol=1e-5, rtol=1e-4)
    assert isinstance(folded, Transcoder) and (folded.scale.item(), folded.d_out, folded.pre_encoder_bias) == (1, d_out, False)
    if skip: assert torch.equal(folded.W_skip, tc.W_skip) and folded.W_skip.dtype == torch.float64
    again = fold(folded)
    torch.testing.assert_close(again(x), folded(x), atol=1e-5*C, rtol=1e-5)


@pytest.mark.parametrize("C", [.1, 37.])
@pytest.mark.parametrize("skip", [False, True])
def test_fold_keeps_the_mask_in_float32(C, skip):
    tc, g = make(24, 200, 10, 5, skip=skip, scale=C)
    x = C*torch.randn(1000, 24, generator=g)
    folded = tc.fold()
    assert torch.equal(folded.encode(x) > 0, tc.encode(x) > 0)
    assert ((folded(x) - tc(x)).abs().max()/C).item() < 1e-5


def test_topk_folds_to_a_jumprelu_on_a_sample():
    tc, g = make(24, 64, 10, gate="topk", scale=5.)
    x = 5*torch.randn(800, 24, generator=g)
    folded = tc.fold(calibrate=x)
    assert folded.gate.name == "jumprelu" and torch.equal(folded.W_skip, tc.W_skip)
    l0 = lambda t: (t.encode(x) > 0).sum(-1).float().mean().item()
    assert l0(folded) == pytest.approx(l0(tc), abs=.02)


@pytest.mark.parametrize("gate", ["jumprelu", "relu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_list_equals_table(gate, skip):
    tc, g = make(12, 80, 7, 2, gate, skip)
    u, t = torch.randn(200, 12, generator=g)/12**.5, torch.randn(200, 7, generator=g)
    def run(form):
        codes = codes_of(tc, u, form, target=t)
        loss = reconstruction_loss(codes.target, codes.u_hat) + (.01*l0_penalty(codes) if gate == "jumprelu" else 0)
        tc.zero_grad(); loss.backward()
        return loss.item(), {k: p.grad.clone() for k, p in tc.named_parameters()}
    (a, ga), (b, gb) = run("table"), run("list")
    assert a == pytest.approx(b, rel=1e-5)
    for k in ga: torch.testing.assert_close(ga[k], gb[k], atol=1e-5, rtol=1e-4)
    if skip:                                                   # that of the skip connection in closed form: −2 uᵀ(t − t̂)/B
        e = t - codes_of(tc, u, "table", target=t).u_hat.detach()
        torch.testing.assert_close(ga["W_skip"], -2*u.T @ e/len(u), atol=1e-5, rtol=1e-4)


def test_seeds():
    "§8 #20, and the two matrices are not made of the same random numbers"
    a, b, c = (Transcoder(16, 64, "relu").init_(s) for s in (1, 1, 2))
    for k in ("W_enc", "W_dec"): assert torch.equal(getattr(a, k), getattr(b, k)) and not torch.equal(getattr(a, k), getattr(c, k))
    cos = (a.W_enc.T*a.W_dec).sum(-1)
    assert cos.abs().mean() < .4 and cos.max() < .9
    assert torch.allclose(a.W_dec.norm(dim=-1), torch.ones(64), atol=1e-6) and torch.allclose(a.W_enc.norm(dim=0), torch.ones(64), atol=1e-6)
    sae = SAE(16, 64, "relu").init_(1)                         # nor of those of an SAE with the same seed
    assert not torch.equal(sae.W_dec, a.W_dec) and not torch.equal(sae.W_enc, a.W_enc)


def test_init_resets_and_centres():
    tc, g = make(12, 30, 5)
    mu = torch.randn(12, generator=g)
    tc.init_(3, .5, torch.arange(5.), centre=mu)
    assert (tc.W_skip == 0).all() and torch.equal(tc.b_dec.detach(), torch.arange(5.))
    assert tc.pre_acts(mu).abs().max() < 1e-5
    assert (Transcoder(12, 30, "relu", d_out=5).init_(3).b_enc == 0).all()
    short = Transcoder(12, 30, "relu", d_out=5, decoder_norm="free").init_(3, dec_norm=.1)
    torch.testing.assert_close(short.W_dec.norm(dim=-1), torch.full((30,), .1))
    with pytest.raises(ValueError, match="free"): tc.init_(3, dec_norm=.1)


def test_align_is_the_covariance_in_any_number_of_pieces():
    tc, g = make(12, 300, 5, 1)
    u, t = torch.randn(3000, 12, generator=g), torch.randn(3000, 5, generator=g)
    f = tc.gate(tc.pre_acts(u)).detach()
    c = (f - f.mean(0)).T @ (t - t.mean(0))
    tc.align_(u, t)
    torch.testing.assert_close(tc.W_dec.detach(), torch.nn.functional.normalize(c, dim=-1), atol=1e-4, rtol=1e-3)
    free, _ = make(12, 300, 5, 1, decoder_norm="free")
    norms = free.W_dec.norm(dim=-1).clone(); free.align_(u, t)
    torch.testing.assert_close(free.W_dec.norm(dim=-1), norms)
    dead, _ = make(12, 300, 5, 1); dead.gate.set_threshold_(1e6); rows = dead.W_dec.clone()
    assert torch.equal(dead.align_(u, t).W_dec, rows)


@pytest.mark.parametrize("skip", [False, True])
def test_rows_stay_unit_and_the_skip_is_trained(skip):
    "§8 #15, #16: along the right axis, with d_out ≠ d_in; and an affine layer is imitated exactly with a skip connection, and not without"
    g = torch.Generator().manual_seed(0)
    tc = Transcoder(12, 40, JumpReLUGate(40, .3, parametrisation="log", relative_bandwidth=.5), d_out=5, skip=skip).init_(0, .5, torch.ones(5))
    W = .3*torch.randn(12, 5, generator=g)
    log = fit(tc, Balanced(3.), lambda n: torch.randn(n, 12, generator=g)/12**.5, steps=300, batch_size=128, target=lambda u: u @ W + 1)
    assert (tc.W_dec.norm(dim=-1) - 1).abs().max() < 1e-6
    assert log[-1]["fvu"] < 1e-4 if skip else log[-1]["fvu"] > 1e-2


def test_gradient_is_projected():
    "§8 #17"
    tc, g = make(12, 40, 5)
    codes = codes_of(tc, torch.randn(64, 12, generator=g), target=torch.randn(64, 5, generator=g))
    reconstruction_loss(codes.target, codes.u_hat).backward(); tc.project_grad_()
    assert (tc.W_dec.grad*torch.nn.functional.normalize(tc.W_dec, dim=-1)).sum(-1).abs().max() < 1e-6


def test_other_shapes():
    tc, g = make(6, 10, 4)
    x = torch.randn(2, 3, 6, generator=g)
    assert tc(x).shape == (2, 3, 4) and tc(x[0, 0]).shape == (4,)
    torch.testing.assert_close(tc(x)[1, 2], tc(x[1, 2]))
    torch.testing.assert_close(tc.reconstruct(tc.gate(tc.pre_acts(x)), x), tc(x))
    assert tc(x[:0]).shape == (0, 3, 4)


def test_refusals():
    tc, _ = make(6, 10, 4)
    with pytest.raises(ValueError, match="decode\\(acts, x\\)"): tc.decode(torch.zeros(3, 10))
    with pytest.raises(ValueError, match="decode\\(acts, x\\)"): tc.reconstruct(torch.zeros(3, 10))
    with pytest.raises(ValueError, match="don't belong"): tc.decode(torch.zeros(3, 10), torch.zeros(3, 7))
    with pytest.raises(ValueError, match="don't belong"): tc.decode(torch.zeros(3, 10), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="width 6, got 4"): tc(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="d_out ≥ 1"): Transcoder(6, 10, "relu", d_out=0)
    with pytest.raises(TypeError): Transcoder(6, 10, "relu", pre_encoder_bias=True)
    plain, _ = make(6, 10, 4, skip=False)
    assert plain.decode(torch.zeros(3, 10)).shape == (3, 4)


def test_best_affine_beats_any_other():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=g) + 3, torch.randn(200, 2, generator=g)
    W, b = best_affine(x, y)
    again = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1).double(), y.double()).solution.float()
    torch.testing.assert_close(torch.cat([W, b[None]]), again, atol=1e-5, rtol=1e-4)
    W, b = best_affine(torch.ones(50, 3), y[:50])              # nothing to go by: the mean
    torch.testing.assert_close(torch.ones(50, 3) @ W + b, y[:50].mean(0).expand(50, 2), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("arch", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_saelens_files_are_read(tmp_path, arch):
    "as SAELens 6.54 writes them: W_skip is (d_out, d_in), never a pre-encoder bias"
    g = torch.Generator().manual_seed(0)
    t = dict(W_enc=torch.randn(8, 16, generator=g), b_enc=torch.randn(16, generator=g), W_dec=torch.randn(16, 6, generator=g), b_dec=torch.randn(6, generator=g))
    if "skip" in arch: t["W_skip"] = torch.randn(6, 8, generator=g)
    if "jumprelu" in arch: t["threshold"] = torch.rand(16, generator=g)
    save_file(t, tmp_path/"sae_weights.safetensors")
    cfg = dict(architecture=arch, d_in=8, d_sae=16, d_out=6, dtype="float32", device="cpu", apply_b_dec_to_input=False, normalize_activations="none", reshape_activations="none", metadata={})
    (tmp_path/"cfg.json").write_text(json.dumps(cfg))
    tc, x = Transcoder.load(tmp_path), torch.randn(30, 8, generator=g)
    z = x @ t["W_enc"] + t["b_enc"]
    y = z.relu()*(z > t.get("threshold", 0)) @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "skip" in arch else 0)
    torch.testing.assert_close(tc(x), y, atol=1e-5, rtol=1e-5)
    ours = tc.save(tmp_path/"ours")
    torch.testing.assert_close(Transcoder.load(ours)(x), y, atol=1e-4, rtol=1e-4)
    written = json.loads((ours/"cfg.json").read_text())
    assert written["d_out"] == 6 and written["apply_b_dec_to_input"] is False and written["metadata"]["sae_lens_version"] >= "6"
    assert set(load_file(ours/"sae_weights.safetensors")) == set(t) | {"threshold"}      # loaded strictly over there
    if "skip" in arch: assert load_file(ours/"sae_weights.safetensors")["W_skip"].shape == (6, 8)


def change(folder, **cfg):
    old = json.loads((folder/"cfg.json").read_text())
    (folder/"cfg.json").write_text(json.dumps({k: v for k, v in (old | cfg).items() if v is not ...}))


@pytest.mark.parametrize("cfg, match", [
    (dict(architecture="gated"), "not a transcoder: load it with SAE.load"), (dict(architecture=...), "architecture 'None'"), (dict(architecture=["x"]), "not a transcoder"),
    (dict(d_out=...), "lacks 'd_out'"), (dict(d_in=...), "lacks 'd_in'"), (dict(architecture="topk_skip_transcoder"), "lacks 'k'"),
    (dict(d_out=5), "different transcoders"), (dict(d_sae=11), "different transcoders"), (dict(apply_b_dec_to_input=True), "no pre-encoder bias"),
    (dict(normalize_activations="layer_norm"), "not folded"), (dict(d_out="six"), "whole number"), (dict(d_out=0), "whole number"), (dict(d_in=None), "whole number")])
def test_damaged_configurations(tmp_path, cfg, match):
    folder = make(6, 10, 4)[0].save(tmp_path/"tc")
    change(folder, **cfg)
    with pytest.raises(ValueError, match=match): Transcoder.load(folder)


def test_damaged_weights(tmp_path):
    folder = make(6, 10, 4)[0].save(tmp_path/"tc")
    good = load_file(folder/"sae_weights.safetensors")
    for k in good:
        save_file({n: v for n, v in good.items() if n != k}, folder/"sae_weights.safetensors")
        with pytest.raises(ValueError, match=f"no tensor '{k}'"): Transcoder.load(folder)
    (folder/"sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or damaged"): Transcoder.load(folder)
    (folder/"cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="not readable"): Transcoder.load(folder)
    (folder/"cfg.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"): Transcoder.load(folder)
    with pytest.raises(FileNotFoundError, match="cfg.json"): Transcoder.load(tmp_path)


def test_saes_and_transcoders_are_told_apart(tmp_path):
    sae, tc = SAE(6, 10, "jumprelu").init_(0).save(tmp_path/"sae"), make(6, 10, 6)[0].save(tmp_path/"tc")
    with pytest.raises(ValueError, match="SAE.load"): Transcoder.load(sae)
    with pytest.raises(ValueError, match="transcoder"): SAE.load(tc)


def test_nothing_bad_is_written(tmp_path):
    tc, _ = make(6, 10, 4)
    with torch.no_grad(): tc.W_skip[0, 0] = float("inf")
    with pytest.raises(ValueError, match="diverged"): tc.save(tmp_path/"x")
    assert not (tmp_path/"x"/"cfg.json").exists()
    tc, _ = make(6, 10, 4)
    with torch.no_grad(): tc.gate.param.fill_(-.1)             # §8 #5
    assert (Transcoder.load(tc.save(tmp_path/"y")).threshold >= 0).all()


def test_a_gate_without_a_file_form(tmp_path, monkeypatch):
    class Signed(Gate):
        name = "signed"
        def forward(self, z): return z
    monkeypatch.setitem(GATES, "signed", Signed)
    with pytest.raises(ValueError, match="'signed' has no file form"): Transcoder(6, 10, "signed").save(tmp_path/"x")


def test_half_precision_keeps_thresholds(tmp_path):
    "§8 #7"
    tc = make(6, 10, 4)[0].fold().to(torch.bfloat16)
    again = Transcoder.load(tc.save(tmp_path/"half"))
    assert (again.W_skip.dtype, again.threshold.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(again.threshold, tc.threshold) and torch.equal(again.W_skip, tc.W_skip)


def test_state_dict_round_trip():
    a, g = make(6, 10, 4, 1, scale=3.)
    b, _ = make(6, 10, 4, 2)
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 6, generator=g)
    assert torch.equal(a(x), b(x))


def test_one_step_moves_everything():
    tc, g = make(12, 40, 5)
    tc.W_skip.data.zero_()
    before = {k: v.clone() for k, v in tc.state_dict().items()}
    opt = torch.optim.Adam(tc.parameters(), lr=1e-2)
    update_(tc, Objective(), opt, codes_of(tc, torch.randn(256, 12, generator=g), target=torch.randn(256, 5, generator=g)), 0.)
    assert all(not torch.equal(before[k], v) for k, v in tc.state_dict().items() if k not in ("scale", "gate.bandwidth"))
