"""Files that a program writes in the end: what cannot be written is refused before anything is computed."""

import argparse
import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path):
    """Where to write what `path` then is: at no time is there half a file."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def new_file(text):
    """The type of an argument: a path where a file can be made."""
    path = Path(text)
    try:
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"no directory {str(path.parent)!r}")
        if path.exists() and not path.is_file():  # it is replaced
            raise argparse.ArgumentTypeError(f"expected a new file or one to replace, got {text!r}")
        path = path.resolve()
        part = path.with_name(f"{path.name}.part")
        part.touch()
        part.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from None
    return path


def picture(text):
    """The type of an argument: a path whose suffix matplotlib knows, and where a file can be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(text).suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"expected a name that ends in .{', .'.join(known)}, got {text!r}")
    return new_file(text)


def save_figure(figure, path, **options):
    """As savefig does; whole."""
    with replaced(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), **options)
