"""Fitted pipelines from where people keep them: a module, a ``.skops`` file, or a pickle they vouch for."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from edge_runtime.contract.errors import ConfigError, UnsupportedPipeline

PICKLES: Final = (".pkl", ".pickle", ".joblib")

_SAFE: Final = frozenset(
    {
        *(
            f"sklearn.feature_selection._univariate_selection.{name}"
            for name in ("chi2", "f_classif", "f_oneway", "f_regression", "r_regression")
        ),
        "sklearn.feature_selection._mutual_info.mutual_info_classif",
        "sklearn.feature_selection._mutual_info.mutual_info_regression",
        "sklearn.cluster._kmeans._kmeans_single_lloyd",
        "sklearn.cluster._kmeans._kmeans_single_elkan",
        "scipy._lib.array_api_compat.numpy._aliases.asarray",
        "sklearn.utils.validation.check_array",
        "functools.partial",  # of functions that are looked at one by one themselves
        "numpy.mean",
        "numpy.dtype",
    }
)
"""What fitted estimators refer to besides classes, and what reads and writes nothing."""


def load_pipeline(
    where: str,
    *,
    allow_pickle: bool = False,
    trusted: Iterable[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Any:
    """The fitted pipeline at ``module:attribute``, in a ``.skops`` file, or in a pickle where that is allowed.

    Modules are looked for in the working folder too. An attribute that can be called without being fitted is called to
    get the pipeline. ``trusted`` are types that a ``.skops`` file may hold besides scikit-learn's own; ``tell`` hears
    what is worth knowing although it is no error.

    Raises:
        ConfigError: there is no pipeline at ``where``, or it may not be read.
        UnsupportedPipeline: it was saved by another release of scikit-learn, whose pipeline this one cannot prove.
    """
    here = str(Path.cwd())
    if here not in sys.path:  # after all else, so that nothing in it stands in for an installed package
        sys.path.append(here)
    path = Path(where)
    if path.suffix == ".skops":
        found = _read(path, lambda: _from_skops(path, frozenset(trusted)), tell)
    elif path.suffix in PICKLES:
        if not allow_pickle:
            raise ConfigError(
                f"{path}: is a pickle, and reading one runs whatever code its writer put there; pass --allow-pickle if "
                "you made it yourself, else ask for a .skops file (skops.io.dump) or name it as module:attribute"
            )
        found = _read(path, lambda: _from_pickle(path), tell)
    else:
        found = _from_module(where)
    return _checked(found, where)


def _from_module(where: str) -> Any:
    module, colon, attribute = where.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(
            f"{where!r} is neither module:attribute nor a .skops file (nor, with --allow-pickle, a .pkl, .pickle or "
            ".joblib file)"
        )
    if module.endswith(".py"):
        raise ConfigError(
            f"{where!r} names a file; name the module: {Path(module).stem}:{attribute}, from the folder it lies in"
        )
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
        if callable(found) and not isinstance(found, type) and not hasattr(found, "predict"):
            found = found()
    except Exception as e:  # importing runs the user's own code, which may raise anything
        raise ConfigError(f"{where}: {_reason(e)}") from e
    return found


def _from_pickle(path: Path) -> Any:
    import joblib

    return joblib.load(path)


def _from_skops(path: Path, trusted: frozenset[str]) -> Any:
    import skops.io

    unknown = skops.io.get_untrusted_types(file=path)
    foreign = [name for name in unknown if name not in trusted and not _is_ours(name)]
    if foreign:
        raise ConfigError(
            f"{path}: holds what is not scikit-learn's own: {', '.join(foreign)}; if you know it, pass "
            f"{' '.join(f'--trust {name}' for name in foreign)}"
        )
    return skops.io.load(path, trusted=unknown)


def _is_ours(name: str) -> bool:
    """Whether ``name`` is a class that scikit-learn or SciPy defines, or a harmless function of theirs."""
    if name in _SAFE:
        return True
    module, _, attribute = name.rpartition(".")
    if module.partition(".")[0] not in ("sklearn", "scipy"):
        return False
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and found.__module__.partition(".")[0] in ("sklearn", "scipy")


def _read(path: Path, load: Callable[[], Any], tell: Callable[[str], None]) -> Any:
    """What ``load`` reads from ``path``, unless another release of scikit-learn wrote it."""
    from sklearn.exceptions import InconsistentVersionWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, problem = load(), None
        except ConfigError:
            raise
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read ({e.strerror or e})") from e
        except Exception as e:  # noqa: BLE001 - what a damaged or foreign file raises depends on its bytes
            found, problem = None, e
    versions = [w.message for w in caught if isinstance(w.message, InconsistentVersionWarning)]
    if versions:
        saved, present = versions[0].original_sklearn_version, versions[0].current_sklearn_version
        if _release(saved) != _release(present):
            raise UnsupportedPipeline(
                f"{path}: was saved by scikit-learn {saved}, and {present} may answer otherwise than it did; fit the "
                f"pipeline again with scikit-learn {present}"
            )
        tell(f"{path}: saved by scikit-learn {saved}, read and proven as {present} runs it")
    if problem is not None:
        raise ConfigError(f"{path}: holds no pipeline that can be read: {_reason(problem)}") from problem
    return found


def _release(version: str) -> list[str]:
    return str(version).split(".")[:2]


def _reason(problem: Exception) -> str:
    """A foreign exception in one line, with what to do where that is known."""
    text = " ".join(str(problem).split())
    if isinstance(problem, AttributeError) and "__main__" in text:
        return f"{text}: what a script defines in itself cannot be found again; move it into a module, save again"
    if isinstance(problem, ModuleNotFoundError):
        return f"{text}: install it, or run skiff in the folder where it lies"
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _checked(found: Any, where: str) -> Any:
    if isinstance(found, type):
        raise ConfigError(f"{where}: is the class {found.__name__}; name a fitted instance of it")
    if not hasattr(found, "get_params") and not hasattr(found, "predict"):
        keys = f" with the keys {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else ""
        raise ConfigError(f"{where}: is no fitted pipeline, but of type {type(found).__name__}{keys}")
    return found
