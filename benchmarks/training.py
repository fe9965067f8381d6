r"""How fast lanes train, beside what one would use instead, in one run on this machine.

    pip install -r benchmarks/requirements.txt torch
    python -m benchmarks.training --output=training.json

Without the peers (a GPU machine, say) `--nopeers` measures our side alone: same file, any device.

A *lane-step* is one step of the optimiser on one batch for one lane, and the validation of as many
lists: in an epoch both sides learn from every list and validate on every list, and its time is divided
by its steps.  "wall" is the clock's time, "core" the processor time of all threads (`process_time`).
Lanes one after another cost what one lane does alone, so one is measured, with a program of its own.
PyTorch's loop has the same network, losses, batches, clipping, schedule and Adam (the fused one), starts
from the same parameters, and must report the same losses and nDCG before it is timed.

Time to a level: 400 queries to learn from and 200 to validate on.  The level is an nDCG@10 of y: what the
worst contender reaches at its best, less .002.  Compilation comes before the first second, and is stated.
Ours and PyTorch's include validation; the trees of `benchmarks/peers.py` (learning rate 0.1, depth 5) are
judged for free, and a round costs its share of the whole fit.

The floor of a lane-step: the operations of its matrix products at the rate of a large product, and its
exponentials and logarithms (one of each for a pair) at the rate of `exp`; or, where that takes longer, the
traffic of parameters, moments and features at the rate of x + 1.  All three rates are measured here.
"""

import functools
import importlib
import itertools
import multiprocessing
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import peers
from cotrr import files
from cotrr.config import launch
from cotrr.evaluate.metrics import log2_discounts, ndcg
from cotrr.ranker import encoding, features, training
from cotrr.ranker.features import Features
from cotrr.ranker.lanes import Lanes, TrainConfig, make_lanes
from cotrr.ranker.training import State, Train
from cotrr.ranker.views import Examples
from experiments.terminal import say

FLAGS = flags.FLAGS
METRIC = functools.partial(ndcg, k=10)
WORDS, TEXT, IMAGE, MATCH, ATTRIBUTES = 20, 16, 64, 6, len(encoding.NAMES)
QUERY, CANDIDATE = 1 + WORDS + TEXT, 2 * ATTRIBUTES + IMAGE + MATCH  # lengths of the network's two inputs
# What lanes differ in besides their seed; the first of all is the recipe's.
VARIED = [
    {"learning_rate": rate, "penalty": penalty, "groups": groups, "without": without}
    for rate, penalty, (groups, without) in itertools.product(
        (0.01, 0.003),
        (0.01, 0.03),
        (("clip,so,conflict", ""), ("so,conflict", ""), ("clip", ""), ("clip,so,conflict", "embeddings")),
    )
]
TREES = range(5, max(peers.TREES) + 1, 5)


class Shape(NamedTuple):
    """The sizes of a program; `queries` are those of a batch."""

    lanes: int = 64
    queries: int = 20
    candidates: int = 60
    hidden: int = 32
    steps: int = 20


class Program(NamedTuple):
    """A compiled epoch of lanes, and the seconds that it and the first state took to compile."""

    shape: Shape
    data: Examples
    train: Train
    lanes: Lanes
    state: State
    epoch: Any
    compile_s: float

    def advance(self, state: State, number: int) -> tuple[State, dict[str, jax.Array]]:
        """One epoch from a state."""
        return self.epoch(self.train, state, jnp.int32(number), self.lanes)


Curve = tuple[np.ndarray, np.ndarray]  # seconds since the start, and the nDCG@10 then
Cost = np.ndarray  # [2] milliseconds: on the clock, and of all threads together


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_bool("peers", True, "Measure PyTorch, LightGBM and XGBoost too.")
    flags.DEFINE_bool("quick", False, "Small sizes.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")


def main() -> None:
    """Measures every task and prints its lines."""
    jax.config.update("jax_enable_compilation_cache", False)
    base, device = Shape(lanes=16, candidates=20, steps=3) if FLAGS.quick else Shape(), jax.devices()[0]
    say(f"{base}, on {device.device_kind}")
    facts: dict[str, Any] = {"device": device.device_kind, "base": base._asdict()}

    def tell(title: str, found: dict[str, Any]) -> None:
        facts[title] = found
        say(f"\n{title}")
        for name, value in found.items():
            say(f"  {name:<40}" + "".join(f"{number:<12.4g}" for number in np.atleast_1d(value)))

    for shape in (base, base._replace(hidden=0)):
        hidden, found = f"hidden {shape.hidden}", against_loops(shape)
        tell(f"{hidden}: ms a lane-step and ratios, wall and core", found)
        tell(f"{hidden}: one program", one_program(shape))
        tell(f"{hidden}: limits of a lane-step", limits(shape, found["lanes together"]))
    tell(f"{'core-' if _cpu() else ''}ms a lane-step by size", growth(base))
    tell("nDCG@10 at best; seconds to the level, to the own best less .002, compiling", time_to_level(base))
    if FLAGS.output:
        files.write_json(FLAGS.output, facts)
        say(f"wrote {FLAGS.output}")


def against_loops(shape: Shape) -> dict[str, Cost]:
    """The cost of a lane-step: lanes in one program, one after another, and in a loop of PyTorch's."""
    together, alone = (prepare(shape._replace(lanes=lanes)) for lanes in (shape.lanes, 1))
    found = {"lanes together": lane_step(together), "one lane": lane_step(alone)}
    if torch := _peer("torch"):
        for lane in (0, shape.lanes - 1):
            check_peer(torch, together, lane)
        loop = TorchLane(torch, together, 0)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"PyTorch, threads: {threads}"] = cost(lambda: loop.epoch(0), 5) / shape.steps
        found["PyTorch"] = np.minimum(found["PyTorch, threads: 1"], found["PyTorch, threads: 2"])
    ratios = {f"{name} / {base}": found[name] / found[base] for base in ("lanes together", "one lane")
              for name in ("one lane", "PyTorch") if name in found and name != base}  # fmt: skip
    return found | ratios


def one_program(shape: Shape) -> dict[str, float]:
    """Compilation, memory and throughput of all lanes in one program; peaks in a fresh process."""
    program = prepare(shape)
    found = {"compilation s": program.compile_s,
             "lists a second, times lanes": 1e3 * shape.queries / lane_step(program)[0],
             "temporary MB": program.epoch.memory_analysis().temp_size_in_bytes / 1e6}  # fmt: skip
    if not _cpu():
        return found | {"peak MB": jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e6}
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        compiling, running = fresh.apply(_peaks, (shape,))
    return found | {"peak MB, compiling": compiling, "peak MB, with three epochs": running}


def limits(shape: Shape, measured: Cost) -> dict[str, float]:
    """How far a lane-step is from the floor that this device's measured rates set."""
    b, n, h = shape.queries, shape.candidates, shape.hidden
    forward = 2 * b * (2 * QUERY * CANDIDATE + 2 * n * CANDIDATE + h * (n * CANDIDATE + QUERY + 2 * n))
    # Once forward, once back to the parameters, once to validate; and back through the heads.
    work = 3 * forward + 4 * b * n * h
    logistic = 2 * b * n * (n - 1 + 4 + h)  # to learn and to validate: pairs, two cross-entropies, gelu
    parameters = 2 * QUERY * (CANDIDATE + 1) + h * (QUERY + CANDIDATE + 2) + 4
    traffic = 4 * (6 * parameters + 2 * b * n * CANDIDATE / shape.lanes)
    gemm, exp, copy = _rates()
    floor = max(work / gemm + logistic / exp, traffic / copy)
    return {"GFLOP/s of a product": gemm / 1e6, "G exp/s": exp / 1e6, "GB/s of x + 1": copy / 1e6,
            "products, ms": work / gemm, "exponentials, ms": logistic / exp, "traffic, ms": traffic / copy,
            "measured, times the floor": _busy(measured) / floor}  # fmt: skip


def growth(base: Shape) -> dict[str, float]:
    """How the cost of a lane-step grows with lanes, with candidates and with queries a batch."""
    sizes = {"lanes": (1, 4, 16, 64, 256), "candidates": (20, 60, 200, 1000), "queries": (20, 60, 240)}
    one = lambda **size: _busy(lane_step(prepare(base._replace(steps=2, **size)), 3))
    return {f"{name} = {size}": one(**{name: size}) for name, values in sizes.items()
            for size in values[: 2 if FLAGS.quick else None]}  # fmt: skip


def time_to_level(base: Shape) -> dict[str, Any]:
    """Seconds until the validation nDCG@10 first reaches the level, and the own best; compilation apart."""
    queries, validation, epochs = (60, 20, 5) if FLAGS.quick else (600, 200, 60)
    data = make_data(queries, base.candidates, validation)
    ours = {f"ours, best of {n}": prepare(base._replace(lanes=n), data, epochs) for n in (1, base.lanes)}
    curves = {name: _our_curve(program) for name, program in ours.items()}
    if torch := _peer("torch"):
        torch.set_num_threads(1)
        loop = TorchLane(torch, ours["ours, best of 1"], 0)
        curves["PyTorch"] = _curve(lambda number: loop.epoch(number)["validation_metric"], epochs)
    for peer in peers.PEERS if FLAGS.peers else ():
        try:
            curves[peer.name] = _tree_curve(peer, data)
        except ImportError as error:
            say(f"{error}: skipped")
    level = min(values.max() for _, values in curves.values()) - 0.002
    first = lambda curve, level: curve[0][np.argmax(curve[1] >= level)]
    found = {name: [curve[1].max(), first(curve, level), first(curve, curve[1].max() - 0.002)]
             for name, curve in curves.items()}  # fmt: skip
    for name, program in ours.items():
        found[name].append(program.compile_s)
    return {"level": level, **found}


def make_data(queries: int, candidates: int, validation: int = 0) -> Examples:
    """Lists as one view sees them, whose y is additive and bilinear in what the model sees, with noise.

    The last `validation` queries are held out; where there are none, every row is learned from and
    validated on.  In place of 384-d embeddings stand their components: all that training gets.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=(1, queries, *shape)).astype(np.float32)
    wants = (rng.uniform(size=(1, queries, 1 + WORDS)) < 0.2).astype(np.float32)
    wants[..., 0] = 1
    missing = (rng.uniform(size=(1, queries, candidates, ATTRIBUTES)) < 0.1).astype(np.float32)
    attributes = np.concatenate([normal(candidates, ATTRIBUTES) * (1 - missing), missing - 0.1], axis=-1)
    where = np.ones((1, queries, candidates), bool)
    seen = Features(
        wants=wants, text=normal(TEXT), image=normal(candidates, IMAGE), match=normal(candidates, MATCH),
        attributes=attributes, rule=normal(candidates, 3) / 2, conflict=normal(candidates),
        centre=normal(2) / 4, where=where,
    )  # fmt: skip
    query = np.concatenate([seen.wants, seen.text], axis=-1)[0]
    candidate = np.concatenate([seen.attributes, seen.image, seen.match], axis=-1)[0]
    law = rng.normal(size=(QUERY, CANDIDATE)) / np.sqrt(32 * CANDIDATE)
    law[0] *= 8  # what holds for every query: trees learn it too
    logit = np.einsum("qa,ac,qnc->qn", query, law, candidate, optimize=True) + seen.rule[0].sum(axis=-1)
    y = (1 / (1 + np.exp(rng.normal(size=logit.shape) - logit))).astype(np.float32)
    conflict = (rng.uniform(size=y.shape) < 0.5 * (1 - y)).astype(np.float32)
    held_out = where & (np.arange(queries) >= queries - (validation or queries))[:, None]
    train = where & ~held_out if validation else where
    return Examples(seen, y[None] / y.std(), train, held_out, y, conflict)


def prepare(shape: Shape, data: Examples | None = None, epochs: int = 60) -> Program:
    """Compiles an epoch of lanes: seeds × learning rates × penalties × masks."""
    copies = -(-shape.lanes // len(VARIED))
    members = copies if shape.hidden else 1  # without a hidden layer seeds would be the same
    fixed = {"folds": 0, "members": members, "hidden": shape.hidden, "epochs": epochs, "patience": epochs,
             "batch_queries": shape.queries}  # fmt: skip
    configs = [TrainConfig(**fixed, **varied) for varied in VARIED * (copies // members)]
    lanes = jax.tree.map(lambda part: part[: shape.lanes], make_lanes(configs))
    data = data or make_data(shape.queries * shape.steps, shape.candidates)
    train = training.make_train(configs[0], data, METRIC)
    jax.clear_caches()
    start = time.perf_counter()
    state = training.init_lanes.lower(train, lanes).compile()(train, lanes)
    epoch = training.run_epoch.lower(train, state, jnp.int32(0), lanes).compile()
    return Program(shape, data, train, lanes, state, epoch, time.perf_counter() - start)


class TorchLane:
    """A plain RankNet loop in PyTorch: the network, losses and schedule of one lane of a program."""

    def __init__(self, torch: Any, program: Program, lane: int) -> None:
        self.torch, self.config = torch, program.train.config
        of_lane = lambda tree: jax.tree.map(lambda part: np.asarray(part)[lane], tree)
        self.hparams = hparams = jax.tree.map(float, of_lane(program.lanes.hparams))
        sizes = hparams.image_size, hparams.text_size, hparams.match_size
        gates = features.make_gates(of_lane(program.lanes.mask), *sizes)
        seen, _, train, held_out, y, conflict = _only_view(program.data)
        base = jax.vmap(features.base_logits, in_axes=(0, None))(seen, gates)
        tensor = lambda value: torch.tensor(np.asarray(value))
        join = lambda *parts: tensor(np.concatenate(parts, axis=-1).astype(np.float32))
        self.base, self.train, self.held_out, self.y, self.conflict = map(
            tensor, (base, train, held_out, y, conflict)
        )
        self.query = join(seen.wants, seen.text)
        self.candidate = join(seen.attributes, seen.image, seen.match)
        self.query_gate = join(np.ones(1 + WORDS), np.full(TEXT, gates.text))[:, None]
        wide = np.full(IMAGE, gates.image), np.full(MATCH, gates.match)
        self.candidate_gate = join(gates.attributes, gates.attributes, *wide)[:, None]
        self.params = {name: tensor(value[0]).requires_grad_()
                       for name, value in of_lane(program.state.params)["params"].items()}  # fmt: skip
        self.learn, self.judge = (where.any(dim=1).nonzero()[:, 0] for where in (self.train, self.held_out))
        total = -(-len(self.learn) // self.config.batch_queries) * self.config.epochs
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(total // 20, 1), max(total, 2), 0.02)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(total + 1))).tolist()
        rate_at = lambda step: rates[min(step, total)]
        leaves, adam = list(self.params.values()), torch.optim.Adam
        self.optimizer = adam(leaves, hparams.learning_rate, betas=(0.9, 0.99), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate_at)
        self.discounts = tensor(log2_discounts(10))
        orders = [
            training.query_order(self.config.seed, k, len(self.learn)) for k in range(self.config.epochs)
        ]
        self.orders = tensor(np.stack(orders))

    def epoch(self, number: int) -> dict[str, float]:
        """One pass over the lists that are learned from, in our order, and one over those held out."""
        batches = self.learn[self.orders[number]].split(self.config.batch_queries)
        losses = [self.step(at) for at in batches]
        with self.torch.no_grad():
            judged = [self.validate(at) for at in self.judge.split(self.config.batch_queries)]
        loss, value = (float(self.torch.cat(parts).mean()) for parts in zip(*judged, strict=True))
        return {"total": float(np.mean(losses)), "validation_loss": loss, "validation_metric": value}

    def step(self, at: Any) -> float:
        """One step of the optimiser; the loss before it."""
        weights = [value for name, value in self.params.items() if name not in ("base_scale", "bias")]
        penalty = self.hparams.penalty * sum((value**2).sum() for value in weights)
        loss = self.losses(self.scores(at), at, self.train[at]).mean() + penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.params.values(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def scores(self, at: Any) -> Any:
        """[b, n, 2] logits."""
        p, query, candidate = self.params, self.query[at], self.candidate[at]
        weights = p["query_weights"] * self.query_gate[:, None] * self.candidate_gate
        weights = (query @ weights.flatten(1)).unflatten(1, weights.shape[1:])
        logits = candidate @ weights + (query @ (p["query_offset"] * self.query_gate))[:, None]
        if self.config.hidden:
            of_query = query @ (p["query_hidden"] * self.query_gate)
            hidden = candidate @ (p["candidate_hidden"] * self.candidate_gate) + of_query[:, None]
            logits = logits + self.torch.nn.functional.gelu(hidden, approximate="tanh") @ p["heads"]
        return logits + p["bias"] + p["base_scale"] * self.base[at]

    def losses(self, scores: Any, at: Any, where: Any) -> Any:
        """[b] RankNet over the pairs of the [n, n] matrix with y_i > y_j, plus both cross-entropies."""
        (rank, conflict), y, hparams = scores.unbind(dim=-1), self.y[at], self.hparams
        pairs = (y[:, :, None] > y[:, None]) & where[:, :, None] & where[:, None]
        functional = self.torch.nn.functional
        logistic = -functional.logsigmoid(rank[:, :, None] - rank[:, None])
        ranknet = (logistic * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
        entropy = functools.partial(functional.binary_cross_entropy_with_logits, reduction="none")
        mean = lambda values: (values * where).sum(dim=1) / where.sum(dim=1).clamp(min=1)
        return (hparams.ranknet_weight * ranknet + hparams.pointwise_weight * mean(entropy(rank, y))
                + hparams.conflict_weight * mean(entropy(conflict, self.conflict[at])))  # fmt: skip

    def validate(self, at: Any) -> tuple[Any, Any]:
        """[b] loss and nDCG@10 of lists that are held out."""
        scores, where = self.scores(at), self.held_out[at]
        gains = self.y[at] * where
        best = scores[..., 0].masked_fill(~where, -self.torch.inf).topk(10).indices
        reached, ideal = ((part * self.discounts).sum(dim=1)
                          for part in (gains.gather(1, best), gains.topk(10).values))  # fmt: skip
        return self.losses(scores, at, where), reached / ideal


def check_peer(torch: Any, program: Program, lane: int) -> None:
    """Raises AssertionError unless both sides report the same losses and nDCG of two epochs."""
    loop, state = TorchLane(torch, program, lane), program.state
    for number in range(2):
        state, metrics = program.advance(state, number)
        for name, value in loop.epoch(number).items():
            np.testing.assert_allclose(value, metrics[name][lane, 0], rtol=1e-4, err_msg=name)


def cost(work: Callable[[], object], repeat: int = 7) -> Cost:
    """Medians of `repeat` calls, after one that is not counted."""
    work()
    clocks = lambda: np.array([time.perf_counter(), time.process_time()])
    spent = []
    for _ in range(repeat):
        start = clocks()
        work()
        spent.append(1e3 * (clocks() - start))
    return np.median(spent, axis=0)


def lane_step(program: Program, repeat: int = 7) -> Cost:
    """An epoch's cost by lanes and steps."""
    spent = cost(lambda: jax.block_until_ready(program.advance(program.state, 0)), repeat)
    return spent / program.shape.lanes / program.shape.steps


def _curve(advance: Callable[[int], float], rounds: int) -> Curve:
    """The course of training that `advance(number)` goes on with, telling the nDCG@10."""
    start, passed, values = time.perf_counter(), [], []
    for number in range(rounds):
        values.append(advance(number))
        passed.append(time.perf_counter() - start)
    return np.array(passed), np.array(values)


def _our_curve(program: Program) -> Curve:
    """That of the lane which is best at each moment."""
    state = program.state

    def advance(number: int) -> float:
        nonlocal state
        state, metrics = program.advance(state, number)
        return float(np.max(metrics["validation_metric"]))

    return _curve(advance, program.train.config.epochs)


def _tree_curve(peer: peers.Peer, data: Examples) -> Curve:
    """That of boosted trees on the same features."""
    seen, _, train, held_out, y, _ = _only_view(data)
    of_query = np.concatenate([seen.wants, seen.text, seen.centre], axis=-1)[:, None]
    x = np.concatenate([seen.attributes, seen.image, seen.match, seen.rule, seen.conflict[..., None],
                        np.broadcast_to(of_query, (*y.shape, of_query.shape[-1]))], axis=-1)  # fmt: skip
    grade, settings = np.rint(10 * y).astype(int), {"learning_rate": 0.1, "max_depth": 5}

    def fit(queries: int) -> Callable:
        rows = x[:queries].reshape(-1, x.shape[-1])
        return peer.fit(rows, grade[:queries].ravel(), np.full(queries, y.shape[1]), settings)

    fit(2)  # imports the library
    start = time.perf_counter()
    predict = fit(train.any(axis=1).sum())
    share = (time.perf_counter() - start) / max(TREES)
    y, metric = y[held_out.any(axis=1)], jax.jit(jax.vmap(METRIC))
    scores = [predict(x[held_out], trees).reshape(y.shape) for trees in TREES]
    values = [metric(each, y, where=np.ones(y.shape, bool)).mean() for each in scores]
    return share * np.array(TREES), np.array(values)


@functools.cache
def _rates() -> tuple[float, float, float]:
    """Operations, exponentials and bytes a millisecond: of a large product, of `exp`, of x + 1."""
    side, wide, long = (1024, 2**20, 2**20) if _cpu() else (8192, 2**24, 2**27)
    fast = functools.partial(jax.jit, compiler_options=training.WIDE)
    exp = fast(lambda x: sum(jnp.exp(x * k) for k in range(1, 17)))
    rate = lambda work, run, *x: work / _busy(cost(lambda: run(*x).block_until_ready(), 21))
    square = jnp.ones((side, side))
    return (rate(2 * side**3, fast(jnp.matmul), square, square), rate(16 * wide, exp, -jnp.ones(wide)),
            rate(8 * long, fast(lambda x: x + 1), jnp.ones(long)))  # fmt: skip


def _peaks(shape: Shape) -> tuple[float, float]:
    """Megabytes that compilation adds to the peak of this process, and that three epochs do with it."""
    # `getrusage` would start from the parent's peak.
    peak = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024e-6
    data = jax.tree.map(jnp.asarray, make_data(shape.queries * shape.steps, shape.candidates))
    before = peak()
    program = prepare(shape, data)
    compiled, state = peak(), program.state
    for number in range(3):
        state, _ = jax.block_until_ready(program.advance(state, number))
    return compiled - before, peak() - before


def _only_view(data: Examples) -> Examples:
    seen = jax.tree.map(lambda part: part[0], data.features)
    return data._replace(features=seen, gap=data.gap[0], train=data.train[0], held_out=data.held_out[0])


def _peer(name: str) -> Any:
    """A module, or None with a word about it."""
    try:
        return importlib.import_module(name) if FLAGS.peers else None
    except ImportError:
        return say(f"{name} is not installed: skipped")


def _cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _busy(spent: Cost) -> float:
    """What counts: on a CPU the work of all threads, elsewhere the time on the clock."""
    return float(spent[1 if _cpu() else 0])


if __name__ == "__main__":
    launch(main, define_flags)
