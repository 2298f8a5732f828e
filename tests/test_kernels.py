"""The Triton kernels against dense torch: on a GPU if there is one, else in Triton's interpreter (pip install triton, Linux; nothing to set)."""
import copy, json, os, re, subprocess, sys
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st

if not torch.cuda.is_available(): os.environ["TRITON_INTERPRET"] = "1"   # before the kernels are defined

from jumprelu_nb.sae import kernels as K, kernelstep as S
from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import l0_penalty, reconstruction_loss
from jumprelu_nb.sae.sparse import codes_of

root = Path(__file__).resolve().parent.parent
needs = pytest.mark.skipif(not K.available(), reason="Triton is not installed: pip install triton (Linux)")
device = "cuda" if torch.cuda.is_available() else "cpu"
few = settings(max_examples=10, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 90))


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def same(a, b, tol=1e-5): torch.testing.assert_close(a.float(), b.float(), atol=tol, rtol=tol, equal_nan=True)


def encoder(B, d, M, density, seed, dtype=torch.float32):
    "Inputs, limits that let about this share through, and the dense answer."
    u, W, bias = normal(B, d, seed=seed).to(dtype), normal(d, M, seed=seed + 1).to(dtype), normal(M, seed=seed + 2)
    z = u.float() @ W.float() + bias
    ranked = z.flatten().sort().values
    k = round((1 - density) * (len(ranked) - 1))
    low = torch.full((M,), float(ranked[k] + ranked[min(k + 1, len(ranked) - 1)]) / 2 - (density == 1) * 1e3 + (density == 0) * 1e3, device=device)
    return u, W, bias, low, z


def equals_table(s, z, hit):
    rows, at = hit.nonzero().T
    n = len(at)
    assert int(s.count) == n and s.rows[:n].tolist() == rows.tolist() and s.at[:n].tolist() == at.tolist()
    assert s.row_ptr.tolist() == [0] + hit.sum(1).cumsum(0).tolist() and (s.rows[n:] == len(z)).all()
    same(s.z[:n], z[hit], 2e-5)


# ------------------------------------------------------------------------------------------------ the encoder
@needs
@few
@given(shapes, st.sampled_from([0., .01, .1, .5, 1.]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_encode(shape, density, low_precision, columns, seed):
    u, W, bias, low, z = encoder(*shape, density, seed, torch.bfloat16 if low_precision else torch.float32)
    hit = z > low
    s = K.encode_compact(u, W.T.contiguous().T if columns else W, bias, low, int(hit.sum()) + seed % 3 + (not hit.any()))
    equals_table(s, z, hit)
    assert not s.overflow


@needs
def test_encode_more_than_one_tile():
    u, W, bias, low, z = encoder(300, 70, 290, .03, 5)
    lists = [K.encode_compact(u, W, bias, low, 4000, config=c) for c in (None, dict(BB=64, BM=32, BK=16, GROUP=2), dict(BB=16, BM=128, BK=32, GROUP=5))]
    for s in lists:
        equals_table(s, z, z > low)
        assert s.at.tolist() == lists[0].at.tolist()


@needs
def test_every_place_of_a_word():
    "One hit in each column alone, the sign bit included; and whole words"
    M = 96
    for u in (torch.eye(M), torch.ones(3, M).triu(), torch.ones(2, M)):
        z = u.to(device)
        s = K.encode_compact(z, torch.eye(M, device=device), torch.zeros(M, device=device), torch.full((M,), .5, device=device), M * len(u))
        equals_table(s, z, z > .5)


@needs
def test_long_keys():
    "batch · d_sae beyond 2³¹ needs keys of 64 bits: the same kernel, asked for them at a small size"
    u, W, bias, low, z = encoder(20, 9, 70, .1, 3)
    key, at, found = torch.full((200,), 10**12, device=device), torch.zeros(200, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    import triton.language as tl
    K._encode[(2 * 2,)](u, W, bias, low, key, at, found, 20, 70, 9, 70, 1, 200, PRECISION="ieee", FLOAT=tl.float32, WIDE=True, BB=16, BM=64, BK=16, GROUP=2)
    n = int(found)
    assert key.sort().values[:n].tolist() == (z > low).flatten().nonzero().flatten().tolist()


@needs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_stays_on_the_list(bad):
    u, W, bias, low, _ = encoder(12, 6, 40, .1, 0)
    u[7, 2] = bad
    z = u @ W + bias
    s = K.encode_compact(u, W, bias, low, 12 * 40)
    equals_table(s, z, ~(z <= low))


@needs
def test_overflow_counts():
    u, W, bias, low, z = encoder(50, 9, 64, .2, 1)
    n = int((z > low).sum())
    full, cut = K.encode_compact(u, W, bias, low, n), K.encode_compact(u, W, bias, low, n - 1)
    assert not full.overflow and cut.overflow and int(cut.count) == n and len(cut.at) == n - 1
    real = {(r, c) for r, c in (z > low).nonzero().tolist()}
    assert set(zip(cut.rows.tolist(), cut.at.tolist())) < real   # what is kept is real, and once


# ------------------------------------------------------------------------------------------------ the list
def sparse(B, M, share, seed):
    "A random list with empty tokens and latents, its table and values."
    g = torch.Generator().manual_seed(seed)
    hit = torch.rand(B, M, generator=g) < share
    hit[::3] = False; hit[:, ::4] = False
    hit = hit.to(device)
    rows, at = hit.nonzero().T
    n, pad = len(at), 1 + seed % 4
    fill = lambda t, v: torch.cat((t, t.new_full((pad,), v))).int()
    ptr = torch.cat((rows.new_zeros(1), hit.sum(1).cumsum(0))).int()
    s = K.Entries(fill(rows, B), fill(at, 0), torch.zeros(n + pad, device=device), ptr, torch.tensor(n, device=device))
    return s, hit, n


def table(v, hit): return torch.zeros(hit.shape, dtype=torch.float64, device=device).masked_scatter(hit, v[:int(hit.sum())].double())


blocks = st.sampled_from([None, dict(CHUNK=2, BLOCK=16), dict(CHUNK=4, BLOCK=8)])


@needs
@few
@given(st.tuples(st.integers(1, 25), st.integers(1, 30), st.integers(1, 40)), st.sampled_from([0., .1, .6]), st.booleans(), blocks, st.integers(0, 99))
def test_decode_and_products(shape, share, low, config, seed):
    (B, d, M), dtype = shape, torch.bfloat16 if low else torch.float32
    s, hit, n = sparse(B, M, share, seed)
    W, v, x = normal(M, d, seed=1).to(dtype), normal(len(s.at), seed=2), normal(B, d, seed=3)
    same(K.sparse_decode(v, s.at, s.row_ptr, W, config=config), table(v, hit) @ W.double())
    same(K.sparse_decode(v, s.at, s.row_ptr, W, minus=x, config=config), table(v, hit) @ W.double() - x)
    got = K.sampled_products(x.to(dtype), W, s.at, s.row_ptr, config)
    same(got[:n], (x.to(dtype).double() @ W.double().T)[hit])
    assert (got[n:] == 0).all()


@needs
@few
@given(st.tuples(st.integers(1, 25), st.integers(1, 30), st.integers(1, 40)), st.sampled_from([0., .1, .6]), st.booleans(), blocks, st.integers(0, 99))
def test_latent_by_latent(shape, share, low, config, seed):
    (B, d, M), dtype = shape, torch.bfloat16 if low else torch.float32
    s, hit, n = sparse(B, M, share, seed)
    l = S.latent_lists(s, M)
    assert l.ptr.diff().tolist() == hit.sum(0).tolist() and l.rows[:n].tolist() == hit.T.nonzero()[:, 1].tolist()
    assert sorted(l.turn.tolist()) == list(range(M)) and (l.ptr.diff()[l.turn.long()].diff() <= 0).all()
    v = normal(3, len(s.at), seed=4)
    same(S.latent_sums(v.index_select(1, l.order), l), torch.stack([table(x, hit).sum(0) for x in v]))
    u, g = normal(B, d, seed=5).to(dtype), normal(B, d, seed=6).to(dtype)
    enc, dec = S.latent_gradients(u, g, *v[:2].index_select(1, l.order), l, config)
    same(enc, u.double().T @ table(v[1], hit)); same(dec, table(v[0], hit).T @ g.double())


# ------------------------------------------------------------------------------------------------ the step
def make(d, M, seed=0, by_latent=True, enc_scale=.9, **gate):
    gate = dict(threshold=.35, bandwidth=.2) | gate
    kw = {k: gate.pop(k) for k in ("pre_encoder_bias", "decoder_norm") if k in gate}
    sae = SAE(d, M, JumpReLUGate(M, **gate), **kw).init_(seed, enc_scale=enc_scale)
    g = torch.Generator().manual_seed(seed)
    for p in (sae.b_enc, sae.b_dec): p.data.copy_(.1 * torch.randn(p.shape, generator=g))
    sae = sae.to(device)
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T if by_latent else sae.W_enc.data.contiguous()
    return sae


def optimizer(sae, lr, lr_threshold, betas, eps):
    rest = [p for n, p in sae.named_parameters() if n != "gate.param"]
    return torch.optim.Adam([dict(params=rest, lr=lr), dict(params=[sae.gate.param], lr=lr_threshold)], betas=betas, eps=eps)


def dense_step(sae, opt, u, price, target=None):
    codes = codes_of(sae, u, "table", target=target)
    error = reconstruction_loss(codes.target, codes.u_hat)
    opt.zero_grad(); (error + price * l0_penalty(codes)).backward()
    sae.project_grad_(); opt.step(); sae.project_()
    return error.detach(), codes


momentum, small = dict(betas=(.9, .99)), dict(by_latent=False, configs=dict(latents=dict(CHUNK=2, BLOCK=16), tokens=dict(CHUNK=4, BLOCK=16)))
cases = [  # B, d, M, of the gate and the SAE, of the step
    (1, 2, 1, {}, {}), (1, 5, 7, dict(parametrisation="log"), momentum), (17, 7, 20, dict(pre_encoder_bias=True), small), (16, 16, 32, dict(decoder_norm="free"), momentum),
    (13, 31, 33, dict(parametrisation="log", pre_encoder_bias=True), small | momentum), (20, 9, 12, dict(relative_bandwidth=.4), momentum), (12, 10, 17, dict(threshold=0.), small),
    (10, 20, 15, dict(bandwidth=2.), small), (5, 260, 12, dict(threshold=.05, bandwidth=.02), momentum), (9, 6, 10, dict(threshold=9.), momentum),
    (9, 6, 10, dict(threshold=9.), {}), (12, 33, 9, dict(decoder_norm="free", parametrisation="log"), small)]


@needs
@pytest.mark.parametrize("case", range(len(cases)))
def test_step_is_autograd_and_adam(case):
    B, d, M, kw, how = cases[case]
    betas, configs = how.get("betas", (0., .999)), how.get("configs")
    sae = make(d, M, case, how.get("by_latent", True), **kw)
    twin = copy.deepcopy(sae)
    moments, opt = S.Moments(sae, betas, 1e-3), optimizer(twin, .01, .02, betas, 1e-3)
    for t in range(2):
        u = normal(B, d, seed=10 + t) / d**.5
        u[::4] = 0                                                             # tokens without a single entry, unless biases make one
        target = normal(B, d, seed=20 + t) / d**.5 if case % 3 == 2 else None
        report = S.fused_step(sae, moments, u, .05, .01, .02, B * M, target=target, configs=configs)
        error, codes = dense_step(twin, opt, u, .05, target)
        same(report.error, error); same(report.l0, codes.l0)
        assert ((report.fires > 0) == codes.fired).all() and not report.overflow
    for (name, p), q in zip(sae.named_parameters(), twin.parameters()): torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert float(sae.gate.bandwidth) == pytest.approx(float(twin.gate.bandwidth), rel=1e-5)


@needs
def test_gradients_are_autograds():
    "Without Adam's division, which would hide or blow up small errors: one step with β = 0 and a huge ε moves by lr·∇/ε"
    B, d, M, kw = 25, 12, 30, dict(pre_encoder_bias=True, decoder_norm="free")
    sae = make(d, M, 4, **kw); twin = copy.deepcopy(sae)
    u, eps = normal(B, d, seed=1) / d**.5, 1e6
    report = S.fused_step(sae, S.Moments(sae, (0., .999), eps), u, .3, eps, eps, B * M)
    codes = codes_of(twin, u, "table")
    (reconstruction_loss(u, codes.u_hat) + .3 * l0_penalty(codes)).backward()
    for (name, p), q in zip(sae.named_parameters(), twin.parameters()):
        if name == "gate.param": same(p, (q - q.grad).clamp_min(0), 2e-5)
        else: same(p, q - q.grad, 2e-5)
    assert report.count > report.fires.sum() > 0                               # entries in the window, below threshold


@needs
def test_with_adams_usual_epsilon():
    "With ε = 1e-8 a gradient of 0 up to rounding moves a weight by lr, either way; the training is the same all the same"
    sae = make(8, 16, 6, threshold=.2, pre_encoder_bias=True); twin = copy.deepcopy(sae)
    moments, opt = S.Moments(sae), optimizer(twin, 2e-3, 5e-3, (0., .999), 1e-8)
    for t in range(6):
        u = normal(20, 8, seed=t) / 8**.5
        same(S.fused_step(sae, moments, u, .03, 2e-3, 5e-3, 320).error, dense_step(twin, opt, u, .03)[0], 1e-4)
    for p, q in zip(sae.parameters(), twin.parameters()): assert ((p - q).abs() < 1e-5).float().mean() > .99


@needs
def test_all_latents_fire():
    sae = make(6, 40, 1, threshold=0.); sae.b_enc.data.fill_(5.)
    twin, u = copy.deepcopy(sae), normal(9, 6) / 3
    report = S.fused_step(sae, S.Moments(sae, eps=1e-3), u, .1, .01, .01, 9 * 40)
    dense_step(twin, optimizer(twin, .01, .01, (0., .999), 1e-3), u, .1)
    assert report.l0 == 40 and int(report.count) == 360
    for p, q in zip(sae.parameters(), twin.parameters()): same(p, q)


@needs
@pytest.mark.parametrize("betas", [(0., .999), (.9, .99)])
def test_latents_that_never_fire(betas):
    sae = make(8, 30, 2); sae.gate.param.data[::2] = 50.
    was = copy.deepcopy(sae)
    S.fused_step(sae, S.Moments(sae, betas), normal(20, 8) / 3, .1, .01, .01, 600)
    assert torch.equal(sae.W_enc[:, ::2], was.W_enc[:, ::2]) and torch.equal(sae.gate.param[::2], was.gate.param[::2]) and torch.equal(sae.b_enc[::2], was.b_enc[::2])
    same(sae.W_dec[::2], was.W_dec[::2], 3e-7)


@needs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_overflowing_step_leaves_no_trace(dtype):
    "Nothing changes, and training goes on as if it had not been there"
    runs = []
    for disturbed in (False, True):
        sae = make(8, 16, 3, parametrisation="log", pre_encoder_bias=True)
        moments = S.Moments(sae, (.9, .99), dtype=dtype)
        for t in range(3):
            u = normal(12, 8, seed=t) / 3
            if disturbed:
                state = copy.deepcopy((dict(sae.named_parameters()), moments.first, moments.second, moments.low, moments.step))
                report = S.fused_step(sae, moments, u, .1, .01, .01, 3)
                assert report.overflow and report.error.isnan() and int(report.count) > 3
                for was, now in zip(state, (dict(sae.named_parameters()), moments.first, moments.second, moments.low)):
                    for k in was: assert torch.equal(was[k], now[k]), k
                assert int(moments.step) == t
            assert not S.fused_step(sae, moments, u, .1, .01, .01, 200).overflow
        runs.append(sae)
    for p, q in zip(*(r.parameters() for r in runs)): assert torch.equal(p, q)


@needs
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pre", [False, True])
def test_nan_is_the_references_nan(bad, pre):
    sae = make(5, 12, 1, pre_encoder_bias=pre); twin = copy.deepcopy(sae)
    u = normal(8, 5) / 2; u[3, 1] = bad
    report = S.fused_step(sae, S.Moments(sae, eps=1e-3), u, .1, .01, .01, 8 * 12)
    dense_step(twin, optimizer(twin, .01, .01, (0., .999), 1e-3), u, .1)
    assert not report.error.isfinite()
    for (name, p), q in zip(sae.named_parameters(), twin.parameters()):   # beside an infinite input, latents off the list escape the dense step's 0·∞
        assert torch.equal(p.isfinite(), q.isfinite()) if bad != bad else (p.isfinite() | ~q.isfinite()).all(), name


def are_copies(low, sae):
    for name in ("W_enc", "W_dec"):
        p = dict(sae.named_parameters())[name].detach()
        if device == "cuda": assert torch.equal(low[name], p.to(torch.bfloat16)), name
        else: assert ((low[name].float() - p).abs() <= p.abs() / 2**7).all(), name   # the interpreter (Triton 3.9) cuts off where a GPU rounds


@needs
def test_bfloat16_rounds_where_it_says():
    "What the products read is rounded, sums and weights are not"
    B, d, M, half = 25, 12, 30, torch.bfloat16
    sae = make(d, M, 4, decoder_norm="free", pre_encoder_bias=True); twin = copy.deepcopy(sae)
    u, eps = normal(B, d, seed=1) / d**.5, 1e6
    moments = S.Moments(sae, (0., .999), eps, dtype=half)
    S.fused_step(sae, moments, u, .3, eps, eps, B * M)
    with torch.no_grad():
        r = lambda t: t.to(half).float()
        x, theta, width = r(u - twin.b_dec), twin.gate.threshold, twin.gate.bandwidth
        z = x @ r(twin.W_enc) + twin.b_enc
        f = torch.where(z > theta, z, 0)
        e = f @ r(twin.W_dec) + twin.b_dec - u
        G = 2 / B * r(e) @ r(twin.W_dec).T * (z > theta - width / 2)
        gz, window = G * (z > theta), ((z - theta) / width).abs() < .5
        wanted = dict(W_enc=x.T @ gz, b_enc=gz.sum(0), W_dec=2 / B * f.T @ r(e), b_dec=2 / B * e.sum(0) - twin.W_enc @ gz.sum(0))
        wanted["gate.param"] = (-(theta * G + .3 / B) / width * window).sum(0)
        for (name, p), q in zip(sae.named_parameters(), twin.parameters()): same(p, (q - wanted[name]).clamp_min(0 if name == "gate.param" else -1e9), 3e-5)
    are_copies(moments.low, sae)


@needs
@pytest.mark.parametrize("block", [8, 16])
def test_bfloat16_copies_follow_the_norm(block):
    sae = make(12, 20, 4)
    moments = S.Moments(sae, dtype=torch.bfloat16)
    S.fused_step(sae, moments, normal(30, 12) / 3, .05, .05, .01, 600, configs=dict(latents=dict(CHUNK=4, BLOCK=block)))
    same(sae.W_dec.norm(dim=-1), torch.ones(20, device=device), 1e-6)
    are_copies(moments.low, sae)


@needs
def test_the_same_twice():
    "No sum depends on the order in which programs finish"
    runs = []
    for _ in range(2):
        sae = make(9, 20, 5); moments = S.Moments(sae)
        for t in range(2): S.fused_step(sae, moments, normal(16, 9, seed=t) / 3, torch.tensor(.1, device=device), .01, .01, 320)
        runs.append(sae)
    for p, q in zip(*(r.parameters() for r in runs)): assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------ what is refused, and where nothing is there
@needs
def test_errors():
    u, W, v = torch.zeros(4, 3, device=device), torch.zeros(3, 5, device=device), torch.zeros(5, device=device)
    for call, error, said in (
        (lambda: K.encode_compact(u, W.T, v, v, 9), ValueError, "W_enc has shape (5, 3), but should have (3, 3)"),
        (lambda: K.encode_compact(u.double(), W.double(), v, v, 9), TypeError, "u is torch.float64: the kernels take float32 and bfloat16"),
        (lambda: K.encode_compact(u.bfloat16(), W, v, v, 9), TypeError, "give both in one of float32 and bfloat16"),
        (lambda: K.encode_compact(u, W, v, v[:4], 9), ValueError, "low has shape (4,)"),
        (lambda: K.encode_compact(u, W, v, v, 0), ValueError, "A capacity of 0"),
        (lambda: K.sparse_decode(v[:2], v.int(), v.int(), W.T), ValueError, "values has shape (2,), but should have (5,)"),
        (lambda: K.sampled_products(u, W.T, v.int(), v[:3].int()), ValueError, "row_ptr has shape (3,), but should have (5,)")):
        with pytest.raises(error, match=re.escape(said)): call()
    sae = make(4, 6)
    moments = S.Moments(sae)
    sae.W_enc.data = sae.W_enc.data.contiguous()
    with pytest.raises(ValueError, match="lie as it did when `Moments` was made"): S.fused_step(sae, moments, torch.zeros(2, 4, device=device), .1, .01, .01, 12)


def test_refused_without_triton_too():
    with pytest.raises(ValueError, match="not torch.float16"): S.Moments(make(4, 6), dtype=torch.float16)
    free = make(4, 6, decoder_norm="free"); free.W_dec.data *= 3
    S.Moments(free)
    free.decoder_norm = "unit"
    with pytest.raises(ValueError, match="have norms from 3 to 3"): S.Moments(free)
    for sae in (SAE(4, 6, "relu").init_(), make(4, 6, kernel="gaussian"), make(4, 6, ste_to_input=True)):
        with pytest.raises(ValueError, match="train others with `update_`"): S.fused_step(sae, S.Moments(sae), torch.zeros(2, 4, device=device), .1, .01, .01, 12)


def test_bytes():
    for low in (False, True):
        bill = K.step_bytes(4096, 2304, 16_384, 70, low)
        assert set(bill) == {"memory", "cache"} and bill["memory"].keys() == bill["cache"].keys()
        assert bill["cache"]["latents"] == 2 * 4096 * 70 * 2304 * (2 if low else 4)
    with_m = K.step_bytes(4096, 2304, 16_384, 70, momentum=True)["memory"]["latents"] - K.step_bytes(4096, 2304, 16_384, 70)["memory"]["latents"]
    assert with_m == 2 * 8 * 2304 * 16_384
    assert K.step_bytes(64, 200, 512, 8)["memory"]["renorm"] == 0


def test_nobody_depends_on_it():
    for f in (root / "jumprelu_nb").rglob("*.py"):
        if f.name != "_modidx.py" and f.parts[-2:] not in {("sae", "kernels.py"), ("sae", "kernelstep.py")}: assert not re.search(r"^\s*(import|from)\b.*\b(triton|kernels|kernelstep)\b", f.read_text(encoding="utf-8"), re.M), f


def python(code, **env):
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


call = """
import json, torch
from jumprelu_nb.sae import kernels as K, kernelstep as S
u, v, said = torch.zeros(2, 3), torch.zeros(9), [K.available()]
lists = S.Lists(v.long(), v.int(), torch.zeros(5).int(), torch.arange(4).int())
for run in (lambda: K.encode_compact(u, torch.zeros(3, 4), v[:4], v[:4], 9), lambda: S.latent_gradients(u, u, v, v, lists)):
    try: run()
    except Exception as e: said += [type(e).__name__, str(e)]
print(json.dumps(said))
"""


def test_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton')")
    ok, error, said, *step = python(call, PYTHONPATH=str(tmp_path))
    assert step == [error, said] and not ok and error == "ImportError" and "pip install 'jumprelu_nb[gpu]'" in said


@needs
@pytest.mark.skipif(device != "cpu", reason="there is a GPU")
def test_on_a_cpu_without_the_interpreter():
    ok, error, said, *step = python(call)
    assert step == [error, said] and not ok and error == "RuntimeError" and "set TRITON_INTERPRET=1 before this module is imported" in said


@needs
@pytest.mark.skipif(K.triton is not None and [*map(int, K.triton.__version__.split(".")[:2])] < [3, 6], reason="older compilers take more registers")
def test_compiles_for_compute_capability_9():
    "The page's own script: every default builds for an H100 without a GPU at hand, without spilling registers"
    nb = json.loads((root / "nbs/sae/05b_kernelstep.ipynb").read_text(encoding="utf-8"))
    script, = re.findall(r"^script = '''\n(.*?)^'''", "\n".join("".join(c["source"]) for c in nb["cells"]), re.S | re.M)
    built = python(script.replace("\\\\", "\\"))
    assert built.keys() == {"encode", "decode", "products", "rows", "unit"}
    assert all(b["stack"] == 0 and b["shared"] <= 227 * 1024 for b in built.values()) and built["encode"]["registers"] <= 128
