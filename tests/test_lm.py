"data/lm on every family of architecture it promises, from tiny random models made here, without a network."
from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from jumprelu_nb.data.lm import LanguageModel, find_blocks, kinds, reconstruct_at

# model type -> (config fields, how the block adds up); all: width 32, 3 layers, 64 tokens
llama = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=40)
gemma = dict(llama, head_dim=16, sliding_window=6)
gpt2 = dict(n_embd=32, n_layer=3, n_head=4, n_positions=40)
neox = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40)
promised = {
    "gpt2": ("gpt2", gpt2, "sequential"),
    "gpt_neox": ("gpt_neox", neox, "parallel"),
    "gpt_neox sequential": ("gpt_neox", dict(neox, use_parallel_residual=False), "sequential"),
    "llama": ("llama", llama, "sequential"),
    "mistral": ("mistral", dict(llama, sliding_window=6), "sequential"),
    "qwen2": ("qwen2", llama, "sequential"),
    "qwen3": ("qwen3", dict(llama, head_dim=16), "sequential"),
    "gemma2": ("gemma2", gemma, "post-norm"),
    "gemma3_text": ("gemma3_text", gemma, "post-norm"),
    "phi": ("phi", dict(llama, num_key_value_heads=4), "parallel"),
    "opt": ("opt", dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, max_position_embeddings=40, word_embed_proj_dim=32), "sequential"),
    "olmo": ("olmo", llama, "sequential"),
    "olmo2": ("olmo2", llama, "post-norm"),
}
beyond = { # not promised, but the same code serves them; most return tuples from their blocks
    "gpt_neo": ("gpt_neo", dict(hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=40, attention_types=[[["global"], 3]]), "sequential"),
    "gptj": ("gptj", dict(gpt2, rotary_dim=4), "parallel"),
    "bloom": ("bloom", dict(hidden_size=32, n_layer=3, n_head=4), "sequential"),
    "falcon": ("falcon", dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4), "parallel"),
    "mixtral": ("mixtral", dict(llama, num_local_experts=4), "sequential"),
    "phi3": ("phi3", llama, "sequential"),
    "opt post-norm": ("opt", dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, max_position_embeddings=40,
                                  word_embed_proj_dim=16, do_layer_norm_before=False), "unsaid"),
}
every = {**promised, **beyond}


def make_tokenizer(bos=True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(["the quick brown fox jumps over the lazy dog\n"]*9, trainers.BpeTrainer(vocab_size=64, special_tokens=["<s>", "</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", **(dict(bos_token="<s>") if bos else {}))


def make_model(model_type, fields, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=None, **fields), dtype=dtype)
        for p in model.parameters(): nn.init.normal_(p, std=.2) # larger than usual, norms included: nothing cancels by chance
    return model


def make_lm(name="llama", bos=True, dtype=torch.float32):
    return LanguageModel(make_model(*every[name][:2], dtype=dtype), make_tokenizer(bos), name)


@pytest.fixture(scope="module", params=every)
def arch(request): return make_lm(request.param), every[request.param][2]

tokens = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(1))
tokens[:, 0] = 0; tokens[1, 7] = 1 # BOS first, an EOS in the middle


class Linear(nn.Module):
    "Something SAE-shaped: an affine map of raw activations."
    def __init__(self, d_in, scale=0.):
        super().__init__()
        self.d_in, self.metadata, self.W = d_in, {"site": "resid_post.1"}, nn.Parameter(scale*torch.eye(d_in))
    def forward(self, x): return x @ self.W


def module_io(lm, module, side):
    "What went in or came out of a module in a full, unstopped forward pass."
    got = []
    hook = lambda m, args, out: got.append(args[0] if side == "in" else out[0] if isinstance(out, tuple) else out)
    h = lm.model.get_submodule(module).register_forward_hook(hook)
    with torch.no_grad(): lm.model(tokens)
    h.remove()
    return got[0].reshape(*tokens.shape, -1)

def hooks_left(lm): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in lm.model.modules())


def test_all_sites_exist_with_their_widths(arch):
    lm, _ = arch
    assert [s.name for s in lm.sites("*")] == [f"{k}.{i}" for i in range(3) for k in kinds]
    for name, x in lm.capture(tokens, "*").items(): assert x.shape == (2, 12, lm.site(name).d_in), name
    c = lm.model.config
    assert lm.site("attn_out.0").d_in == c.num_attention_heads*(getattr(c, "head_dim", None) or 32//c.num_attention_heads)


def test_resid_post_is_the_next_blocks_input(arch):
    lm, _ = arch
    x, blocks = lm.capture(tokens, "resid_*.*"), find_blocks(lm.model)
    for i in range(3):
        torch.testing.assert_close(x[f"resid_pre.{i}"], module_io(lm, f"{blocks}.{i}", "in"), rtol=0, atol=0)
        if i < 2: torch.testing.assert_close(x[f"resid_post.{i}"], x[f"resid_pre.{i+1}"], rtol=0, atol=0)
    parent = lm.model.get_submodule(blocks.rpartition(".")[0])
    final = [n for n, m in parent.named_children() if n in ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "project_out") and m is not None]
    torch.testing.assert_close(x["resid_post.2"], module_io(lm, blocks.rpartition(".")[0]+"."+final[0], "in"), rtol=0, atol=0)
    with torch.no_grad(): hidden = lm.model(tokens, output_hidden_states=True).hidden_states # still right after a stopped pass
    for i in range(3):
        if lm.name != "opt post-norm" or i: torch.testing.assert_close(hidden[i], x[f"resid_pre.{i}"], rtol=0, atol=0)


def test_the_block_adds_up(arch):
    lm, how = arch
    if how == "unsaid": pytest.skip("the block ends in a norm")
    x, block = lm.capture(tokens, "*.1"), lm.model.get_submodule(find_blocks(lm.model))[1]
    pre, z, mlp_in, mlp_out, post = (x[f"{k}.1"] for k in kinds)
    attn = lm.model.get_submodule(lm.site("attn_out.1").module)(z)
    if how == "post-norm":
        attn = block.post_attention_layernorm(attn)
        torch.testing.assert_close(mlp_out, block.post_feedforward_layernorm(block.mlp(mlp_in))) # Gemma Scope's mlp_out
        assert not torch.allclose(mlp_out, block.mlp(mlp_in), atol=1e-2)
    torch.testing.assert_close(post, pre+attn+mlp_out, rtol=1e-5, atol=1e-5)
    norm = next(getattr(block, n) for n in ("pre_feedforward_layernorm", "ln_2", "final_layer_norm", "post_attention_layernorm", "input_layernorm", "ln_1") if hasattr(block, n))
    source = {"sequential": pre+attn, "parallel": pre, "post-norm": pre+attn}[how]
    torch.testing.assert_close(mlp_in, source if lm.name == "olmo2" else norm(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site,begun", [("resid_pre.1", 2), ("attn_out.1", 2), ("mlp_in.1", 2), ("mlp_out.1", 2), ("resid_post.1", 2), ("resid_post.0", 1), ("resid_post.2", 3)])
def test_capture_stops(arch, site, begun):
    lm, _ = arch
    calls, handles = {}, []
    for i, b in enumerate(lm.model.get_submodule(find_blocks(lm.model))): handles.append(b.register_forward_pre_hook(lambda m, a, i=i: calls.__setitem__(i, calls.get(i, 0)+1)))
    head = lm.model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda m, a: calls.__setitem__("head", 1)))
    before = hooks_left(lm)
    lm.capture(tokens, ["resid_pre.0", site])
    assert calls == {i: 1 for i in range(begun)} and hooks_left(lm) == before
    for h in handles: h.remove()


def test_identity_changes_nothing_and_zero_does(arch):
    lm, _ = arch
    before = hooks_left(lm) # transformers leaves some of its own once hidden states were asked for
    with torch.no_grad():
        clean = lm.logits(tokens)
        for s in lm.sites("*"):
            with lm.splice(lambda x: x, s): torch.testing.assert_close(lm.logits(tokens), clean, rtol=0, atol=0)
            with lm.splice(lambda x: 0*x, s, keep_error=True): torch.testing.assert_close(lm.logits(tokens), clean, rtol=0, atol=0)
            with lm.splice(lambda x: 0*x, s):
                assert not torch.allclose(lm.logits(tokens), clean, atol=1e-3), s
        torch.testing.assert_close(lm.logits(tokens), clean, rtol=0, atol=0)
    assert hooks_left(lm) == before


def test_special_tokens_stay(arch):
    lm, _ = arch
    special = torch.isin(tokens, lm.special_ids)
    assert special.sum() == 3
    for s in lm.sites("*.1"):
        clean = lm.capture(tokens, s)[s.name]
        with lm.splice(lambda x: 0*x, s): x = lm.capture(tokens, s)[s.name] # capture sees what the model goes on with
        assert (x[~special] == 0).all() and torch.equal(x[special], clean[special]), s


def test_gradients_reach_the_sae_and_only_it(arch):
    lm, _ = arch
    for s in lm.sites(["resid_post.1", "mlp_in.1", "attn_out.2"]):
        sae = Linear(s.d_in, .9)
        with lm.splice(sae, s, keep_error=True): lm.loss(tokens).mean().backward()
        assert sae.W.grad.abs().max() > 0 and all(p.grad is None for p in lm.model.parameters())


def test_cached_generation_is_right_too(arch):
    lm, _ = arch
    prompt, sae = tokens[1:], Linear(32, .5) # holds BOS and EOS
    stop = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
    with torch.no_grad(), lm.splice(sae):
        plain = lm.model.generate(prompt, use_cache=False, **stop)
        torch.testing.assert_close(lm.model.generate(prompt, use_cache=True, **stop), plain)
        torch.testing.assert_close(lm.logits(plain)[:, 11:-1].argmax(-1)[lm.logits(plain)[:, 11:-1].argmax(-1) != 1], plain[:, 12:][lm.logits(plain)[:, 11:-1].argmax(-1) != 1])


def test_loss_is_the_cross_entropy():
    lm = make_lm()
    torch.testing.assert_close(lm.loss(tokens).mean(), lm.model(tokens, labels=tokens).loss)
    assert lm.loss(tokens).shape == (2, 11)


# ---------------------------------------------------------------- folders

@pytest.fixture(scope="module", params=["llama", "gpt2", "opt", "qwen3", "gemma3_text"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models")/request.param
    make_model(*promised[request.param][:2]).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_load_a_folder(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm = LanguageModel.load(folder, device="cpu")
    assert (lm.n_layers, lm.d_model, lm.vocab_size, lm.context_size, lm.bos_id, lm.special_ids.tolist()) == (3, 32, 64, 40, 0, [0, 1])
    assert lm.dtype == torch.float32 and not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    text = "the lazy fox"
    assert lm.prompt(text)[0, 0] == 0 and lm.tokenizer.decode(lm.tokenize(text)) == text
    assert lm.logits(text).shape == (len(lm.tokenize(text))+1, 64)
    assert lm.generate(text, 5).startswith(text)
    assert LanguageModel.load(folder, device="cpu", context_size=16, dtype="bfloat16").context_size == 16
    for wrong in (41, 1, 0, -3):
        with pytest.raises(ValueError, match="choose 2 to 40"): LanguageModel.load(folder, device="cpu", context_size=wrong)
    with pytest.raises(ValueError, match="dtype must be"): LanguageModel.load(folder, device="cpu", dtype="float33")


def test_what_cannot_be_loaded(tmp_path):
    for name in ("", "no such model", "./no/such/folder", "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match="no language model .*Hugging Face hub .*config.json"): LanguageModel.load(name)
    with pytest.raises(FileNotFoundError, match="no config.json"): LanguageModel.load(tmp_path)
    make_model(*promised["llama"][:2]).save_pretrained(tmp_path/"bare")
    with pytest.raises(FileNotFoundError, match="tokenizer"): LanguageModel.load(tmp_path/"bare")
    make_tokenizer().save_pretrained(tmp_path/"bare")
    weights = tmp_path/"bare"/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(FileNotFoundError, match="cannot be loaded"): LanguageModel.load(tmp_path/"bare")


def test_random_weights_are_refused(tmp_path):
    "A checkpoint without its LM head, or of another architecture, would silently run on random numbers."
    from safetensors.torch import load_file, save_file
    make_model(*promised["llama"][:2]).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    w = load_file(tmp_path/"model.safetensors")
    w.pop("model.layers.1.mlp.up_proj.weight")
    save_file(w, tmp_path/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 tensors of LlamaForCausalLM"): LanguageModel.load(tmp_path)


# ---------------------------------------------------------------- names

def test_wildcards():
    lm = make_lm()
    names = lambda p: [s.name for s in lm.sites(p)]
    assert names("resid_post.*") == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert names("*.2") == [f"{k}.2" for k in kinds]
    assert names("resid_post.{1,2}") == names("resid_post.[12]") == names(["resid_post.2", "resid_post.1"]) == ["resid_post.1", "resid_post.2"]
    assert names("{resid_pre,mlp_{in,out}}.{0, 2}") == ["resid_pre.0", "mlp_in.0", "mlp_out.0", "resid_pre.2", "mlp_in.2", "mlp_out.2"]
    assert names([lm.site("mlp_in", 1), "mlp_in.1"]) == ["mlp_in.1"]
    assert lm.site("resid_post", 2) == lm.site("resid_post.2") == lm.site(lm.site("resid_post.2")) and hash(lm.site("mlp_in.0"))


@pytest.mark.parametrize("name,layer", [("residual", 1), ("resid_post", None), ("resid_post", 3), ("resid_post", -1), ("resid_post.3", None), ("resid_post.1", 1), ("", None)])
def test_unknown_site(name, layer):
    with pytest.raises(ValueError, match="choose a kind of resid_pre, attn_out, mlp_in, mlp_out, resid_post and a layer of 0 to 2"): make_lm().site(name, layer)
    if layer is None:
        with pytest.raises(ValueError, match="no site"): make_lm().sites(name)


def test_unknown_architecture():
    lm = make_lm()
    for b in lm.model.model.layers: b.self_attn.strange, b.self_attn.o_proj = b.self_attn.o_proj, None
    lm = LanguageModel(lm.model, lm.tokenizer)
    assert [s.kind for s in lm.sites("*.0")] == ["resid_pre", "mlp_in", "mlp_out", "resid_post"]
    with pytest.raises(ValueError, match="no site 'attn_out.0' in LlamaForCausalLM: choose a kind of resid_pre, mlp_in"): lm.site("attn_out.0")
    model = make_model("mamba", dict(hidden_size=32, num_hidden_layers=3, state_size=4))
    model.backbone.layers = nn.ModuleList(model.backbone.layers[:2])
    with pytest.raises(ValueError, match="no list of 3 blocks"): find_blocks(model)


def test_wrong_sae():
    lm = make_lm()
    with pytest.raises(ValueError, match="reads 64 numbers, but resid_post.1 of llama has 32"): lm.splice(Linear(64))
    with pytest.raises(ValueError, match="where to splice"): lm.splice(lambda x: x)
    with lm.splice(Linear(32, 1.)): pass


# ---------------------------------------------------------------- running

def test_without_bos():
    lm = make_lm("qwen2", bos=False)
    assert lm.bos_id is None and lm.special_ids.tolist() == [1]
    assert torch.equal(lm.prompt("the fox")[0], lm.tokenize("the fox"))
    with pytest.raises(ValueError, match="empty"): lm.prompt("")
    assert lm.generate("the fox", 4).startswith("the fox")


def test_prompt_takes_ids():
    lm = make_lm()
    for ids in ([5, 6], torch.tensor([5, 6]), torch.tensor([[5, 6]]), [0, 5, 6]): assert lm.prompt(ids).tolist() == [[0, 5, 6]]
    assert lm.prompt("").tolist() == [[0]]
    with pytest.raises(ValueError, match="41 tokens, but llama has 40 positions"): lm.capture(torch.zeros(1, 41, dtype=torch.long), "resid_post.1")
    with pytest.raises(ValueError, match="expected \\(contexts, positions\\)"): lm.loss(torch.zeros(4, dtype=torch.long))


def test_generate():
    lm = make_lm("gpt2")
    lm.tokenizer.eos_token = None # a random model ends too soon
    state = torch.get_rng_state()
    a, b, c = (lm.generate("the fox", 60, seed=s) for s in (0, 0, 1)) # 60 tokens: beyond the 40 learned positions
    assert a == b != c and torch.equal(torch.get_rng_state(), state)
    assert lm.generate("the fox", 0) == "the fox"
    ids = lm.prompt("the fox")
    for _ in range(9): ids = torch.cat([ids, lm.logits(ids)[:, -1:].argmax(-1)], 1)
    assert lm.generate("the fox", 9, temperature=0) == lm.tokenizer.decode(ids[0, 1:])


def test_half_precision_model_with_float32_sae():
    lm, sae = make_lm(dtype=torch.bfloat16), Linear(32, .5)
    sae.dtype, sae.device = torch.float32, torch.device("cpu")
    with lm.splice(sae): x = lm.capture(tokens, "resid_post.1")["resid_post.1"]
    assert x.dtype == torch.bfloat16 and lm.logits(tokens).dtype == torch.float32


def test_embeddings_as_input():
    "Without ids no position is known to be special; the ids of an earlier call do not linger."
    lm, seen = make_lm("opt"), []
    embeds = lm.model.get_input_embeddings()(tokens)
    with lm.intervene("mlp_out.1", lambda x, t: seen.append((x.shape, t)) or x):
        clean = lm.model(input_ids=tokens).logits
        torch.testing.assert_close(lm.model(inputs_embeds=embeds).logits, clean)
    assert seen[0][0] == seen[1][0] == (2, 12, 32) and torch.equal(seen[0][1], tokens) and seen[1][1] is None


def test_nothing_stays_behind():
    lm = make_lm()
    def interrupt(x, t): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        with lm.intervene("resid_post.0", interrupt): lm.logits(tokens)
    assert hooks_left(lm) == 0
    with pytest.raises(IndexError): lm.capture(torch.full((1, 3), 64), "resid_post.1") # not in the vocabulary
    assert hooks_left(lm) == 0


def test_interventions_stack():
    lm = make_lm()
    x = lm.capture(tokens, "resid_post.1")["resid_post.1"]
    with lm.intervene("resid_post.1", lambda x, t: x+1), lm.intervene("resid_post.1", lambda x, t: x*2):
        torch.testing.assert_close(lm.capture(tokens, "resid_post.1")["resid_post.1"], (x+1)*2)


def test_without_bos_the_first_position_is_spared():
    "as in harvesting: an attention sink is no ordinary activation; a single token with a cache is not a first position"
    none = torch.tensor([], dtype=torch.long)
    zero, x = reconstruct_at(torch.zeros_like, none, spare_first=True), torch.ones(2, 4, 3)
    assert zero(x, torch.ones(2, 4, dtype=torch.long))[0, :, 0].tolist() == [1, 0, 0, 0]
    assert zero(x[:, :1], torch.ones(2, 1, dtype=torch.long)).sum() == 0
    assert reconstruct_at(torch.zeros_like, none)(x, torch.ones(2, 4, dtype=torch.long)).sum() == 0
