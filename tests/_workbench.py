"A small SAE on the embedded model with statistics whose vocabulary is hostile, for the tests and the benchmark of the browser."
from pathlib import Path

HOSTILE = ["<script>window.__xss=1</script>", "<img src=x onerror='window.__xss=2'>", "</script><b>", "</style><u>", "\u202eabc\u202c", "\0", "&lt;", "'\"`", "\n", "\t", "🦊👍🏽", "\ufeff", "x" * 10_000, "${window.__xss=3}", "{{7*7}}"]


def make(folder:Path, d_sae:int=256, tokens:int=20_000, hostile:bool=True):
    "Write sae_weights.safetensors, cfg.json, latents.safetensors and log.jsonl into a folder; latent 0 has the hostile tokens in its contexts."
    import json
    import torch
    from jumprelu_nb.data.lm import LanguageModel
    from jumprelu_nb.data.text import pack, texts
    from jumprelu_nb.interpret.latents import LatentStats
    from jumprelu_nb.sae.model import SAE, threshold_for_l0
    lm = LanguageModel.load("embedded", device="cpu")
    site = lm.site("resid_post.2")
    x = lm.capture(pack(lm, texts("stdlib", "validation"), 128, 4096), [site])[site.name].flatten(0, 1)
    recipe = dict(relative_bandwidth=.5)
    sae = SAE(128, d_sae, metadata=dict(model_name="embedded", site="resid_post.2", context_size=128, recipe=recipe, l0=12.)).init_(seed=0, b_dec=x.mean(0))
    with torch.no_grad(): sae.W_dec.copy_(torch.nn.functional.normalize(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:d_sae]] - x.mean(0), dim=-1)); sae.W_enc.copy_(sae.W_dec.T); sae.b_enc.copy_(-(x.mean(0) @ sae.W_enc))
    z = sae.pre_acts(x).detach()
    sae.gate.set_threshold_(torch.full((d_sae,), float(threshold_for_l0(z, 12.))))
    sae = sae.requires_grad_(False).eval()
    stats = LatentStats.collect(sae, lm, tokens=tokens)
    if hostile:
        ids = [t for t in dict.fromkeys(stats.top.tokens[0].flatten().tolist()) if t >= 0]
        for t, text in zip(ids, HOSTILE): stats.strings[t] = text
    sae.save(folder); stats.save(folder)
    (folder/"log.jsonl").write_text("".join(json.dumps(dict(tokens=1000 * k, seconds=k / 5, l0=30 - k, fvu=.5 / k, dead=.01 * k, theta_10=1., theta_50=2., theta_90=3., theta_moved=.1 * k, in_window=9.)) + "\n" for k in range(1, 19)))
    return lm, sae, stats
