"Steering on models and SAEs of other kinds than the page's: no BOS, half precision, training forms, batch-dependent gates, cached generation."
import pytest, torch
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.interpret.steering import Edit, change_of, controls, inference_form, steer, steered_texts, strength_curve
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.transcoder import Transcoder
from test_lm import every, make_lm


@pytest.fixture(scope="module")
def lm(): return LanguageModel.load("embedded", device="cpu", context_size=32)


def sae_for(lm, **more):
    torch.manual_seed(0)
    sae = SAE(lm.d_model, 64, metadata=dict(site="resid_post.1"), **more).init_(seed=0)
    sae.gate.set_threshold_(torch.full((64,), .05))
    return sae


@pytest.fixture(scope="module")
def ids(lm): return torch.cat([torch.full((3, 1), lm.bos_id), torch.randint(5, 500, (3, 11), generator=torch.Generator().manual_seed(0))], 1)


def at_site(lm, ids): return lm.capture(ids, "resid_post.1")["resid_post.1"]


def test_training_form_means_the_same(lm, ids):
    "An SAE with an input scale, a pre-encoder bias and free decoder rows steers as its folded form does"
    sae = sae_for(lm, scale=3., pre_encoder_bias=True, decoder_norm="free")
    with torch.no_grad(): sae.W_dec.mul_(torch.rand(64, 1) + .5); sae.b_dec.normal_(0, .1)
    for mode, v in (("clamp", 2.), ("scale", 2.), ("ablate", None)):
        with steer(lm, sae, 5, v, mode): a = at_site(lm, ids)
        with steer(lm, sae.fold(), 5, v, mode): b = at_site(lm, ids)
        torch.testing.assert_close(a, b)


def test_whole_reconstruction_by_steering(lm, ids):
    "Every latent clamped to its own value: nothing; every latent ablated: the error and the bias remain"
    sae = inference_form(sae_for(lm))
    with steer(lm, sae, range(64), lambda f: f): a = lm.logits(ids)
    assert torch.equal(a, lm.logits(ids))
    x = at_site(lm, ids)
    with steer(lm, sae, range(64), mode="ablate"): y = at_site(lm, ids)
    want = x - sae.decode(sae.encode(x)) + sae.b_dec
    torch.testing.assert_close(y[:, 1:], want[:, 1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(y[:, 0], x[:, 0])                                                       # BOS


def test_cached_generation_is_generation_without_a_cache(lm):
    sae = sae_for(lm)
    with steer(lm, sae, 3, 9.):
        ids = lm.prompt("def f(")[0].tolist()
        for _ in range(12): ids.append(int(lm.logits(torch.tensor([ids]))[0, -1].argmax()))
        assert lm.generate("def f(", 12, 0) == "def f(" + lm.tokenizer.decode(ids)[len(lm.tokenizer.decode(lm.prompt("def f(")[0].tolist())):]


def test_without_bos_the_first_token_is_spared(lm, ids):
    other = LanguageModel(lm.model, lm.tokenizer, "embedded", 32)
    other.bos_id, other.special_ids = None, torch.tensor([], dtype=torch.long)
    sae, x = sae_for(lm), at_site(lm, ids)
    with steer(other, sae, 3, 9.): y = at_site(other, ids)
    assert torch.equal(y[:, 0], x[:, 0]) and not torch.equal(y[:, 1], x[:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype, ids):
    lm = LanguageModel.load("embedded", device="cpu", dtype=dtype, context_size=32)
    sae, x = sae_for(lm), at_site(lm, ids)
    with steer(lm, sae, 3, 1., "scale"): assert torch.equal(at_site(lm, ids), x)
    with steer(lm, sae, 3, 5., "add"): y = at_site(lm, ids)
    assert y.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(y[:, 1:], (x.to(wide) + 5 * inference_form(sae).W_dec[3].to(wide)).to(dtype)[:, 1:], atol=0 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_strengths_repeat_the_batch_in_order(lm, ids):
    sae = sae_for(lm)
    with steer(lm, sae, 3, [0., 5., 9.]): many = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.unflatten(0, (3, -1))
    for s, v in enumerate((0., 5., 9.)):
        with steer(lm, sae, 3, v): torch.testing.assert_close(many[s], lm.model(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def test_two_saes_at_once(lm, ids):
    a, b = sae_for(lm), sae_for(lm)
    b.metadata["site"] = "resid_post.2"
    with steer(lm, [Edit(a, 3, [0., 5.]), Edit(b, 4, 7.)]): both = lm.logits(ids).unflatten(0, (2, -1))
    with steer(lm, a, 3, 5.), steer(lm, b, 4, 7.): torch.testing.assert_close(both[1], lm.logits(ids), atol=1e-3, rtol=1e-3)


def test_curve_in_parts_is_the_curve(lm, ids):
    sae = sae_for(lm)
    one, two = (strength_curve(lm, Edit(sae, 3, [0., 9.]), ids, batch_tokens=n) for n in (24, 10_000))
    torch.testing.assert_close(torch.tensor([one.kl, one.ce]), torch.tensor([two.kl, two.ce]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.shift, two.shift, atol=1e-4, rtol=1e-3)


def test_texts(lm):
    sae = sae_for(lm)
    a, b, c = steered_texts(lm, Edit(sae, 3, [0., 9.]), "def f(", 6, 0)
    with steer(lm, sae, 3, 9.): assert c == lm.generate("def f(", 6, 0)
    assert a == lm.generate("def f(", 6, 0) and b.startswith("def f(")


def test_controls_are_matched():
    sae = SAE(16, 100).init_(seed=0)
    w = torch.linspace(-8, -1, 100).exp()
    for s in range(8):
        c = controls(sae, 50, w, s)
        assert all(abs(float(d.norm()) - 1) < 1e-5 for d in c.values())
        j = int((sae.W_dec @ c["random latent"]).argmax())
        assert j != 50 and abs(j - 50) <= 9
    assert not torch.equal(controls(sae, 50, w, 0)["random direction"], controls(sae, 50, w, 1)["random direction"])
    with pytest.raises(ValueError, match="single latent"): controls(SAE(4, 1).init_(), 0)


def test_refusals(lm):
    sae = sae_for(lm)
    for bad in (None, "a", [], [[]], [[1., 2.]], [float("nan")], 1e300, {}):
        with pytest.raises(ValueError): Edit(sae, 3, bad)
    for bad in (-1, 64, [3, 64]):
        with pytest.raises(IndexError, match="0 to 63"): Edit(sae, bad, 1.)
    for bad in ([1., 2., 3.], [[1.]]):
        with pytest.raises(ValueError, match="one per latent"): Edit(sae, [1, 2], bad)
    with pytest.raises(ValueError, match="transcoder"): Edit(Transcoder(4, 8), 1, 1.)
    with pytest.raises(ValueError, match="Which latent"), steer(lm, sae): pass
    with pytest.raises(ValueError, match="128 at|of 4 numbers"), steer(lm, sae, 1, 1., direction=torch.zeros(4)): pass
    with pytest.raises(ValueError, match="not finite"), steer(lm, sae, 1, lambda f: f / 0): lm.logits("a b c")
    with pytest.raises(ValueError, match="not a function"): strength_curve(lm, Edit(sae, 1, lambda f: f), "a b")
    batch = SAE(lm.d_model, 64, dict(name="batch_topk", k=4), metadata=dict(site="resid_post.1"))
    with pytest.raises(ValueError, match="calibrate"), steer(lm, batch, 1, 1.): pass
    assert change_of(Edit(inference_form(sae), 1, 1., "scale"), inference_form(sae), torch.randn(1, 2, lm.d_model)).abs().max() == 0


@pytest.mark.parametrize("name", list(every))
def test_every_architecture(name):
    "At each kind of site: a factor of one is no change at all, a clamp moves what it should, strengths are a batch in order"
    lm = make_lm(name)
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0)); ids[:, 0] = lm.bos_id
    for site in lm.sites("*.1"):
        sae = SAE(site.d_in, 12, metadata=dict(site=site.name)).init_(seed=0).requires_grad_(False)
        clean = lm.logits(ids)
        with steer(lm, sae, [3, 5], 1., "scale"): assert torch.equal(lm.logits(ids), clean)
        x = lm.capture(ids, site)[site.name]
        with steer(lm, sae, 3, 4.): y = lm.capture(ids, site)[site.name]
        want = (4 - sae.encode(x)[..., 3, None]) * sae.W_dec[3]
        torch.testing.assert_close((y - x)[:, 1:], want[:, 1:], atol=1e-4, rtol=1e-4)
        assert torch.equal(y[:, 0], x[:, 0])
        with steer(lm, sae, 3, [0., 4.]): many = lm.logits(ids).unflatten(0, (2, -1))
        with steer(lm, sae, 3, 4.): torch.testing.assert_close(many[1], lm.logits(ids), atol=2e-3, rtol=2e-3)
