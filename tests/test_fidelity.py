"evaluate/fidelity on several architectures, against computations that share no code with it."
from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from jumprelu_nb.data.activations import keep_mask
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.evaluate.fidelity import Evaluation, FidelityStats, Readout, compare, evaluate, fidelity, sample_activations
from jumprelu_nb.evaluate.metrics import random_control
from jumprelu_nb.sae.gates import JumpReLUGate, ReLUGate
from jumprelu_nb.sae.model import SAE

llama = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=40)
models = {"llama": llama, "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=40), "gpt_neox": dict(llama, num_key_value_heads=4),
          "gemma2": dict(llama, head_dim=8, final_logit_softcapping=2.), "cohere": dict(llama, logit_scale=.3), "granite": dict(llama, logits_scaling=3.),
          "phi": dict(llama, num_key_value_heads=4), "opt": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=40, word_embed_proj_dim=32)}


class Tokenizer: bos_token_id, eos_token_id, pad_token_id = 0, 1, None


def make(kind, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=None, **models[kind], **kw))
        for p in m.parameters(): torch.nn.init.normal_(p, std=.3)
    return LanguageModel(m, Tokenizer(), kind)


tokens = torch.randint(2, 64, (5, 12), generator=torch.Generator().manual_seed(1))
tokens[:, 0] = 0; tokens[1, 7] = 1


def identity(d=32, site="resid_post.0"):
    sae = SAE(d, 2*d, ReLUGate(2*d), metadata=dict(site=site))
    with torch.no_grad(): sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)])); sae.W_enc.copy_(sae.W_dec.T)
    return sae


def some_sae(): return SAE(32, 128, JumpReLUGate(128, .5), metadata=dict(site="resid_post.0")).init_(0)


@pytest.mark.parametrize("kind", models)
def test_readout_is_the_model(kind):
    lm = make(kind)
    r = Readout(lm)
    assert r.head is not None, "this architecture should not need the fallback"
    assert torch.allclose(r.logits(r.hidden(tokens)), lm.model(tokens).logits, atol=1e-4)


def test_fallback_for_an_unknown_ending():
    lm = make("llama")
    class Squared(torch.nn.Module):
        def __init__(self, m): super().__init__(); self.m, self.config = m, m.config
        def get_output_embeddings(self): return self.m.get_output_embeddings()
        def forward(self, input_ids, use_cache=False): out = self.m(input_ids=input_ids, use_cache=use_cache); out.logits = out.logits**2; return out
    lm.model = Squared(lm.model)
    r = Readout(lm)
    assert r.head is None and torch.allclose(r.logits(r.hidden(tokens)), lm.model(tokens).logits)


@pytest.mark.parametrize("kind", models)
def test_identity_and_ablations(kind):
    lm = make(kind)
    m = fidelity(lm, identity(), tokens)
    assert m["delta_ce"] == pytest.approx(0, abs=1e-4) and m["kl"] == pytest.approx(0, abs=1e-4)
    assert m["loss_recovered_zero"] == pytest.approx(1, abs=1e-3) and m["loss_recovered_mean"] == pytest.approx(1, abs=1e-3)
    zero = SAE(32, 4, metadata=dict(site="resid_post.0"))
    m = fidelity(lm, zero, tokens)
    assert m["ce_sae"] == m["ce_zero"] and m["loss_recovered_zero"] == 0


def by_hand(lm, fn):
    "CE and KL with plain hooks: no keep_mask, no chunks, no Readout."
    special, keep = (tokens == 0) | (tokens == 1), torch.ones_like(tokens, dtype=torch.bool)
    keep[special] = False; keep[:, 0] = False
    def run(f):
        block = lm.model.get_submodule(lm.site("resid_post.0").module)
        def hook(m, a, out):
            x = out if isinstance(out, torch.Tensor) else out[0]
            y = torch.where(keep[..., None], f(x), x)
            return y if isinstance(out, torch.Tensor) else (y, *out[1:])
        h = block.register_forward_hook(hook)
        try: return lm.model(tokens).logits.detach().log_softmax(-1)
        finally: h.remove()
    clean, other = run(lambda x: x), run(fn)
    m = keep[:, :-1]
    ce = F.nll_loss(other[:, :-1][m], tokens[:, 1:][m])
    return ce.item(), (clean.exp()*(clean - other)).sum(-1)[:, :-1][m].mean().item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_against_plain_hooks(kind):
    lm, sae = make(kind), some_sae()
    m = fidelity(lm, sae, tokens, batch_tokens=24)
    with torch.no_grad():
        mean = lm.capture(tokens, "resid_post.0")["resid_post.0"][keep_mask(lm, tokens)].mean(0)
        for ce, kl, fn in [("ce_sae", "kl", sae), ("ce_zero", "kl_zero", torch.zeros_like), ("ce_mean", "kl_mean", lambda x: mean.expand_as(x)), ("ce_clean", None, lambda x: x)]:
            a, b = by_hand(lm, fn)
            assert m[ce] == pytest.approx(a, abs=1e-4)
            if kl: assert m[kl] == pytest.approx(b, abs=1e-4)


def test_batches_and_chunks_do_not_show():
    lm, sae = make("llama"), some_sae()
    one, many = fidelity(lm, sae, tokens), fidelity(lm, sae, tokens, batch_tokens=12)
    for k in one: assert one[k] == pytest.approx(many[k], abs=1e-5), k
    readout, site = Readout(lm), lm.site("resid_post.0")
    a, b = compare(readout, site, tokens, {"sae": sae}), compare(readout, site, tokens, {"sae": sae}, chunk=1)
    assert all(torch.allclose(u, v, atol=1e-5) for u, v in zip(a, b))


def test_hooks_are_gone_afterwards():
    lm = make("llama")
    before = lm.model(tokens).logits
    fidelity(lm, some_sae(), tokens)
    assert torch.equal(before, lm.model(tokens).logits)


def test_stats_add_up():
    lm, sae = make("llama"), some_sae()
    readout, site = Readout(lm), lm.site("resid_post.0")
    parts = []
    for part in (tokens[:2], tokens[2:], tokens):
        s = FidelityStats(("sae", "zero"), 12)
        s.update(*compare(readout, site, part, {"sae": sae, "zero": torch.zeros_like}))
        parts.append(s)
    for k, v in parts[2].result().items(): assert (parts[0] + parts[1]).result()[k] == pytest.approx(v, abs=1e-5)
    with pytest.raises(ValueError, match="different variants"): parts[0] + FidelityStats(("sae",), 12)
    with pytest.raises(ValueError, match="special tokens"): FidelityStats(("sae",), 12).result()


def test_sample_leaves_out_special_positions():
    lm = make("llama")
    got = sample_activations(lm, lm.site("resid_post.0"), tokens)
    assert len(got) == int(keep_mask(lm, tokens).sum()) == 5*11 - 1
    assert len(sample_activations(lm, lm.site("resid_post.0"), tokens, n=13)) <= 2*11


def test_control_goes_through_the_same():
    lm, sae = make("llama"), some_sae()
    c = random_control(sae, sample_activations(lm, lm.site("resid_post.0"), tokens))
    m = fidelity(lm, sae, tokens, control=c)
    assert m["ce_control"] == pytest.approx(fidelity(lm, c, tokens)["ce_sae"], abs=1e-5)
    assert math.isfinite(m["control_loss_recovered_mean"])


@pytest.fixture(scope="module")
def embedded(): return LanguageModel.load("embedded")


def test_evaluate_end_to_end(embedded):
    sae = SAE(128, 256, JumpReLUGate(256, 3.), metadata=dict(site="resid_post.1", model_name="embedded", context_size=64)).init_(0)
    text = ["def f(x):\n    return x + 1\n"*400]
    e = evaluate(sae, embedded, text=text, split=None, tokens=1000)
    d = json.loads(json.dumps(e.to_dict()))
    assert {"l0", "fvu", "explained_variance", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "loss_recovered_zero", "loss_recovered_mean", "kl", "dead_fraction", "dense_fraction",
            "shrinkage", "tokens", "d_in", "d_sae", "cosine", "delta_ce", "control_fvu"} <= d.keys()
    assert d["tokens"] <= 1000 and len(e.by_position()["sae"]) == 64 and e.frequency.shape == (256,)
    assert e.l0 == d["l0"] == pytest.approx(d["control_l0"], rel=.1)
    lines = str(e).splitlines()
    assert len({len(line) for line in lines if "CE, nats" in line or "random   clean" in line}) == 1, "columns are not aligned"
    assert "<table>" in e._repr_html_() and "resid_post.1" in e._repr_html_()
    same = evaluate(sae, text=text, split=None, tokens=1000)                      # the model by its name in the metadata
    assert same.to_dict() == e.to_dict()
    bare = evaluate(sae, embedded, text=text, split=None, tokens=1000, control=False).to_dict()
    assert not any("control" in k for k in bare) and bare["ce_sae"] == pytest.approx(d["ce_sae"], abs=1e-6)


def test_evaluate_plain():
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    for source in (x, x.numpy(), [x[:200], x[200:]]):
        e = evaluate(some_sae(), x=source)
        assert e.tokens == 500 and "ce_sae" not in e.to_dict() and "random" in str(e)
    assert evaluate(identity(), x=x, control=False).fvu == 0


def test_html_is_escaped():
    assert "<script>" not in Evaluation(dict(l0=1., fvu=.5), "<script>", torch.zeros(1))._repr_html_()


def test_errors(embedded):
    sae = SAE(128, 256, metadata=dict(site="resid_post.1"))
    with pytest.raises(ValueError, match="another site or model"): evaluate(SAE(64, 256, metadata=dict(site="resid_post.1")), embedded)
    with pytest.raises(ValueError, match="names no site"): evaluate(SAE(128, 256), embedded)
    with pytest.raises(ValueError, match="no site"): evaluate(sae, embedded, site="resid_post.9")
    with pytest.raises(ValueError, match="names no language model"): evaluate(sae)
    with pytest.raises(ValueError, match="not both"): evaluate(sae, embedded, x=torch.zeros(3, 128))
    with pytest.raises(ValueError, match="tokens=1 "): evaluate(sae, embedded, tokens=1)
    with pytest.raises(ValueError, match="more text"): evaluate(sae, embedded, text=["x"], split=None)
    with pytest.raises(ValueError, match="have 7"): evaluate(sae, x=torch.zeros(3, 7))
    with pytest.raises(ValueError, match="no activations"): evaluate(sae, x=[])
    with pytest.raises(ValueError, match="NaN"): evaluate(sae, x=torch.full((9, 128), float("nan")), control=False)
