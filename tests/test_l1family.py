"Objectives priced by size, and what keeps them running: state, schedules, hostile input."
import copy
import io

import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.l1family import GatedL1, PAnneal, RIL1, Steered, TiedSAE, resample_
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import L1, Together, reconstruction_loss, update_
from jumprelu_nb.sae.sparse import codes_of

some = settings(max_examples=20, deadline=None)
data = lambda g, n=64, d=8: torch.randn(n, d, generator=g) / d**.5


def through_a_file(state):
    f = io.BytesIO(); torch.save(state, f); f.seek(0)
    return torch.load(f, weights_only=True)


@some
@given(st.integers(0, 999), st.sampled_from(["ri", "gated", "p"]), st.integers(0, 10), st.booleans())
def test_list_equals_table(seed, kind, done, free):
    def one(form):
        g = torch.Generator().manual_seed(seed)
        objective = dict(ri=RIL1, gated=GatedL1, p=PAnneal)[kind](.3)
        if kind == "p": objective.done = done
        sae = SAE(8, 30, "gated" if kind == "gated" else "relu", pre_encoder_bias=True, decoder_norm="free" if free and kind != "p" else "unit").init_(seed, enc_scale=.8)
        with torch.no_grad(): (sae.gate.b_gate if kind == "gated" else sae.b_enc).copy_(.3 * torch.randn(30, generator=g) - .2); sae.b_dec.copy_(data(g, 1)[0])
        loss = objective.penalty(sae, codes_of(sae, data(g), form), 1.); loss.backward()
        return loss.detach(), {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    (a, da), (b, db) = one("table"), one("list")
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert da.keys() == db.keys()
    for n in da: torch.testing.assert_close(da[n], db[n], atol=1e-4 * (1 + da[n].abs().max().item()), rtol=1e-3)


def train(objective, sae, opt, g, steps, of):
    for t in steps: update_(sae, objective, opt, codes_of(sae, data(g)), t / of)


@pytest.mark.parametrize("wrapped", [False, True])
def test_annealing_resumes_exactly(wrapped):
    def new(): o = PAnneal(.1, l0=3., warmup=.05); return Together(o) if wrapped else o
    def start():
        sae = SAE(8, 30, "relu").init_(0)
        return new(), sae, torch.optim.Adam(sae.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    whole = start(); train(whole[0], whole[1], whole[2], whole[3], range(60), 60)
    first = start(); train(first[0], first[1], first[2], first[3], range(31), 60)
    again = start()
    again[0].load_state_dict(through_a_file(first[0].state_dict())); again[1].load_state_dict(first[1].state_dict()); again[2].load_state_dict(first[2].state_dict())
    train(again[0], again[1], again[2], first[3], range(31, 60), 60)
    inner = (lambda o: o.parts[0]) if wrapped else (lambda o: o)
    assert inner(whole[0]).done == inner(again[0]).done == 10
    assert torch.equal(inner(whole[0]).coefficient, inner(again[0]).coefficient)
    for p, q in zip(whole[1].parameters(), again[1].parameters()): assert torch.equal(p, q)


def test_state_is_named():
    with pytest.raises(ValueError, match="no 'done', which PAnneal needs"): PAnneal(.1).load_state_dict(RIL1(.1).state_dict())


def test_coarse_steps_make_one_update_each():
    objective, sae = PAnneal(.1, updates=10), SAE(8, 30, "relu").init_(0)
    g = torch.Generator().manual_seed(0)
    for k in range(12):
        codes = codes_of(sae, data(g)); objective.adjust_grads_(sae, codes); objective.after_step_(sae, codes.l0, 1.)
        assert objective.done == min(k + 1, 10)
    assert objective.p() == pytest.approx(.2) and objective.coefficient.isfinite() and not len(objective.queue)


def test_queue_holds_the_last_batches():
    objective, sae, g = PAnneal(.1, batches=3), SAE(8, 30, "relu").init_(0), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(5):
        codes = codes_of(sae, data(g)); objective.adjust_grads_(sae, codes)
        seen.append([objective.power(codes, p).item() for p in (1., .92)])
    torch.testing.assert_close(objective.queue, torch.tensor(seen[-3:]))
    lam = objective.coefficient.item(); objective.after_step_(sae, torch.tensor(3.), .3)
    assert objective.coefficient.item() == pytest.approx(lam * sum(s[0] for s in seen[-3:]) / sum(s[1] for s in seen[-3:]), rel=1e-5)


def test_a_silent_sae_breaks_nothing():
    objective, sae = PAnneal(.1, l0=3., updates=1), SAE(8, 30, "relu").init_(0)
    with torch.no_grad(): sae.b_enc.fill_(-100.)
    for form in ("table", "list"):
        codes = codes_of(sae, data(torch.Generator().manual_seed(0)), form)
        loss = reconstruction_loss(codes.target, codes.u_hat) + objective.penalty(sae, codes, 1.); loss.backward()
        objective.adjust_grads_(sae, codes); objective.after_step_(sae, codes.l0, 1.)
        assert loss.isfinite() and 0 < objective.coefficient < 1 and all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


def test_annealing_by_hand():
    "(f + ε)^p over active latents only, entry by entry"
    objective, sae = PAnneal(.7, eps=.01), SAE(3, 3, "relu")
    sae.W_enc.data = torch.eye(3); objective.done = 5
    z = torch.tensor([[.5, -1., 0.], [2., .1, -.3]])
    want = .7 * sum((v + .01)**.6 for v in (.5, 2., .1)) / 2
    for form in ("table", "list"): assert objective.penalty(sae, codes_of(sae, z, form), 1.).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kw", [dict(p_end=0.), dict(p_end=1.5), dict(p_end=-.2), dict(updates=0), dict(start=.5, end=.4), dict(end=1.2)])
def test_impossible_schedules(kw):
    with pytest.raises(ValueError): PAnneal(.1, **kw)


def test_steering_by_hand():
    o = Steered(.5, l0=4., warmup=.1, gain=.1, damping=2.)
    o.after_step_(None, torch.tensor(40.), .05); assert o.coefficient.item() == .5       # before the end of the warm-up, only noted
    o.after_step_(None, torch.tensor(5.), .2)
    e = torch.tensor(5 / 4).log().item()
    assert o.coefficient.item() == pytest.approx(.5 * torch.tensor(.1 * e + 2 * (e - 1)).exp().item(), rel=1e-5)
    o.after_step_(None, torch.tensor(0.), .2); assert o.coefficient > 0


# ------------------------------------------------------------------------------------------------ tied
def test_tied_survives_everything(tmp_path):
    sae = TiedSAE(6, 20, scale=2.).init_(1)
    with torch.no_grad(): sae.b_enc.fill_(-.2)
    assert dict(sae.named_parameters()).keys() == {"b_enc", "W_dec", "b_dec"} and "W_enc" not in sae.state_dict()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    other = TiedSAE(6, 20).init_(2); other.load_state_dict(through_a_file(sae.state_dict()))
    for twin in (copy.deepcopy(sae), other): assert torch.equal(twin(x), sae(x)); assert twin.W_enc.data_ptr() == twin.W_dec.data_ptr() != sae.W_dec.data_ptr()
    again = SAE.load(sae.save(tmp_path))
    assert type(again) is SAE
    torch.testing.assert_close(again(x), sae(x).detach(), atol=1e-5, rtol=1e-5)
    assert sae.double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(sae).to(torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("gate", ["gated", "topk", "jumprelu"])
def test_tied_with_other_gates(gate):
    from jumprelu_nb.sae.gates import make_gate
    sae = TiedSAE(6, 20, make_gate(gate, 20, **({"k": 3} if gate == "topk" else {}))).init_(1)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.fold()(x), sae(x).detach(), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ resampling
def patient(gate="relu", optimizer=torch.optim.Adam, **kw):
    sae = SAE(8, 30, gate, pre_encoder_bias=True, **kw).init_(0)
    opt, g = optimizer(sae.parameters(), lr=.01), torch.Generator().manual_seed(0)
    for _ in range(3): update_(sae, L1(.1), opt, codes_of(sae, data(g)), 0.)
    silent = torch.zeros(30); silent[3:9] = 5000
    return sae, opt, data(g, 500), silent


def test_seeds_decide():
    out = []
    for seed in (0, 0, 1):
        sae, opt, u, silent = patient(); resample_(sae, opt, u, silent, 5000, seed); out.append(sae.W_dec.detach())
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True), lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True), torch.optim.SGD,
                                       lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=.9)])
def test_every_memory_is_reset(optimizer):
    sae, opt, u, silent = patient(optimizer=optimizer)
    with torch.no_grad():
        for s in opt.state.values():
            for v in s.values():
                if isinstance(v, torch.Tensor) and v.dim(): v.add_(1)
    dead = resample_(sae, opt, u, silent, 5000)
    assert dead.tolist() == list(range(3, 9))
    for p, dim in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
        for v in opt.state.get(p, {}).values():
            if isinstance(v, torch.Tensor) and v.shape == p.shape: assert (v.index_select(dim, dead) == 0).all() and (v != 0).any()
    for v in opt.state.get(sae.b_dec, {}).values():
        if isinstance(v, torch.Tensor) and v.dim(): assert (v != 0).all()


def test_all_dead_and_few_inputs():
    sae, opt, u, _ = patient()
    assert len(resample_(sae, opt, u[:4], torch.full((30,), 1e6), 1)) == 30
    assert all(p.isfinite().all() for p in sae.parameters())
    torch.testing.assert_close(sae.W_dec.norm(dim=-1).detach(), torch.ones(30))


def test_free_rows_get_a_usual_length():
    sae, opt, u, silent = patient(decoder_norm="free")
    with torch.no_grad(): sae.W_dec.mul_(.1)
    resample_(sae, opt, u, silent, 5000)
    torch.testing.assert_close(sae.W_dec[3:9].norm(dim=-1).detach(), torch.cat([sae.W_dec[:3], sae.W_dec[9:]]).norm(dim=-1).mean().detach().expand(6))


def test_residuals_and_targets():
    sae, opt, u, silent = patient(); before = copy.deepcopy(sae)
    with torch.no_grad(): residual = torch.nn.functional.normalize(u - before(u), dim=-1)
    resample_(sae, opt, u, silent, 5000, toward="residual")
    assert ((sae.W_dec[3:9].detach() @ residual.T).amax(1) > .9999).all()
    sae, opt, u, silent = patient(); y = u.roll(1, -1)
    resample_(sae, opt, u, silent, 5000, target=y)
    with torch.no_grad():
        writes, hears = torch.nn.functional.normalize(y - before.b_dec, dim=-1), torch.nn.functional.normalize(u - before.b_dec, dim=-1)
        a, b = (sae.W_dec[3:9] @ writes.T).max(1), (torch.nn.functional.normalize(sae.W_enc[:, 3:9], dim=0).T @ hears.T).max(1)
    assert (a.values > .9999).all() and (b.values > .9999).all() and torch.equal(a.indices, b.indices)        # the same token for both


@pytest.mark.parametrize("u", [torch.full((10, 8), float("nan")), torch.zeros(0, 8)])
def test_nothing_to_draw_from(u):
    sae, opt, _, silent = patient()
    with pytest.raises(ValueError, match="No input has a finite loss"): resample_(sae, opt, u, silent, 5000)
