"""Optional parts of vgi_rpc that need more than pyarrow.

The extras never import the core by a fixed name, because the core may be a vendored copy. The core calls `bind` with
itself; when an extra is imported directly, `core` finds the one that belongs to this folder.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["bind", "core", "load"]

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
        raise ImportError(
            f"vgi_rpc_extras {__version__} needs the same version of vgi_rpc; {_name(core)} is {version}:"
            " copy or install both from one release"
        )
    with _lock:
        if _core is not None and _core is not core:
            raise ImportError(
                f"vgi_rpc_extras is bound to {_name(_core)}; a second core ({_name(core)}) cannot use it:"
                f" copy the folder vgi_rpc_extras beside {core.__name__}"
            )
        _core = core


def core() -> ModuleType:
    """Return the bound core; if there is none yet, bind the `vgi_rpc` beside this folder.

    Raises ImportError if there is no such module. A core copied under another name binds itself when an extra is
    reached through it.
    """
    if _core is None:
        bind(_beside())
    assert _core is not None
    return _core


def load(package: str, module: str, name: str, extra: str) -> Any:
    """Return `name` of a module of `package`, for the lazy names of an extra.

    ImportError says which third-party package is missing, and which pip extra brings it.
    """
    try:
        found = importlib.import_module(module if module.startswith(".") else f".{module}", package)
        return getattr(found, name)
    except ModuleNotFoundError as exc:
        if not exc.name or exc.name.startswith(__name__):
            raise  # a fault of the extra itself
        raise ImportError(
            f"{name} needs the package {exc.name!r}, which is not installed: pip install 'vgi-rpc-onefile[{extra}]'",
            name=exc.name,
        ) from exc


def _beside() -> ModuleType:
    name = f"{__name__.rpartition('.')[0]}.vgi_rpc".lstrip(".")
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise
    else:
        if getattr(found, "__file__", None):  # else a folder: the type checkers' marker, without the module
            return found
    raise ImportError(
        f"vgi_rpc_extras is not bound to a core, and there is no module {name}: copy vgi_rpc.py beside this folder,"
        " or reach the extra through your copy of it",
        name=name,
    )


def _name(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None)})"
