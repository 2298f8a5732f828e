"Chapters that are also verbs: `jumprelu_nb.train` is a folder of modules, and `jumprelu_nb.train(...)` trains."
import sys
from importlib import import_module
from types import ModuleType


def make_callable(
    package:str, # full name of the package, its `__name__`
    room:str, # the room that holds the function
    name:str, # the function
) -> None:
    "Let calling `package` call the function `name` of its `room`, imported on first use."
    class Chapter(ModuleType):
        def __call__(self, *args, **kwargs): return getattr(import_module(f"{package}.{room}"), name)(*args, **kwargs)
        @property
        def __wrapped__(self): return getattr(import_module(f"{package}.{room}"), name)  # `inspect.signature` and help follow it
    sys.modules[package].__class__ = Chapter
