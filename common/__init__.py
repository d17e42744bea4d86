"""Shared by every script: one way to refuse bad input, one way to write a file whole."""

import argparse
import contextlib
import csv
import os
import re
import sys
import tempfile
from pathlib import Path


def fail(message):
    """Print one line on stderr and stop with exit code 2 (bad input, not a bug)."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """-h tells every default that the help text does not tell and that is a value."""

    def _get_help_string(self, action):
        told = action.default is None or action.default is False
        told = told or re.search(r"\(default|\([\d.]+\)", action.help)
        return action.help if told else super()._get_help_string(action)


def parser(doc):
    """The ArgumentParser of a script with the header `doc`; bad flags are bad input."""
    p = argparse.ArgumentParser(description=doc.split("\n\n")[0], formatter_class=ShowDefaults)
    p.error = fail
    return p


def seed(text):
    """The type of --seed: an integer that torch and NumPy take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


def check_positive(args, *names, most=1e36):
    """Fail unless each named argument is None, a default, or in (0, most], within a float32."""
    for name in names:
        value = getattr(args, name)
        top = min(most, 2**31) if isinstance(value, int) else most
        if value is not None and not 0 < value <= top:
            fail(f"--{name.replace('_', '-')} must lie in (0, {top:g}]; got {value}")


def check_share(args, *names):
    """Fail unless each named argument lies in (0, 1]."""
    check_positive(args, *names, most=1)


def check_step(args):
    """Fail where a training step would hold a single image: BatchNorm needs two."""
    if args.batch_size == 1:
        fail("--batch-size 1: BatchNorm needs two images a step")


def check_weights(args, *names):
    """Fail unless each of the named lists holds finite numbers of 0 or above."""
    for name in names:
        if not all(0 <= weight < float("inf") for weight in getattr(args, name)):
            fail(f"--{name} must be finite and 0 or above; got {getattr(args, name)}")


@contextlib.contextmanager
def written_whole(path):
    """Yield a path beside `path`, of its suffix; rename it on success, delete it otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, head, rows):
    """Write a table with its head line, whole."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


@contextlib.contextmanager
def saved_figure(path, rows=1, columns=1, **settings):
    """Yield matplotlib's figure and axes; the figure is then written whole to `path`."""
    from matplotlib.figure import Figure  # pyplot would choose a backend for the caller, too

    figure = Figure(figsize=settings.pop("figsize", None))
    yield figure, figure.subplots(rows, columns, **settings)
    if rows * columns > 1:
        figure.tight_layout()
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


def make_folder(path):
    """Create the folder `path` (and its parents) or fail; called before any long work."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        fail(f"cannot write to {path}: {error.strerror or error}")
    return path
