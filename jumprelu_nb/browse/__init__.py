from .._callable import make_callable

make_callable(__name__, "browser", "browse")
