"""The files of a finished model, read and checked; NumPy alone.

`model.json` holds settings, vocabulary, calibration and provenance; `weights.npz` the parameters of
the L members and the statistics; `trained_on.npz` the hashes of what the model has seen.
"""

import hashlib
import io
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cotrr import files
from cotrr.data.contract import ATTRIBUTES
from cotrr.errors import InputError
from cotrr.ranker import calibrators
from cotrr.ranker.calibrators import Calibration
from cotrr.ranker.encoding import Vocabulary

FORMAT = 4
TABLES = ("weights.npz", "trained_on.npz")
FILES = ("model.json", *TABLES)


class Contents(NamedTuple):
    """What the files say."""

    facts: dict[str, Any]  # model.json
    vocabulary: Vocabulary
    calibration: Calibration
    weights: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    folder: pathlib.Path  # where they were, for messages


def read_files(folder: str | pathlib.Path) -> dict[str, bytes]:
    """The files of a model folder, by name; raises InputError where one is missing."""
    try:
        return {name: (pathlib.Path(folder) / name).read_bytes() for name in FILES}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            "no finished model here",
            file=error.filename,
            remedy="Train one: python -m experiments.train --help",
        ) from None


def version_of(facts: dict[str, Any]) -> str:
    """The model's name and the hash of all else that `model.json` says, its files included."""
    return f"{facts['name']}-{files.digest({k: v for k, v in facts.items() if k != 'version'})[:12]}"


def parse(content: Mapping[str, bytes], folder: str | pathlib.Path) -> Contents:
    """What FILES hold; raises InputError, naming `folder`, where they do not belong together."""
    folder = pathlib.Path(folder)
    path = folder / "model.json"
    try:
        facts = msgspec.json.decode(content["model.json"])  # refuses NaN
        if facts["version"] != version_of(facts):
            raise InputError("changed since it was saved", file=path)
        if facts["format"] != FORMAT or facts["attributes"] != list(ATTRIBUTES):
            raise InputError("saved by another version of cotrr", file=path)
        for name in TABLES:
            if hashlib.sha256(content[name]).hexdigest() != facts["files"][name]:
                raise InputError("not the file that was saved with the model", file=folder / name)
        words = (tuple(facts["vocabulary"][name]) for name in Vocabulary._fields)
        fitted = calibrators.unpack(facts["calibration"])
        weights, seen = (_arrays(content[name]) for name in TABLES)
        return Contents(facts, Vocabulary(*words), fitted, weights, seen, folder)
    except InputError:
        raise
    except Exception as error:  # of zipfile and NumPy, which promise none in particular
        raise InputError(f"no model of cotrr ({error!r})", file=path) from None


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an npz file; ValueError for pickles, and where they unpack to more than it holds."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # As `artifact.save` stores them; so nothing small can fill the memory.
        if sum(entry.file_size for entry in archive.infolist()) > len(content):
            raise ValueError("unpacks to more than it holds")
    return dict(np.load(io.BytesIO(content), allow_pickle=False))
