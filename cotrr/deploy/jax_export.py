"""A finished model as a program of `jax.export`, for accelerators: one query, a list of any length.

The program holds weights, statistics and calibration.  A newer jaxlib runs it for some six months only, so
the model's own files, plain arrays, must stand beside it.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from cotrr.deploy.onnx_model import LIST, Run, signature
from cotrr.errors import InputError
from cotrr.ranker import artifact, features
from cotrr.ranker.calibrators import Beta, Calibration, Calibrator, Isotonic
from cotrr.ranker.encoding import Encoded, mask_of
from cotrr.ranker.model import Reranker, Scores

PLATFORMS = ("cpu", "cuda", "tpu")


def build(model: artifact.Model) -> bytes:
    """The program of a model, the same bytes each time; InputError where flatbuffers is not installed."""
    _need_flatbuffers()
    (n,) = export.symbolic_shape(LIST)
    embeddings = (mean.shape[-1] for mean in (model.statistics.text_mean, model.statistics.image_mean))
    inputs = {
        name: jax.ShapeDtypeStruct([n if size == LIST else size for size in shape], dtype_of(kind))
        for name, (kind, shape) in signature(len(model.vocabulary.constraints), *embeddings).items()
    }
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with _without_places(), jax.default_matmul_precision("highest"):
        program = export.export(jax.jit(_scoring(model)), platforms=PLATFORMS)(inputs)
        return bytes(program.serialize())


def _need_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError(
            "flatbuffers is not installed", remedy="pip install 'cotrr[onnx]', or export --format=onnx"
        )


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Leaves out where in which file an operation was written: it differs between checkouts."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def dtype_of(kind: str) -> str:
    """The data type that stands for one of the signature: JAX has no int64 unless told to."""
    return "int32" if kind == "int64" else kind


def read(data: bytes) -> export.Exported:
    """The program in a file; raises InputError where flatbuffers is not installed."""
    _need_flatbuffers()
    return export.deserialize(bytearray(data))


def runner(data: bytes) -> Run:
    """Scores with a program in a file; it is compiled for each new length of a list, which must not be 0."""
    call = jax.jit(read(data).call)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: np.asarray(value, dtype_of(str(value.dtype))) for name, value in inputs.items()}
        return {name: np.asarray(value) for name, value in call(given).items()}

    return run


def _scoring(model: artifact.Model) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Scores one query, its inputs by name, all of the model closed over."""
    network, gates = Reranker(hidden=model.config["hidden"]), features.make_gates(mask_of(model.config))

    def score(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        n = inputs["attributes"].shape[0]
        none = {"text": jnp.zeros(0), "image": jnp.zeros((n, 0)), "wants": jnp.zeros(0)}
        query = Encoded(**(none | inputs), where=jnp.ones(n, bool))
        one_lane = lambda params, fitted: network.apply(params, features.featurize(fitted, query), gates)
        logits = jax.vmap(one_lane)(model.params, model.statistics)
        return _conclude(model.calibration, np.flatnonzero(model.final), logits)

    return score


def _conclude(fitted: Calibration, final: np.ndarray, logits: Scores) -> dict[str, jax.Array]:
    """`calibrators.conclude` of logits [L, n], in JAX."""
    share = lambda values: jnp.clip(values, 0.0, 1.0)
    logit = jnp.mean(logits.rank[final], axis=0)
    label, each = _calibrated(fitted.rank, logit), _calibrated(fitted.rank, logits.rank)
    knots, *curves = map(jnp.array, fitted.intervals)
    low, high = (jnp.interp(label, knots, curve) for curve in curves)
    spread = jnp.std(each, axis=0) if len(each) > 1 else jnp.full_like(logit, jnp.nan)
    clash = _calibrated(fitted.conflict, jnp.mean(logits.conflict[final], axis=0))
    return {
        "score": share(label),
        "std": share(spread),
        "low": share(jnp.minimum(low, label)),
        "high": share(jnp.maximum(high, label)),
        "p_conflict": share(clash),
        "logit": logit,
    }


def _calibrated(fitted: Calibrator, logits: jax.Array) -> jax.Array:
    """[...] calibrated values."""
    if isinstance(fitted, Isotonic):
        return jnp.interp(logits, jnp.array(fitted.knots), jnp.array(fitted.values))
    if isinstance(fitted, Beta):
        up, down = jax.nn.log_sigmoid(logits), jax.nn.softplus(logits)
        return jax.nn.sigmoid(fitted.a * up + fitted.b * down + fitted.c)
    return jax.nn.sigmoid(fitted.slope * logits + fitted.offset)
