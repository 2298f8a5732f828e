"What protects the fast step: compiled loops, exact screening and row-wise Adam give what plain torch gives, for every recipe, shape, thread and hostile input."
import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.sae import loops, screen
from jumprelu_nb.sae.adam import RowAdam, optimizer
from jumprelu_nb.sae.gates import JumpReLUGate, make_gate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.sparse import codes_of, decode_sparse, encode_sparse
from jumprelu_nb.train.recipes import RECIPES, get_recipe
from jumprelu_nb.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not loops.compiled(), reason="compiled loops need numba: pip install jumprelu_nb[fast]")


@pytest.fixture(autouse=True)
def as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    loops.compiled(True)


def rows(ends): return torch.from_numpy(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 20), st.floats(-1, 4), st.integers(1, 3), st.integers(0, 999))
def test_loops_are_matrix_products(B, M, d, limit, threads, seed):
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    z, x, W = torch.randn(B, M, generator=g), torch.randn(B, d, generator=g), torch.randn(M, d, generator=g)
    low = limit + .1*torch.randn(M, generator=g)
    at, value, ends = loops.compact(z, low, 1.)
    r, c = (z > low).nonzero().T
    assert at.tolist() == c.tolist() and rows(ends).tolist() == r.tolist() and torch.equal(torch.from_numpy(value), z[r, c])
    table, v = torch.where(z > low, z, 0), torch.from_numpy(value)
    striped = loops.product(x, W, low, 1.)
    full = x @ W.T
    r2, c2 = (full > low).nonzero().T
    if (full - low).abs().min() > 1e-5: assert striped[0].tolist() == c2.tolist() and rows(striped[2]).tolist() == r2.tolist()
    some = np.where(np.arange(len(at)) % 3 == 0, 0, value).astype(np.float32)               # entries without a value are left out
    torch.testing.assert_close(loops.decode(at, torch.from_numpy(some), ends, W), torch.zeros(B, M).index_put((r, c), torch.from_numpy(some)) @ W, atol=1e-4, rtol=1e-4)
    order, tokens, starts = loops.turn(at, ends, M, some)
    assert sorted(order.tolist()) == np.flatnonzero(some).tolist() and starts[-1] == np.count_nonzero(some) and tokens.tolist() == r[torch.from_numpy(order)].tolist()
    torch.testing.assert_close(loops.decode(at, v, ends, W), table @ W, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loops.products(loops.turn(at, ends, M), x, W), (x @ W.T)[r, c], atol=1e-4, rtol=1e-4)
    turned = loops.turn(at, ends, M)
    torch.testing.assert_close(loops.collect(turned, v, x), table.T @ x, atol=1e-4, rtol=1e-4)
    assert at[turned[0]].tolist() == sorted(at.tolist()) and turned[2][-1] == len(at)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 80), st.integers(1, 30), st.integers(1, 3), st.integers(0, 999))
def test_topk_is_torchs(B, M, k, threads, seed):
    torch.set_num_threads(threads)
    z = torch.randn(B, M, generator=torch.Generator().manual_seed(seed)).mul(4).round()/4         # with ties
    k = min(k, M)
    at, value, ends = loops.topk(z, k)
    best, r = z.topk(k).values, rows(ends)
    assert torch.equal(torch.bincount(r, minlength=B), (best > 0).sum(1)) and torch.equal(z[r, torch.from_numpy(at)], torch.from_numpy(value))
    for b in range(B):
        here = r.numpy() == b
        assert sorted(value[here].tolist(), reverse=True) == best[b][best[b] > 0].tolist() and at[here].tolist() == sorted(set(at[here].tolist()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 120), st.integers(1, 70), st.sampled_from([1e-25, 1e-6, 1., 1e6, 1e12]), st.sampled_from([0., 1., 30.]), st.integers(0, 6), st.integers(1, 3), st.integers(0, 999))
def test_screening_loses_nothing(B, M, d, size, mean, rank, threads, seed):
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    x, W, bias = size*(torch.randn(B, d, generator=g) + mean), torch.randn(M, d, generator=g), size*torch.randn(M, generator=g)
    s = loops.Stripes(B, M, 1.)
    s.firsts, s.stops = [0], s.stops[:1]
    assert s.look("_marked", 0, np.zeros((B, M), np.int16), values=False) and s.look("_rescore", 0, x.numpy(), W.numpy(), bias.numpy(), np.full(M, -np.inf, np.float32))
    z = torch.from_numpy(s.listed()[1]).view(B, M)
    low = z.topk(min(rank + 1, B), dim=0).values[-1]                                     # limits that are values
    if rank % 2: low = torch.nextafter(low, torch.tensor(-torch.inf))
    found = screen.screened(x, W, bias, low, 1.)
    r, c = (~(z <= low)).nonzero().T
    assert found[0].tolist() == c.tolist() and torch.equal(torch.from_numpy(found[1]), z[r, c]) and rows(found[2]).tolist() == r.tolist()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([512, 700, 4100]), st.sampled_from([200, 1000]), st.integers(1, 12), st.sampled_from([0., .3, 2.]), st.sampled_from([0., .5, -2.5]), st.sampled_from(["on", "off"]), st.integers(1, 2), st.integers(0, 99))
def test_guesses_change_nothing(B, M, k, spread, bias, mode, threads, seed):
    "TopK and BatchTopK listed above a guess are what they are on the whole table, whether the guess was good or not."
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 24, generator=g)*torch.exp(spread*torch.randn(B, 1, generator=g))
    x[5] = 0
    for name in ("topk", "batch_topk"):
        sae = SAE(24, M, make_gate(name, M, k=k)).init_(seed=seed)
        sae.b_enc.data.fill_(bias)
        if name == "batch_topk": sae.gate.running.fill_(float(torch.rand((), generator=g)*3))
        whole = copy.deepcopy(sae)
        listed = codes_of(sae, x, "list", screen=mode)
        z = whole.pre_acts(x).detach()
        f = whole.gate(whole.pre_acts(x)).detach()
        cut = z.topk(k + 1).values[:, -2:] if name == "topk" else z.flatten().topk(k*B + 1).values[-2:].expand(B, 2)
        clear = (cut[:, 0] - cut[:, 1] > 1e-5*cut[:, 0].abs()) | (cut[:, 0] <= 0)            # which of two equals passes is decided by their last bit
        torch.testing.assert_close(listed.table(listed.f).detach()[clear], f[clear], atol=1e-4, rtol=1e-4)
        assert clear.float().mean() > .9 or name == "batch_topk"
        ends = listed.layout.row_ends
        assert ends[-1] == len(listed.at) and (torch.diff(listed.layout.rows) >= 0).all()
        if name == "batch_topk": torch.testing.assert_close(sae.gate.running, whole.gate.running, atol=1e-4, rtol=1e-4)


def toy(n=4000, d=24):
    g = torch.Generator().manual_seed(5)
    truth = torch.nn.functional.normalize(torch.randn(60, d, generator=g), dim=-1)
    return ((torch.rand(n, 60, generator=g) < .05)*(.5 + torch.rand(n, 60, generator=g))) @ truth + .3


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("topk_2024", "anthropic_2025", "bricken_2023", "p_anneal_2024") and "transcoder" not in n])
def test_every_recipe_trains_alike_fast_and_slow(name):
    after = []
    for on, how in ((False, "off"), (True, "off"), (True, "on")):
        loops.compiled(on)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t = Trainer(Activations.from_tensor(toy()), get_recipe(name, batch_size=64, l0=4.), 96, 64*400, 1, screen=how)
        it = iter(t.loader)
        for _ in range(6): codes = t.step(next(it))
        after.append((dict(t.sae.named_parameters()), codes.l0.item()))
    for other, l0 in after[1:]:
        assert l0 == pytest.approx(after[0][1], rel=.02)
        for k, p in after[0][0].items(): torch.testing.assert_close(other[k], p, atol=2e-3, rtol=2e-3, msg=f"{name}: {k}")


def few_steps(sae, opt, steps, seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        u = torch.randn(16, sae.d_in, generator=g)
        opt.zero_grad()
        c = codes_of(sae, u, "list")
        (c.target - c.u_hat).square().sum(-1).mean().backward()
        sae.project_grad_(); opt.step(); sae.project_()


def made(rows, betas=(.9, .99), seed=0):
    sae = SAE(12, 40, JumpReLUGate(40, .3)).init_(seed)
    groups = [dict(params=[sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec], lr=1e-2)]
    return sae, RowAdam(sae, groups, betas=betas) if rows else torch.optim.Adam(groups, betas=betas)


@pytest.mark.parametrize("betas", [(.9, .99), (0., .999)])
@pytest.mark.parametrize("first, second", [(True, False), (False, True), (True, True)])
def test_one_optimizer_goes_on_from_the_others_state(betas, first, second):
    (a, opt_a), (b, opt_b) = made(False, betas), made(first, betas)
    few_steps(a, opt_a, 5, 1); few_steps(b, opt_b, 5, 1)
    state = copy.deepcopy(opt_b.state_dict())
    for s in state["state"].values(): s.pop("last", None) if not second else None
    c, opt_c = made(second, betas)
    c.load_state_dict(b.state_dict()); opt_c.load_state_dict(state)
    few_steps(a, opt_a, 5, 2); few_steps(c, opt_c, 5, 2)
    if betas[0] == 0 and first and not second: return                                   # lazily decayed moments are only whole for those who know when a row was visited
    for k, p in dict(a.named_parameters()).items(): torch.testing.assert_close(dict(c.named_parameters())[k], p, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("betas", [(.9, .99), (0., .9)])
def test_tables_and_lists_may_alternate(betas):
    "skipped rows are decayed once, whoever takes the next step"
    (a, opt_a), (b, opt_b) = made(False, betas), made(True, betas)
    for sae, opt in ((a, opt_a), (b, opt_b)):
        g = torch.Generator().manual_seed(3)
        for t in range(24):
            u = .3*torch.randn(2, sae.d_in, generator=g)                                 # few tokens: most rows are skipped
            opt.zero_grad()
            c = codes_of(sae, u, "table" if t % 6 in (3, 4) else "list")
            (c.target - c.u_hat).square().sum(-1).mean().backward()
            sae.project_grad_(); opt.step(); sae.project_()
    for k, p in dict(a.named_parameters()).items(): torch.testing.assert_close(dict(b.named_parameters())[k], p, atol=1e-5, rtol=1e-4)


def test_other_optimizers_get_ordinary_gradients():
    sae, opt = made(True)
    few_steps(sae, opt, 2, 0)
    assert sae.sink is None
    c = codes_of(sae, torch.randn(8, 12), "list")
    (c.target - c.u_hat).square().sum().backward()
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None and copy.deepcopy(sae).sink is None


def test_clipping_sees_whole_gradients():
    runs = {}
    for on in (False, True):
        loops.compiled(on)
        t = Trainer(Activations.from_tensor(toy()), get_recipe(l0=4., batch_size=64, grad_clip=.05), 96, 64*400, 1)
        it = iter(t.loader)
        for _ in range(5): t.step(next(it))
        runs[on] = t.sae.W_enc.detach()
    torch.testing.assert_close(runs[True], runs[False], atol=1e-3, rtol=1e-3)


def test_nan_is_seen():
    t = Trainer(Activations.from_tensor(toy()), get_recipe(l0=4., batch_size=64), 96, 64*400, 1)
    bad = toy()[:64].clone(); bad[3, 5] = torch.nan
    t.step(bad)
    assert not all(p.isfinite().all() for p in t.sae.parameters())


@pytest.mark.parametrize("how", ["off", "on"])
def test_sparse_encoding_is_encoding(how):
    sae = SAE(32, 200, JumpReLUGate(200, .8), scale=5., pre_encoder_bias=True).init_(0)
    x = 5*torch.randn(3, 40, 32)
    active, acts = encode_sparse(sae, x, how), sae.encode(x).flatten(0, 1).detach()
    torch.testing.assert_close(active.dense(), acts, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode_sparse(sae, active), sae(x).flatten(0, 1).detach(), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="right site"): encode_sparse(sae, x[..., :5])


def test_the_optimizer_is_chosen_by_what_is_there():
    sae = SAE(12, 40)
    groups = [dict(params=list(sae.parameters()), lr=.1)]
    assert isinstance(optimizer(sae, groups), RowAdam)
    loops.compiled(False)
    assert type(optimizer(sae, groups)) is torch.optim.Adam
