"JumpReLU sparse autoencoders: the book that is also the library. Public names load on first use, so the import is light."
__version__ = "0.1.0"

_public = {  # public name -> the room that holds it
    "SAE": "sae.model", "encode_sparse": "sae.sparse", "decode_sparse": "sae.sparse",
    "LanguageModel": "data.lm",
    "Activations": "data.activations",
    "RECIPES": "train.recipes", "Recipe": "train.recipes", "get_recipe": "train.recipes",
    "Run": "train.trainer",
    "LatentStats": "interpret.latents", "steer": "interpret.steering", "export_html": "browse.export",
    "Transcoder": "sae.transcoder", "Synthetic": "data.synthetic", "pairs": "data.pairs", "advise": "train.advisor",
    "save_as": "share.exchange", "convert": "share.exchange", "FormatError": "share.files", "to_saelens": "share.adapters", "to_saebench": "share.adapters",
    "recovery": "evaluate.recovery", "sweep": "evaluate.sweep", "Frontier": "evaluate.frontier",
    "load_sae": "share.hub", "listing": "share.hub", "gemma_scope": "share.hub", "push_to_hub": "share.publish",
}
_verbs = ["train", "evaluate", "browse"]  # chapters that can be called, see `_callable`
__all__ = [*_public, *_verbs, "__version__"]


def __getattr__(name):
    if name not in _public and name not in _verbs: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    if name in _verbs: return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_public[name]}"), name)


def __dir__(): return sorted({*globals(), *__all__})
