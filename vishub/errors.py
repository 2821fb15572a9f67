"""The errors a user of vishub meets. Each message says what is wrong and what would be right."""
import importlib
from types import ModuleType

__all__ = ['InputError', 'MissingExtraError', 'WeightsNotFoundError', 'import_extra']


class InputError(ValueError):
    """An input (file, image, option) that cannot be used; the message names it, the fault and what would be right."""


class WeightsNotFoundError(RuntimeError):
    """Weights were asked for and are neither in `weights/`, nor in the Hub cache, nor on the Hub; or are damaged."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Module to import, e.g. `gradio`.
        extra: The extra of vishub that installs it, e.g. `app`.

    Raises:
        MissingExtraError: If `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but fails to import a part of its own is another fault: let it be seen.
        if error.name is None or module.split('.')[0] != error.name.split('.')[0]:
            raise
        raise MissingExtraError(
            f"'{module}' is not installed. It comes with an extra of vishub: pip install 'vishub[{extra}]'"
        ) from error
