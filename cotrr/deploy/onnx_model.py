"""A finished model as an ONNX graph for one query: `deploy.scorer` for callers without Python.

The graph is built node by node, its arithmetic written like that of arrays.  The weights of all L lanes
stand side by side, [L, n, ...], so an ensemble is one product too.  All of it is float32; missing values,
calibration and intervals are inside.
"""

import importlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cotrr.deploy.scorer import PROBABILITIES
from cotrr.errors import InputError
from cotrr.ranker.calibrators import Beta, Calibration, Calibrator, Isotonic, Scored
from cotrr.ranker.encoding import CONFLICT_PROB, NAMES, RULE, RULE_COLUMNS, WINSOR, mask_of
from cotrr.ranker.model_files import Contents

# Not the newest: runtimes since 2024 know these, and nothing here needs more.
OPSET, IR_VERSION = 21, 10
LIST = "n"  # the length of a list, open until it is scored
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # scores one query: inputs to outputs


def signature(words: int, text: int, image: int) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Data type and shape of each input by name, of so many words and numbers of embeddings; none of 0."""
    inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "text": ("float32", (text,)),
        "domain": ("int64", ()),
        "wants": ("float32", (words,)),
        "image": ("float32", (LIST, image)),
        "attributes": ("float32", (LIST, len(NAMES))),
    }
    return {name: (kind, shape) for name, (kind, shape) in inputs.items() if 0 not in shape}


def build(contents: Contents) -> bytes:
    """The model as an ONNX file, the same bytes each time; InputError where onnx is not installed."""
    onnx = _installed("onnx")
    graph, lanes = Graph(onnx), Lanes(contents)
    inputs = {name: graph.input(name, *given) for name, given in signature(*lanes.sizes).items()}
    asked = _query(graph, lanes, inputs)
    attributes, base = _attributes(graph, lanes, inputs)
    candidate = graph.concat(*attributes, *_pictures(graph, lanes, inputs))
    logits = _network(graph, lanes, asked, candidate) + base
    for name, value in _conclude(contents.calibration, lanes.final, logits).items():
        graph.output(name, value, (LIST,))
    model = onnx.helper.make_model(
        graph.finished("cotrr"),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="cotrr",
    )
    onnx.helper.set_model_props(model, {"model_version": contents.facts["version"]})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def runner(data: bytes) -> Run:
    """Scores with an ONNX file, in one thread; raises InputError where onnxruntime is not installed."""
    runtime = _installed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: np.asarray(value) for name, value in inputs.items()}  # scalars are no arrays to it
        return dict(zip(Scored._fields, session.run(Scored._fields, given), strict=True))

    return run


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{package} is not installed", remedy="pip install 'cotrr[onnx]', or export --format=jax"
        ) from None


class Tensor:
    """A value of a graph; arithmetic with it adds nodes."""

    def __init__(self, graph: "Graph", name: str):
        """The value that a graph knows by a name."""
        self.graph, self.name = graph, name

    def __add__(self, other: Any) -> "Tensor":
        return self.graph.node("Add", self, other)

    def __sub__(self, other: Any) -> "Tensor":
        return self.graph.node("Sub", self, other)

    def __mul__(self, other: Any) -> "Tensor":
        return self.graph.node("Mul", self, other)

    def __truediv__(self, other: Any) -> "Tensor":
        return self.graph.node("Div", self, other)

    def __matmul__(self, other: Any) -> "Tensor":
        return self.graph.node("MatMul", self, other)

    def __neg__(self) -> "Tensor":
        return self.then("Neg")

    def then(self, kind: str, *operands: Any, **attributes: Any) -> "Tensor":
        """What an operator makes of this value, and of further operands."""
        return self.graph.node(kind, self, *operands, **attributes)

    def take(self, index: Any, axis: int = -1) -> "Tensor":
        """The entries at an index or indices along an axis."""
        return self.then("Gather", np.asarray(index, np.int64), axis=axis)

    def floats(self) -> "Tensor":
        """Truth as 0 and 1."""
        return self.then("Cast", to=self.graph.onnx.TensorProto.FLOAT)

    def where(self, true: Any, false: Any) -> "Tensor":
        """One value where this holds, the other elsewhere."""
        return self.then("Where", true, false)


class Graph:
    """A graph that grows; numbers and arrays among the operands become its constants."""

    def __init__(self, onnx: Any):
        """An empty graph; `onnx` is the package."""
        self.onnx = onnx
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, kind: str, shape: tuple[int | str, ...]) -> Tensor:
        """An input by name."""
        of = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        self._inputs.append(self.onnx.helper.make_tensor_value_info(name, of, shape))
        return Tensor(self, name)

    def output(self, name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
        """Gives a value out by name, as float32."""
        self._nodes.append(self.onnx.helper.make_node("Identity", [value.name], [name]))
        self._outputs.append(
            self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, shape)
        )

    def node(self, kind: str, *operands: Any, **attributes: Any) -> Tensor:
        """What an operator of ONNX makes of its operands."""
        names = [operand.name if isinstance(operand, Tensor) else self._constant(operand)
                 for operand in operands]  # fmt: skip
        made = f"{kind}_{len(self._nodes)}"
        self._nodes.append(self.onnx.helper.make_node(kind, names, [made], **attributes))
        return Tensor(self, made)

    def concat(self, *parts: Tensor) -> Tensor:
        """Values side by side in their last axis."""
        return self.node("Concat", *parts, axis=-1)

    def finished(self, name: str) -> Any:
        """The graph as onnx has it."""
        return self.onnx.helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, initializer=self._constants
        )

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        name = f"constant_{len(self._constants)}"
        self._constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name


class Lanes:
    """The weights of L lanes, what is masked or was never seen taken out of them once and for all."""

    def __init__(self, contents: Contents):
        """Arranges the weights of a model's files; sums are made in float64."""
        w = {k: v.astype(np.float64) for k, v in contents.weights.items()}
        self.statistics = {
            k.removeprefix("statistics/"): v for k, v in w.items() if k.startswith("statistics/")
        }
        self.final = w["final"]
        self.hidden: int = contents.facts["config"]["hidden"]
        mask = mask_of(contents.facts["config"]).astype(float)
        self.gate, self.seen = mask[:-1], self.statistics["missing"] < 1  # [A], [L, A]
        self.base_scale = w["params/base_scale"]  # [L, 2]
        key = self.statistics["word_key"][0]  # [K, V], of every lane
        self.words = [np.flatnonzero(of_key) for of_key in key]
        embeddings = (self.statistics[f"{kind}_mean"].shape[1] for kind in ("text", "image"))
        self.sizes = (key.shape[1], *embeddings)  # words, numbers of a text's and of an image's embedding
        self._set_network(w, mask[-1])

    def _set_network(self, w: dict[str, np.ndarray], embeddings: float) -> None:
        """`weights` [L, q, c, 2], `offset` [L, q, 2] and those of the hidden layer, gates multiplied in."""
        s, gate = self.statistics, self.gate
        lanes, q, c, _ = w["params/query_weights"].shape
        of_query = np.full(q, embeddings)
        of_query[: 1 + s["word_key"].shape[2]] = 1
        of_candidate = np.full((lanes, c), embeddings)
        of_candidate[:, : 2 * len(gate)] = np.concatenate([gate, gate])
        if len(self.words):  # matches come last; one that never varies has an infinite scale
            of_candidate[:, -2 * len(self.words) :] *= _inverse(s["match_scale"])
        self.weights = w["params/query_weights"] * of_query[:, None, None] * of_candidate[:, None, :, None]
        self.offset = w["params/query_offset"] * of_query[:, None]
        self.offset[:, 0] += w["params/bias"]  # a query's first feature is the constant 1
        if self.hidden:
            self.query_hidden = w["params/query_hidden"] * of_query[:, None]
            self.candidate_hidden = w["params/candidate_hidden"] * of_candidate[:, :, None]
            self.heads = w["params/heads"]


def _query(graph: Graph, lanes: Lanes, inputs: dict[str, Tensor]) -> Tensor:
    """[L, 1, q] the query as each lane sees it: a constant, what is wanted, components of its text."""
    s = lanes.statistics
    one = np.ones((len(lanes.final), 1, 1))
    parts = [graph.node("Identity", one)]
    if "wants" in inputs:
        parts.append(inputs["wants"] * one)
    if "text" in inputs and s["text_axes"].shape[2]:
        centred = inputs["text"] - s["text_mean"][:, None]
        parts.append(centred.then("IsNaN").where(0.0, centred) @ s["text_axes"])
    return graph.concat(*parts)


def _attributes(
    graph: Graph, lanes: Lanes, inputs: dict[str, Tensor]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """[L, n, A] standardised values and missing-value indicators, and Step 4's own logits [L, n, 2]."""
    s, seen, domain = lanes.statistics, lanes.seen, inputs["domain"]
    of_domain = lambda table: graph.node("Gather", table.swapaxes(0, 1)[:, :, None], domain, axis=0)
    mean = of_domain(s["mean"])  # [L, 1, A]
    missing = inputs["attributes"].then("IsNaN")
    apart = missing.where(0.0, inputs["attributes"] - mean)
    standard = apart * of_domain(_inverse(s["scale"]) * seen[:, None])
    share, varies = s["missing"][:, None], (seen & (s["missing"] > 0))[:, None]
    indicator = (missing.floats() - share) * varies.astype(float)
    rule, conflict, centre = _base(lanes)
    clash = _logit((apart + mean).take([CONFLICT_PROB]))
    base = apart @ rule + clash * conflict + of_domain(centre)
    return (standard.then("Clip", -WINSOR, WINSOR), indicator), base


def _base(lanes: Lanes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of attributes [L, A, 2] and of the conflict's logit [L, 1, 2]; the rest [L, D + 1, 2]."""
    s, seen, scale = lanes.statistics, lanes.seen, lanes.base_scale
    columns, weights = list(RULE_COLUMNS), np.array(list(RULE.values()))
    rule, conflict = np.zeros((*seen.shape, 2)), np.zeros((len(seen), 1, 2))
    of_rule = weights * lanes.gate[columns] * seen[:, columns]
    rule[:, columns, 0] = of_rule * (scale[:, 0] / s["rule_scale"])[:, None]
    known = seen[:, CONFLICT_PROB] * scale[:, 1]
    conflict[:, 0, 1] = known * lanes.gate[CONFLICT_PROB]
    p = np.clip(s["mean"][..., CONFLICT_PROB], *PROBABILITIES)  # [L, D + 1]
    usual = np.log(p / (1 - p))
    at_mean = (s["mean"][..., columns] @ weights - s["rule_mean"][:, None]) / s["rule_scale"][:, None]
    centre = [at_mean * scale[:, :1], usual * (known[:, None] - conflict[:, :, 1])]
    return rule, conflict, np.stack(centre, axis=-1)


def _pictures(graph: Graph, lanes: Lanes, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Components [L, n, p] of the images, and how well they match the wanted words [L, n, 2K]."""
    s = lanes.statistics
    place = np.concatenate([np.array([], int), *lanes.words])
    axes = np.concatenate([s["image_axes"], s["word_axes"][:, place].swapaxes(1, 2)], axis=2)  # [L, d, k]
    count, d, k = axes.shape
    components = s["image_axes"].shape[2]
    if not d or not k:
        return []
    lost = inputs["image"].then("IsNaN")
    there = lost.floats().then("ReduceMax", [-1], keepdims=1)
    offset = np.einsum("ld,ldk->lk", s["image_mean"], axes).ravel()
    flat = lost.where(0.0, inputs["image"]) @ axes.swapaxes(0, 1).reshape(d, count * k) - offset
    flat = flat * (-there + 1.0)
    along = flat.then("Reshape", [0, count, k]).then("Transpose", perm=[1, 0, 2])  # [L, n, k]
    parts = [along.take(np.arange(components))] if components else []
    if len(place):
        parts += _matches(graph, lanes, along.take(np.arange(components, k)), inputs["wants"].take(place))
    return parts


def _matches(graph: Graph, lanes: Lanes, along: Tensor, weight: Tensor) -> list[Tensor]:
    """By key [L, n, K]: how far images lie along the wanted word, and the log of its share.

    `along` [L, n, v] and `weight` [v] are of the words of all keys, one key after the other.
    """
    sizes = [len(words) for words in lanes.words]
    of_key = np.repeat(np.eye(len(sizes)), sizes, axis=0)  # [v, K]
    ends = np.cumsum([0, *sizes])
    shares = [along.take(np.arange(*pair)).then("LogSoftmax", axis=-1)
              for pair in itertools.pairwise(ends)]  # fmt: skip
    # A weight is positive where a word is wanted, and 0 elsewhere.
    return [(along * weight) @ of_key, (graph.concat(*shares) * weight.then("Sign")) @ of_key]


def _network(graph: Graph, lanes: Lanes, asked: Tensor, candidate: Tensor) -> Tensor:
    """[L, n, 2] what is learned, from `asked` [L, 1, q] and `candidate` [L, n, c]."""
    count, q, c, heads = lanes.weights.shape
    mixed = asked @ lanes.weights.reshape(count, q, c * heads)
    logits = candidate @ mixed.then("Reshape", [count, c, heads]) + asked @ lanes.offset
    if not lanes.hidden:
        return logits
    inside = candidate @ lanes.candidate_hidden + asked @ lanes.query_hidden
    return logits + inside.then("Gelu", approximate="tanh") @ lanes.heads


def _conclude(fitted: Calibration, final: np.ndarray, logits: Tensor) -> dict[str, Tensor]:
    """`calibrators.conclude` of logits [L, n, 2], each of its outputs [n]."""
    rank, conflict = logits.take(0), logits.take(1)  # [L, n]
    mean = lambda values: logits.graph.node("MatMul", final / final.sum(), values)
    share = lambda values: values.then("Clip", 0.0, 1.0)
    logit = mean(rank)
    label, each = _calibrated(fitted.rank, logit), _calibrated(fitted.rank, rank)
    apart = each - each.then("ReduceMean", [0], keepdims=1)
    spread = (apart * apart).then("ReduceMean", [0], keepdims=0).then("Sqrt")
    low, high = _along(label, *fitted.intervals)
    return {
        "score": share(label),
        "std": share(spread) if len(final) > 1 else logit * np.nan,
        "low": share(low.then("Min", label)),
        "high": share(high.then("Max", label)),
        "p_conflict": share(_calibrated(fitted.conflict, mean(conflict))),
        "logit": logit,
    }


def _calibrated(fitted: Calibrator, logits: Tensor) -> Tensor:
    """[...] calibrated values."""
    if isinstance(fitted, Isotonic):
        return _along(logits, fitted.knots, fitted.values)[0]
    if isinstance(fitted, Beta):
        up, down = -(-logits).then("Softplus"), logits.then("Softplus")
        return (up * fitted.a + down * fitted.b + fitted.c).then("Sigmoid")
    return (logits * fitted.slope + fitted.offset).then("Sigmoid")


def _along(x: Tensor, knots: tuple[float, ...], *curves: tuple[float, ...]) -> list[Tensor]:
    """Curves of straight lines at x [...], constant outside the knots: `np.interp`."""
    at = np.asarray(knots, np.float32).astype(float)  # as the graph will compare them
    passed = x.then("Unsqueeze", [-1]).then("GreaterOrEqual", at)
    segment = passed.then("Cast", to=x.graph.onnx.TensorProto.INT64).then("ReduceSum", [-1], keepdims=0)
    of_segment = lambda table: x.graph.node("Gather", np.asarray(table, float), segment)
    past = x - of_segment([at[0], *at])
    slopes = lambda values: [0.0, *(np.diff(values) * _inverse(np.diff(at))), 0.0]
    return [of_segment([values[0], *values]) + past * of_segment(slopes(values)) for values in curves]


def _logit(p: Tensor) -> Tensor:
    p = p.then("Clip", *PROBABILITIES)
    return (p / (-p + 1.0)).then("Log")


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values; 0 where they are 0 or infinite."""
    use = np.isfinite(values) & (values != 0)
    return np.where(use, 1 / np.where(use, values, 1), 0.0)
