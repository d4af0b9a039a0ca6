"""Optional parts of vgi_rpc that need more than pyarrow.

The extras never import the core by name, because the core may be a vendored copy. Instead the core calls `bind` with
itself, and the extras' modules ask `core()` for it.
"""

from __future__ import annotations

import threading
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["bind", "core"]

_lock = threading.Lock()
_core: ModuleType | None = None


def bind(core: ModuleType) -> None:
    """Make `core` the module that the extras work with; binding the same one again does nothing.

    Raises ImportError if its version is not that of the extras, or if another core is bound already: classes of two
    copies do not mix.
    """
    global _core
    version = getattr(core, "__version__", None)
    if version != __version__:
        raise ImportError(f"vgi_rpc_extras {__version__} needs the same version of vgi_rpc; {_name(core)} is {version}")
    with _lock:
        if _core is not None and _core is not core:
            raise ImportError(f"vgi_rpc_extras is bound to {_name(_core)}; a second core ({_name(core)}) cannot use it")
        _core = core


def core() -> ModuleType:
    """Return the bound core. Raises ImportError if there is none yet."""
    if _core is None:
        raise ImportError("vgi_rpc_extras is not bound to a core; import it through vgi_rpc")
    return _core


def _name(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None)})"
