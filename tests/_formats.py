"""Files of every format, built from the written specification (not by our writers), with what the library that owns the format would compute, in float64.

`variants` maps a name to (format, make). `make(folder, d, F, dtype)` writes the files and returns a `Case`: what to load, what to tell the loader, and the native function."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Case:
    "One SAE in somebody's files."
    path: Path
    native: Callable[[Tensor], tuple[Tensor, Tensor]]         # x → codes, reconstruction, in float64
    given: dict = field(default_factory=dict)


def canonical(d:int=16, F:int=64, e:int|None=None, seed:int=0) -> dict[str, Tensor]:
    "One set of parameters: thresholds of .2 to 1.2, decoder rows of all lengths, a decoder bias."
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    return dict(W=r(d, F) / d**.5, b=.3*r(F), D=r(F, e or d) * (.5 + torch.rand(F, 1, generator=g)), c=r(e or d), theta=.2 + torch.rand(F, generator=g), b_gate=.5*r(F), r_mag=.3*r(F), log=.3*r(F), skip=r(d, e or d))


def inputs(d:int=16, n:int=256, seed:int=1) -> Tensor: return 2*torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def top(z:Tensor, k:int) -> Tensor:
    at = z.topk(k, -1).indices
    return torch.zeros_like(z).scatter(-1, at, z.gather(-1, at).relu())


def relu(z): return z.relu()
def jump(theta): return lambda z: z.relu() * (z > theta.double())


def native(W, b, D, c, gate, pre:bool=False, s:float=1., skip=None, rank=None, div=None, norm=None):
    "gate(((s·x) − c·pre) W + b), optionally ranked by `rank`·z; (f D + c)/s."
    W, b, D, c = (t.double() for t in (W, b, D, c))
    def fn(x):
        x = x.double()
        u, back = x * s, lambda y: y / s
        if norm == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            u, back = (x - mean) / (std + 1e-5), lambda y: y * std + mean
        if norm == "constant_norm":
            k = x.shape[-1]**.5 / x.norm(dim=-1, keepdim=True)
            u, back = x * k, lambda y: y / k
        z = (u - c if pre else u) @ W + b
        f = gate(z * rank.double()) if rank is not None else gate(z)
        y = back((f / (div.double() if div is not None else 1)) @ D + c)
        return f, y if skip is None else y + x @ skip.double()
    return fn


def write(folder:Path, tensors:dict[str, Tensor], name:str, cfg:dict|None=None, cfg_name:str="cfg.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in tensors.items()}
    if name.endswith(".safetensors"): save_file(tensors, folder/name)
    elif name.endswith(".npz"): np.savez(folder/name, **{k: v.numpy() for k, v in tensors.items()})
    else: torch.save(tensors, folder/name)
    if cfg is not None: (folder/cfg_name).write_text(json.dumps(cfg))


# -- SAELens ---------------------------------------------------------------------------------------------------------------------
def saelens(arch:str="jumprelu", pre:bool=False, rescale:bool=False, norm:str="none", old:bool=False, log:bool=False):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        trans, e = "transcoder" in arch, d + 3 if "transcoder" in arch else d
        p = {k: v.to(dtype) if k not in ("theta", "log") else v for k, v in canonical(d, F, e).items()}
        t, gate, more, kw = dict(W_enc=p["W"], b_enc=p["b"], W_dec=p["D"], b_dec=p["c"]), relu, {}, {}
        W, b, n = p["W"], p["b"], p["D"].double().norm(dim=-1)
        if "jumprelu" in arch and log: t["log_threshold"], gate = p["log"], jump(p["log"].exp())
        elif "jumprelu" in arch: t["threshold"], gate = p["theta"], jump(p["theta"])
        if arch == "gated":
            t |= dict(b_gate=p["b_gate"], b_mag=p["b"], r_mag=p["r_mag"]); t.pop("b_enc")
            W, gain = p["W"].double(), p["r_mag"].double().exp()
            gate = lambda z: (z + p["b_gate"].double() > 0) * (z*gain + p["b"].double()).relu()
            b = torch.zeros(F)
        if arch in ("topk", "abstopk"):
            more = dict(k=5, rescale_acts_by_decoder_norm=rescale)
            gate = (lambda z: top(z, 5)) if arch == "topk" else lambda z: torch.zeros_like(z).scatter(-1, z.abs().topk(5).indices, z.gather(-1, z.abs().topk(5).indices))
            if rescale: kw = dict(rank=n, div=n)
        if "batchtopk" in arch:
            t["topk_threshold"], more = torch.tensor(.7, dtype=torch.float64), dict(k=5, rescale_acts_by_decoder_norm=rescale)
            gate, kw = jump(torch.tensor(.7)), dict(rank=n, div=n) if rescale else {}
        if trans: more["d_out"] = e
        if "skip" in arch: t["W_skip"] = p["skip"].T
        cfg = dict(architecture=arch, d_in=d, d_sae=F, dtype="float32", device="cpu", apply_b_dec_to_input=pre, normalize_activations=norm, reshape_activations="none",
                   metadata=dict(sae_lens_version="6.54.12", model_name="gpt2", hook_name="blocks.3.hook_resid_post")) | more
        s = 1.
        if norm == "expected_average_only_in":
            s = .4
            folder.mkdir(parents=True, exist_ok=True)
            (folder/"activation_scaler.json").write_text(json.dumps(dict(scaling_factor=s, has_whitening=False)))
        if old:
            cfg = {k: v for k, v in cfg.items() if k not in ("metadata", "apply_b_dec_to_input", "k", "rescale_acts_by_decoder_norm", "architecture")} | dict(hook_point="blocks.3.hook_resid_post", model_name="gpt2", normalize_activations=False)
            if arch == "topk": cfg |= dict(activation_fn_str="topk", activation_fn_kwargs=dict(k=5))
            elif arch != "standard": cfg["architecture"] = arch
        write(folder, t, "sae_weights.safetensors", cfg)
        fn = native(W, b, p["D"], p["c"], gate, pre or old, s, p["skip"] if "skip" in arch else None, norm=norm.removesuffix("_rescale"), **kw)
        return Case(folder, fn if s == 1 or not rescale else lambda x: (lambda f, y: (f / s, y))(*fn(x)))      # its codes are z·‖W_dec‖, and its fold divides W_dec by s
    return make


# -- Gemma Scope -----------------------------------------------------------------------------------------------------------------
def gemma_1(lower:bool=False, packed:bool=False, embedding:bool=False, ones:bool=False):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        p, u = canonical(d, F), "w" if lower else "W"
        folder = folder/"gemma-scope-2b-pt-res"/("embedding" if embedding else "layer_20")/"width_16k"/"average_l0_71"
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {k: v.numpy().astype(np.float16 if dtype == torch.float16 else np.float32) for k, v in {u + "_enc": p["W"], "b_enc": p["b"], u + "_dec": p["D"], "b_dec": p["c"], "threshold": p["theta"]}.items()}
        if ones: arrays["scaling_factor"] = np.ones(F, np.float32)
        (np.savez_compressed if packed else np.savez)(folder/"params.npz", **arrays)
        r = d**.5 if embedding else 1.
        W, b, D, c, theta = (torch.from_numpy(arrays[k].astype(np.float64)) for k in (u + "_enc", "b_enc", u + "_dec", "b_dec", "threshold"))
        return Case(folder, native(W / r, b, D * r, c, jump(theta)))
    return make


def gemma_2(skip:bool=False, config:bool=True, clt:int=0):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        e = d + 3 if skip else d * (clt or 1)
        p = {k: v.to(dtype) if k != "theta" else v for k, v in canonical(d, F, e).items()}
        folder = folder/"gemma-scope-2-1b-pt"/("clt" if clt else "transcoder" if skip else "resid_post")/f"layer_13_width_16k_l0_medium{'_affine' if skip else ''}"
        t = dict(w_enc=p["W"], b_enc=p["b"], w_dec=p["D"].unflatten(1, (clt, d)) if clt else p["D"], b_dec=p["c"].unflatten(0, (clt, d)) if clt else p["c"], threshold=p["theta"])
        if skip: t["affine_skip_connection"] = p["skip"]
        cfg = dict(architecture="jump_relu", model_name="google/gemma-3-1b-pt", hf_hook_point_in="model.layers.13.output", affine_connection=skip) if config else None
        if config and skip: cfg |= dict(hf_hook_point_in="model.layers.13.pre_feedforward_layernorm.output", hf_hook_point_out="model.layers.13.post_feedforward_layernorm.output")
        write(folder, t, "params.safetensors", cfg, "config.json")
        return Case(folder, native(p["W"], p["b"], p["D"], p["c"], jump(p["theta"]), skip=p["skip"] if skip else None))
    return make


# -- dictionary_learning ---------------------------------------------------------------------------------------------------------
def dictionary(kind:str, backup:float=0.):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        p = {k: v.to(dtype) if k not in ("theta", "log") else v for k, v in canonical(d, F).items()}
        if kind == "AutoEncoder": p["D"] = p["D"] / p["D"].norm(dim=-1, keepdim=True)
        lin = {"encoder.weight": p["W"].T, "encoder.bias": p["b"], "decoder.weight": p["D"].T}
        mat = dict(W_enc=p["W"], b_enc=p["b"], W_dec=p["D"], b_dec=p["c"])
        top_ = dict(k=torch.tensor(5, dtype=torch.int), threshold=torch.tensor(.7))
        gate = {"AutoEncoderTopK": lambda z: top(z, 5), "BatchTopKSAE": jump(torch.tensor(.7)), "MatryoshkaBatchTopKSAE": jump(torch.tensor(.7)), "JumpReluAutoEncoder": jump(p["theta"])}.get(kind, relu)
        t = {"AutoEncoder": lin | dict(bias=p["c"]), "AutoEncoderNew": lin | {"decoder.bias": p["c"]}, "JumpReluAutoEncoder": mat | dict(threshold=p["theta"]), "AutoEncoderTopK": lin | dict(b_dec=p["c"]) | top_,
             "BatchTopKSAE": lin | dict(b_dec=p["c"]) | top_, "MatryoshkaBatchTopKSAE": mat | top_ | dict(group_sizes=torch.tensor([F//4, F - F//4])),
             "GatedAutoEncoder": {k: v for k, v in lin.items() if k != "encoder.bias"} | dict(r_mag=p["r_mag"], gate_bias=p["b_gate"], mag_bias=p["b"], decoder_bias=p["c"])}[kind]
        W, b = p["W"], p["b"]
        if kind == "GatedAutoEncoder":
            b, gate = torch.zeros(F), lambda z: (z + p["b_gate"].double() > 0) * (z*p["r_mag"].double().exp() + p["b"].double()).relu()
        fn = native(W, b, p["D"], p["c"], gate, pre=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
        if kind == "AutoEncoder" and dtype != torch.float32:                      # rows that were rounded: its from_pretrained brings them to norm 1 and multiplies the codes
            plain, n = fn, p["D"].double().norm(dim=-1)
            fn = lambda x: (lambda f, y: (f * n, y))(*plain(x))
        if backup:
            t = dict(step=3, ae={k: v.contiguous() for k, v in t.items()}, optimizer=dict(state={0: dict(exp_avg=torch.zeros(3))}, param_groups=[dict(lr=.1, betas=(0., .999))]), config=dict(dict_class=kind), norm_factor=backup)
            inner = fn
            fn = lambda x: tuple(backup * v for v in inner(x / backup))
        write(folder, t, "ae.pt", dict(trainer=dict(trainer_class="T", dict_class=kind, activation_dim=d, dict_size=F, lm_name="EleutherAI/pythia-70m", layer=3, submodule_name="resid_post_layer_3", lr=1e-3), buffer=dict(ctx_len=128)), "config.json")
        return Case(folder, fn)
    return make


# -- sparsify, Llamascopium, OpenAI ----------------------------------------------------------------------------------------------
def sparsify(kind:str="topk", transcode:bool=False, skip:bool=False, latents:bool=False):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        p = {k: v.to(dtype) for k, v in canonical(d, F).items()}
        k, folder = 4, folder/"layers.10"
        t = {"encoder.weight": p["W"].T, "encoder.bias": p["b"], "W_dec": p["D"], "b_dec": p["c"]} | (dict(W_skip=p["skip"].T) if skip else {})
        write(folder, t, "sae.safetensors", dict(activation=kind, expansion_factor=F//d, normalize_decoder=True, num_latents=F if latents else 0, k=k, multi_topk=False, skip_connection=skip, transcode=transcode, d_in=d))
        def groupmax(z):
            v, at = z.relu().unflatten(-1, (k, -1)).max(-1, keepdim=True)
            return torch.zeros_like(z).unflatten(-1, (k, -1)).scatter(-1, at, v).flatten(-2)
        return Case(folder, native(p["W"], p["b"], p["D"], p["c"], (lambda z: top(z.relu(), k)) if kind == "topk" else groupmax, pre=not transcode, skip=p["skip"] if skip else None))
    return make


def llamascopium(act:str="jumprelu", per_norm:bool=True, mode:str="dataset-wise", pt:bool=False):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        p = {k: v.to(dtype) if k != "log" else v for k, v in canonical(d, F).items()}
        t = {"W_E": p["W"], "b_E": p["b"], "W_D": p["D"], "b_D": p["c"], "dataset_average_activation_norm.blocks.3.hook_resid_post": torch.tensor(11.)}
        if act == "jumprelu": t["activation_function.log_jumprelu_threshold"] = p["log"]
        cfg = dict(sae_type="sae", d_model=d, expansion_factor=F/d, use_decoder_bias=True, act_fn=act, norm_activation=mode, sparsity_include_decoder_norm=per_norm, top_k=5, hook_point_in="blocks.3.hook_resid_post",
                   hook_point_out="blocks.3.hook_resid_post", use_glu_encoder=False)
        folder.mkdir(parents=True, exist_ok=True)
        if pt: write(folder, dict(sae={k: v.contiguous() for k, v in t.items()}, version="2.0"), "sae_weights.pt", cfg, "config.json")
        else: write(folder, t, "sae_weights.safetensors", cfg, "config.json")
        n = p["D"].double().norm(dim=-1)
        gate, s = (jump(p["log"].exp()) if act == "jumprelu" else (lambda z: top(z, 5)) if act == "topk" else relu), d**.5 / 11 if mode == "dataset-wise" else 1.
        fn = native(p["W"], p["b"], p["D"], p["c"], gate, s=s, norm="constant_norm" if mode == "token-wise" else None, **(dict(rank=n, div=n) if per_norm else {}))
        return Case(folder, fn if not per_norm or act == "topk" else lambda x: (lambda f, y: (f / n, y))(*fn(x)))      # its codes are divided by the norms again; ours of a ranking are not
    return make


def openai(act:str="TopK"):
    def make(folder:Path, d:int=16, F:int=64, dtype=torch.float32) -> Case:
        p = {k: v.to(dtype) for k, v in canonical(d, F).items()}
        t = {"encoder.weight": p["W"].T, "decoder.weight": p["D"].T, "pre_bias": p["c"], "latent_bias": p["b"], "stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_activation_frequency": torch.zeros(F), "latents_mean_square": torch.zeros(F)}
        if act == "TopK": t |= {"activation": "TopK", "activation_state_dict": dict(k=5, postact_fn="ReLU"), "activation.k": 5, "activation.postact_fn": "ReLU"}
        elif act == "ReLU": t["activation"] = "ReLU"
        folder = folder/"resid_post_mlp_v5_32k"/"autoencoders"
        write(folder, t, "8.pt")
        return Case(folder/"8.pt", native(p["W"], p["b"], p["D"], p["c"], (lambda z: top(z, 5)) if act == "TopK" else relu, pre=True, norm="layer_norm" if act == "TopK" else None))
    return make


variants = {
    **{f"saelens {a}{' pre' * p}": ("saelens", saelens(a, p)) for a in ("standard", "jumprelu", "gated", "topk", "abstopk") for p in (False, True)},
    **{f"saelens {a} rescaled": ("saelens", saelens(a, True, True)) for a in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")},
    **{f"saelens {a}, scaled inputs": ("saelens", saelens(a, True, r, "expected_average_only_in")) for a, r in (("jumprelu", False), ("gated", False), ("topk", True), ("batchtopk", True), ("batchtopk", False))},
    **{f"saelens {a}, {n}": ("saelens", saelens(a, True, norm=n)) for a in ("standard", "jumprelu") for n in ("layer_norm", "constant_norm_rescale")},
    **{f"saelens {a}": ("saelens", saelens(a)) for a in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")},
    **{f"saelens 5 {a}": ("saelens", saelens(a, old=True)) for a in ("standard", "jumprelu", "gated", "topk")},
    "saelens log_threshold": ("saelens", saelens("jumprelu", log=True)),
    "gemma_scope": ("gemma_scope", gemma_1()), "gemma_scope lower case": ("gemma_scope", gemma_1(lower=True, ones=True)), "gemma_scope packed": ("gemma_scope", gemma_1(packed=True)), "gemma_scope embedding": ("gemma_scope", gemma_1(embedding=True)),
    "gemma_scope_2": ("gemma_scope_2", gemma_2()), "gemma_scope_2 without config": ("gemma_scope_2", gemma_2(config=False)), "gemma_scope_2 affine": ("gemma_scope_2", gemma_2(True)), "gemma_scope_2 clt": ("gemma_scope_2", gemma_2(clt=3)),
    **{f"dictionary_learning {k}": ("dictionary_learning", dictionary(k)) for k in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")},
    **{f"dictionary_learning {k} backup": ("dictionary_learning", dictionary(k, 7.)) for k in ("JumpReluAutoEncoder", "BatchTopKSAE", "GatedAutoEncoder", "AutoEncoderTopK")},
    "sparsify": ("sparsify", sparsify()), "sparsify groupmax": ("sparsify", sparsify("groupmax")), "sparsify transcoder": ("sparsify", sparsify(transcode=True)), "sparsify skip": ("sparsify", sparsify(transcode=True, skip=True, latents=True)),
    **{f"llamascopium {a}{' per norm' * n}, {m}": ("llamascopium", llamascopium(a, n, m)) for a in ("relu", "jumprelu", "topk") for n in (True, False) for m in ("dataset-wise", "token-wise", "inference")},
    "llamascopium pt": ("llamascopium", llamascopium(pt=True)),
    "openai TopK": ("openai", openai()), "openai ReLU": ("openai", openai("ReLU")), "openai v1": ("openai", openai("")),
}
