r"""Export a model: ONNX for callers without Python, jax.export for accelerators.

    python -m experiments.export --model=checkpoints/cotrr_lite_v1 --output=exported/cotrr_lite_v1
    python -m experiments.export --registry=registry --version=champion --output=exported/champion
    python -m experiments.export --check=exported/champion

model.onnx       scores one query's list of any length, also of none; pip install 'cotrr[onnx]' makes it
model.jaxexport  the same as a program for CPU, CUDA and TPU, of any length but 0
model/           the model's own files, plain arrays: they outlive what is made from them
sidecar.json     names, shapes, units and ranges of all inputs and outputs, words, hashes, parity

What is exported is run on random lists, of which a share is missing, and has to say what the NumPy scorer
says within 1e-5; else nothing is written.  --check reads all hashes and compares again, wherever an export
has arrived: on a newer jaxlib or onnxruntime, say.
"""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from msgspec import inspect

from cotrr import files
from cotrr.config import launch
from cotrr.data.contract import ATTRIBUTES, Candidate
from cotrr.deploy import jax_export, onnx_model
from cotrr.deploy.onnx_model import Run, signature
from cotrr.deploy.registry import Registry
from cotrr.deploy.scorer import Query, Scorer
from cotrr.errors import InputError
from cotrr.ranker import artifact, calibrators, model_files
from cotrr.ranker.calibrators import Scored, conclude
from cotrr.ranker.encoding import USUAL, encode_wants
from cotrr.ranker.model_files import Contents
from cotrr.store import open_store
from experiments.terminal import done, say

FLAGS = flags.FLAGS
FORMAT = 1
TOLERANCE = 1e-5
LISTS, LENGTHS, MISSING = 64, (1, 2, 20, 100), (0.0, 0.2, 1.0)  # random lists: lengths and shares in turn
SIDECAR, ARRAYS = "sidecar.json", "model"

SHARE, SCORE, PROBABILITY = "share of the picture's area", "score from 0 to 1", "probability"
UNITS = {
    "clip_score": "as Step 4 gives it, else the cosine of the two embeddings",
    "subject_ratio": SHARE, "object_area": SHARE,
    "glass_ratio": SHARE, "garnish_ratio": SHARE, "ice_ratio": SHARE,
    "color_delta_e": "CIEDE2000 difference from the query's color",
    "brightness": "share of full scale", "contrast": "share of full scale",
    "saturation": "share of full scale", "compliance_score": SCORE,
    "conflict_score": "sum over the conflicts", "conflict_prob": PROBABILITY,
    "conflict_calibrated": PROBABILITY, "temperature_conflict": SCORE, "clarity_conflict": SCORE,
    "strong_conflicts": "count of conflicts", "soft_conflicts": "count of conflicts",
}  # fmt: skip
COUNTS = ("strong_conflicts", "soft_conflicts")  # counted by severity; missing where `conflicts` is
INPUTS = {
    "text": ("embedding of the query's text; NaN: missing", "as the encoder gives it"),
    "domain": ("place of the query's domain in vocabulary.domains; their number for any other", "index"),
    "wants": ("weight of each word of vocabulary.constraints; see vocabulary.wants", "weight"),
    "image": ("embeddings of the candidates; a row with NaN is missing", "as the encoder gives it"),
    "attributes": (
        "attributes of the candidates, in the order of `attributes`; NaN: missing",
        "by attribute",
    ),
}
OUTPUTS = {
    "score": ("expected label y", "label", (0, 1)),
    "std": ("deviation of the members' expected labels; NaN where there is one member", "label", (0, 1)),
    "low": ("low end of the label's 95 % interval", "label", (0, 1)),
    "high": ("high end of the label's 95 % interval", "label", (0, 1)),
    "p_conflict": ("calibrated probability of a conflict", PROBABILITY, (0, 1)),
    "logit": ("orders the candidates: the highest comes first", "logit", (None, None)),
}
WANTS = ("Write each constraint as key=value, a list of values as one each, without repeats. Where a word is "
         "one of these, or the key of one, its weight is `usual` divided by their number, those counted that "
         "are not in the vocabulary; elsewhere it is 0.")  # fmt: skip


class Kind(NamedTuple):
    """One kind of export: its file, and how it is made, run and described."""

    file: str
    build: Callable[[Mapping[str, bytes], str], bytes]  # from a model's files, and where they are
    runner: Callable[[bytes], Run]
    facts: Callable[[bytes], dict[str, Any]]


def _onnx_facts(data: bytes) -> dict[str, Any]:
    opset, of_file = onnx_model.OPSET, onnx_model.IR_VERSION
    return {"opset": opset, "ir_version": of_file, "onnx": importlib.metadata.version("onnx")}


def _jax_facts(data: bytes) -> dict[str, Any]:
    program = jax_export.read(data)
    return {
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
        "platforms": program.platforms,
        "lasts": "on jaxlib up to six months newer; then make it again from model/",
        "call": "one dict of the inputs by name gives one dict of the outputs by name; n is at least 1",
        "dtypes": {"domain": jax_export.dtype_of("int64")},  # where they are not those of `inputs`
    }


KINDS = {
    "onnx": Kind("model.onnx", lambda content, place: onnx_model.build(model_files.parse(content, place)),
                 onnx_model.runner, _onnx_facts),
    "jax": Kind("model.jaxexport", lambda content, place: jax_export.build(artifact.parse(content, place)),
                jax_export.runner, _jax_facts),
}  # fmt: skip


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("model", None, "Model folder, from train.")
    flags.DEFINE_string("registry", None, "Or a registry: a folder, or a URL that fsspec knows.")
    flags.DEFINE_string("name", "cotrr", "Name of the model in the registry.")
    flags.DEFINE_string("version", "champion", "Version in the registry: v3, champion, challenger, shadow.")
    flags.DEFINE_string("output", None, "Folder for the export.")
    flags.DEFINE_list("format", list(KINDS), f"What to write: some of {','.join(KINDS)}.")
    flags.DEFINE_integer("seed", 0, "Seed of the random lists.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("check", None, "Folder of an export: nothing is written, all of it is checked.")


def main() -> None:
    """Makes, compares and writes; or checks what was written."""
    if sum(bool(flag) for flag in (FLAGS.model, FLAGS.registry, FLAGS.check)) != 1:
        raise InputError("expected one of --model, --registry and --check", remedy="See --help")
    if FLAGS.check:
        check(pathlib.Path(FLAGS.check), FLAGS.seed)
        return
    if not FLAGS.format or set(FLAGS.format) - set(KINDS):
        raise InputError(f"--format={','.join(FLAGS.format)}: expected some of {','.join(KINDS)}")
    if not FLAGS.output:
        raise InputError("--output is required here", remedy="See --help")
    content, place = _content()
    written = export(content, place, pathlib.Path(FLAGS.output), sorted(set(FLAGS.format)), FLAGS.seed)
    done(
        {name: f"{FLAGS.output}/{name}" for name in (*written, SIDECAR)},
        [f"python -m experiments.export --check={FLAGS.output}  (wherever it arrives)"],
    )


def _content() -> tuple[dict[str, bytes], str]:
    """The files of the model that the flags name, and where they are."""
    if FLAGS.model:
        return model_files.read_files(FLAGS.model), FLAGS.model
    registry = Registry(open_store(FLAGS.registry), FLAGS.name)
    version = registry.state().version(FLAGS.version)
    content = registry.files(version)  # verified
    return {name: content[name] for name in model_files.FILES}, f"{FLAGS.registry}, {version.label}"


def export(
    content: Mapping[str, bytes], place: str, output: pathlib.Path, kinds: list[str], seed: int = 0
) -> list[str]:
    """Writes an export and returns its files; InputError, and nothing is written, where parity fails."""
    contents = model_files.parse(content, place)
    made = {kind: KINDS[kind].build(content, place) for kind in kinds}
    parity = {kind: compare(contents, KINDS[kind].runner(data), seed) for kind, data in made.items()}
    for kind in kinds:
        _tell(KINDS[kind].file, parity[kind])
    everything = {KINDS[kind].file: data for kind, data in made.items()}
    everything |= {f"{ARRAYS}/{name}": content[name] for name in model_files.FILES}
    described = sidecar(contents) | {kind: KINDS[kind].facts(data) | {"file": KINDS[kind].file}
                                     for kind, data in made.items()}  # fmt: skip
    described |= {
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in everything.items()},
        "parity": {"tolerance": TOLERANCE, "seed": seed, "lists": LISTS, "lengths": LENGTHS,
                   "missing": MISSING, "differences": parity},
    }  # fmt: skip
    files.remove(output, (SIDECAR, *(kind.file for kind in KINDS.values())))
    for name, data in everything.items():
        with files.replacing(output / name) as temporary:
            temporary.write_bytes(data)
    files.write_json(output / SIDECAR, described)  # last: a folder with it is complete
    return list(everything)


def check(folder: pathlib.Path, seed: int = 0) -> None:
    """Verifies every file of an export and compares again; raises InputError for what does not hold."""
    described = read(folder)
    contents = model_files.parse(model_files.read_files(folder / ARRAYS), folder / ARRAYS)
    for name, kind in KINDS.items():
        if name in described:
            data = (folder / kind.file).read_bytes()
            _tell(kind.file, compare(contents, kind.runner(data), seed))
    say(f"all of {len(described['files'])} files of {described['model']['version']} is as it was written")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The sidecar of an export; raises InputError where a file that it names is missing or changed."""
    path = folder / SIDECAR
    try:
        described = json.loads(path.read_bytes())
        hashes = {str(name): str(digest) for name, digest in described["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        raise InputError("no export here", file=path, remedy="See --help") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"no sidecar of an export ({error!r})", file=path) from None
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            raise InputError("missing", file=folder / name)
        if files.sha256(folder / name) != digest:
            raise InputError("changed since it was written", file=folder / name)
    return described


def sidecar(contents: Contents) -> dict[str, Any]:
    """What a caller has to know of a model: names, shapes, units, ranges, words."""
    scorer, words, final = Scorer(contents), contents.vocabulary, contents.weights["final"]
    domains = {"domain": (0, len(words.domains)), "wants": (0, USUAL)}
    inputs = signature(len(words.constraints), scorer.text_dim, scorer.image_dim)
    return {
        "format": FORMAT,
        "model": {"name": contents.facts["name"], "version": scorer.version},
        "n": "number of candidates of the query, known when it is scored",
        "inputs": {
            name: {"dtype": kind, "shape": shape, "meaning": INPUTS[name][0], "unit": INPUTS[name][1],
                   "range": domains.get(name, (None, None))}
            for name, (kind, shape) in inputs.items()
        },
        "outputs": {
            name: {"dtype": "float32", "shape": ("n",), "meaning": meaning, "unit": unit, "range": ends}
            for name, (meaning, unit, ends) in OUTPUTS.items()
        },
        "attributes": attributes(),
        "vocabulary": {**words._asdict(), "usual": USUAL, "wants": WANTS},
        "embeddings": {"text": scorer.text_dim, "image": scorer.image_dim},
        "members": {"std": len(final), "score": int(final.sum())},  # lanes that each is made of
        "calibration": calibrators.pack(contents.calibration),
    }  # fmt: skip


def attributes() -> list[dict[str, Any]]:
    """Name, group, unit and range of each attribute in the order of the input."""
    line = inspect.type_info(Candidate)
    assert isinstance(line, inspect.StructType)
    fields: dict[str, Any] = {field.name: field.type for field in line.fields}
    found = []
    for name, group in ATTRIBUTES.items():
        number = None if name in COUNTS else fields[name].types[0]  # the other one is None
        ends = (number.ge, number.le) if number else (0, None)
        found.append({"name": name, "group": group, "unit": UNITS[name], "range": ends})
    return found


def compare(contents: Contents, run: Run, seed: int) -> dict[str, dict[str, float]]:
    """Largest differences from the NumPy scorer on random lists, by output.

    `difference` is all of it.  `unexplained` is what is left where logits may differ by the tolerance:
    a calibrator may be so steep that it makes much of the last bit of a logit.
    """
    scorer = Scorer(contents)
    worst = {name: {"difference": 0.0, "unexplained": 0.0} for name in Scored._fields}
    for query, image, values in random_lists(contents, scorer, seed):
        found = run(inputs_of(contents, query, image, values))
        low, wanted, high = bounds(contents, scorer, query, image, values)
        for name, most in worst.items():
            ends = (getattr(wanted, name),) * 2, (getattr(low, name), getattr(high, name))
            for measure, (least, greatest) in zip(most, ends, strict=True):
                most[measure] = max(most[measure], _outside(found[name], least, greatest))
    return worst


def _outside(found: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """How far values lie outside of bounds, above 1 relative to them; infinite where NaN meets a number."""
    if (np.isnan(found) != np.isnan(low)).any():
        return np.inf
    apart = np.maximum(low - found, found - high) / np.maximum(1, np.abs(low))
    return float(np.nanmax(apart, initial=0.0))


def bounds(
    contents: Contents, scorer: Scorer, query: Query, image: np.ndarray, values: np.ndarray
) -> tuple[Scored, Scored, Scored]:
    """What the scorer says, between what it says of logits that are lower or higher by the tolerance."""
    fitted, final = contents.calibration, contents.weights["final"]
    logits = scorer.logits(query, image, values).astype(np.float64)  # [L, 2, n]
    slack = TOLERANCE * np.maximum(1, np.abs(logits))
    moved = [logits - slack, logits, logits + slack]
    low, wanted, high = (
        conclude(fitted, part[:, 0], part[:, 1], final, np.ones(len(image), bool)) for part in moved
    )
    each = [fitted.rank(part[:, 0]) for part in moved]
    reach = np.max(np.maximum(each[1] - each[0], each[2] - each[1]), axis=0)  # no deviation moves further
    exact = lambda end, by: end._replace(std=wanted.std + by, logit=wanted.logit)
    return exact(low, -reach), wanted, exact(high, reach)


def inputs_of(
    contents: Contents, query: Query, image: np.ndarray, values: np.ndarray
) -> dict[str, np.ndarray]:
    """One query's inputs by name, as the sidecar tells any caller to make them."""
    domains, words = contents.vocabulary
    wants = np.zeros(len(words), np.float32)
    encode_wants(query.constraints, {word: place for place, word in enumerate(words)}, wants)
    domain = domains.index(query.domain) if query.domain in domains else len(domains)
    every = {"text": query.text, "domain": domain, "wants": wants, "image": image, "attributes": values}
    inputs = signature(len(words), len(query.text), image.shape[1])
    return {name: np.asarray(every[name], kind) for name, (kind, _) in inputs.items()}


def random_lists(
    contents: Contents, scorer: Scorer, seed: int
) -> Iterator[tuple[Query, np.ndarray, np.ndarray]]:
    """Queries with images and attributes that spread as the training data did, wider by a half."""
    rng, s = np.random.default_rng(seed), contents.weights
    ranges = [attribute["range"] for attribute in attributes()]
    least, most = (np.array([ends[i] if ends[i] is not None else inf for ends in ranges])
                   for i, inf in enumerate((-np.inf, np.inf)))  # fmt: skip
    mean, scale = s["statistics/mean"][0, -1], s["statistics/scale"][0, -1]
    scale = np.where(np.isfinite(scale), scale, 0)
    tokens = [word for word in contents.vocabulary.constraints if "=" in word] + ["never=heard"]
    for turn in range(LISTS):
        n, share = LENGTHS[turn % len(LENGTHS)], MISSING[turn % len(MISSING)]
        lost = lambda *shape, share=share: rng.random(shape) < share
        text = _spread(rng, s["statistics/text_mean"][0], s["statistics/text_axes"][0], 1)[0]
        image = _spread(rng, s["statistics/image_mean"][0], s["statistics/image_axes"][0], n)
        values = np.clip(rng.normal(mean, 1.5 * scale, (n, len(mean))), least, most)
        domain = "never seen" if lost() else rng.choice(contents.vocabulary.domains)
        query = Query(
            np.where(lost(), np.nan, text).astype(np.float32),
            str(domain),
            sorted(set(rng.choice(tokens, rng.integers(0, 5)).tolist())),
        )
        holes = lambda array, where: np.where(where, np.nan, array).astype(np.float32)
        yield query, holes(image, lost(n, 1)), holes(values, lost(*values.shape))


def _spread(rng: np.random.Generator, mean: np.ndarray, axes: np.ndarray, count: int) -> np.ndarray:
    """Embeddings [count, d] whose components along `axes` [d, p] spread by 1.5: those of training by 1."""
    size = np.sqrt(np.sum(axes**2) / max(axes.shape[1], 1))
    return rng.normal(mean, 1.5 / size if size else 1.0, (count, len(mean)))


def _tell(file: str, parity: dict[str, dict[str, float]]) -> None:
    """Says how near an export comes to the scorer; raises InputError where that is not near enough."""
    name, worst = max(parity.items(), key=lambda item: item[1]["unexplained"])
    if not worst["unexplained"] <= TOLERANCE:
        raise InputError(
            f"`{name}` differs from the scorer by {worst['unexplained']:.1e}, more than {TOLERANCE:.0e}",
            file=file,
            remedy="Score with the model's own files, and report it",
        )
    of_logit = parity["logit"]["difference"]
    of_rest = max(output["difference"] for name, output in parity.items() if name != "logit")
    say(
        f"{file} says what the scorer says on {LISTS} random lists: logits within {of_logit:.1e}, "
        f"what is made of them within {of_rest:.1e}"
    )


if __name__ == "__main__":
    launch(main, define_flags)
