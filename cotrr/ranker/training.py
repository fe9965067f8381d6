"""Training as a pure function of (key, hyperparameters, mask): its callers vmap it over lanes.

A *view* is one way to divide the rows: each cross-validation fold, and the final one that learns
from all.  A *lane* is one configuration with one seed, trained on all views at once.  Every lane and
view sees the same batches of queries, so a batch is gathered, and its features are multiplied, once.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cotrr.compilation import WIDE
from cotrr.ranker import losses, model
from cotrr.ranker.features import Features, Gates, make_gates
from cotrr.ranker.lanes import Hyperparameters, Lanes, TrainConfig
from cotrr.ranker.model import Params, Reranker, Scores
from cotrr.ranker.views import Examples, by_view

OTHERS = np.uint32(2**31)  # folds of a key beyond every epoch's and every member's


class State(NamedTuple):
    """Everything that changes while a lane is trained; parameters have a leading axis of F views."""

    key: jax.Array  # [] whatever is random in an epoch is keyed by this and the epoch's number
    params: Params
    optimizer: Any
    best_params: Params  # of the epoch with the lowest mean validation loss
    best: jax.Array  # [] that loss
    best_metric: jax.Array  # [] the mean validation metric of that epoch
    best_epoch: jax.Array  # [] counted from 1


def list_loss(
    scores: Scores, example: Examples, where: jax.Array, hparams: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of one list and its parts; `where` [n] are the rows to learn from."""
    label = lambda values: jnp.where(where, values, 0.0)
    conflict = where & ~jnp.isnan(example.conflict)
    pairs = partial(losses.ranknet, margin=hparams.margin, power=hparams.pair_power,
                    lambda_power=hparams.lambda_power)  # fmt: skip
    kinds: dict[str, tuple[Any, Callable[[], jax.Array]]] = {
        "ranknet": (hparams.ranknet_weight, lambda: pairs(scores.rank, label(example.gap), where=where)),
        "softmax": (hparams.softmax_weight,
                    lambda: losses.softmax(scores.rank, label(example.y), where=where)),
        "pointwise": (hparams.pointwise_weight,
                      lambda: losses.cross_entropy(scores.rank, label(example.y), where=where)),
        "conflict": (hparams.conflict_weight,
                     lambda: losses.cross_entropy(scores.conflict, example.conflict, where=conflict)),
    }  # fmt: skip
    parts = {name: loss() for name, (weight, loss) in kinds.items() if weight is not None}
    total = sum((kinds[name][0] * part for name, part in parts.items()), start=jnp.float32(0))
    return total, parts | {"total": total}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["examples", "judged"],
    meta_fields=["config", "metric", "queries", "mesh"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Train:
    """The pure functions that train one lane; a tree whose leaves are the data."""

    examples: Examples  # with queries behind the last that are not there
    judged: jax.Array  # [F, J] the queries of which a view holds rows out, filled up with one of those
    config: TrainConfig  # its fixed settings: what lanes may differ in comes as an argument
    metric: Callable[..., jax.Array]
    queries: int
    mesh: Mesh | None

    def __call__(
        self, key: jax.Array, hparams: Hyperparameters, mask: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        """Trains one lane to the end; metrics are [epochs, F] arrays by name."""
        step = lambda state, number: self.epoch(state, number, hparams, mask)
        return jax.lax.scan(step, self.init(key, hparams, mask), jnp.arange(self.config.epochs))

    def init(self, key: jax.Array, hparams: Hyperparameters, mask: jax.Array) -> State:
        """The state before the first epoch."""
        init_key, key = jax.random.split(key)

        def one(key: jax.Array, first: Features) -> tuple[Params, Any]:
            params = self._network.init(key, first, _gates(hparams, mask))
            return params, self._optimizer(hparams).init(params)

        first = jax.tree.map(lambda value: value[:, 0], self.examples.features)
        params, opt_state = jax.vmap(one)(jax.random.split(init_key, len(first.wants)), first)
        return State(key, params, opt_state, params, jnp.float32(jnp.inf), jnp.float32(jnp.nan), jnp.int32(0))

    def epoch(
        self, state: State, number: jax.Array, hparams: Hyperparameters, mask: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        """One pass over the queries, in an order that all lanes share; metrics are [F] by name.

        `metric(scores [n], y [n], where=[n])` is logged for held-out lists (NaN: the list does not
        count); their mean loss decides which epoch is best, being the steadier of the two.  A lane
        without a better epoch for `patience` of them is frozen: its metrics are NaN.  `broken_step`
        is the first step whose loss was not finite, or -1.
        """
        order = query_order(self.config.seed, number, self.queries)
        # Where the batches do not divide the queries, the first few of the order come twice.
        batches = self._batches(jnp.resize(order, (self._steps * self._batch,)), self._batch)
        epoch_key, gates = jax.random.fold_in(state.key, number), _gates(hparams, mask)
        weights = self._weights(state.key, hparams)

        def step(carry: tuple[Params, Any], at: tuple[jax.Array, jax.Array]) -> Any:
            chosen, count = at
            key = jax.random.fold_in(epoch_key, count)
            weight = jnp.ones(len(chosen)) if weights is None else weights[chosen]
            return self._step(carry, chosen, weight, key, hparams, gates)

        numbered = batches, jnp.arange(self._steps)
        (params, opt_state), metrics = jax.lax.scan(step, (state.params, state.optimizer), numbered)
        broken = ~jnp.isfinite(metrics["total"])
        metrics = {name: jnp.mean(values, axis=0) for name, values in metrics.items()}
        metrics["broken_step"] = jnp.where(jnp.any(broken, axis=0), jnp.argmax(broken, axis=0), -1)
        metrics |= self._validate(params, hparams, gates)
        # A view that broke must not drop out of the mean: it may have been the hardest.
        validated = jnp.any(self.examples.held_out, axis=(1, 2))
        loss = jnp.mean(metrics["validation_loss"], where=validated)
        loss = jnp.where(jnp.any(broken), jnp.nan, loss)
        new = _keep_best(
            state._replace(params=params, optimizer=opt_state),
            loss,
            jnp.nanmean(metrics["validation_metric"]),
            number + 1,
        )
        over = stopped(state, number, self.config)
        metrics = {name: jnp.where(over, jnp.nan, values) for name, values in metrics.items()}
        keep = lambda old, new: jax.tree.map(partial(jnp.where, over), old, new)
        return State(state.key, *keep(tuple(state)[1:], tuple(new)[1:])), metrics

    def judge(self, state: State, hparams: Hyperparameters, mask: jax.Array) -> jax.Array:
        """[Q] the metric of held-out rows by the mean score of lanes [M, ...] in their best epochs.

        NaN where nothing of a query is held out.
        """

        def rank(params: Params, hparams: Hyperparameters, mask: jax.Array, features: Features) -> jax.Array:
            """Of a lane [F, ...] and a batch [F, B, ...]."""
            one = lambda params, features: self._network.apply(params, features, _gates(hparams, mask)).rank
            return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(params, features)

        def batch(chosen: jax.Array) -> jax.Array:
            examples = self._take(chosen)
            lanes = jax.vmap(rank, in_axes=(0, 0, 0, None))
            scores = lanes(state.best_params, hparams, mask, examples.features).mean(axis=0)
            lists = jax.vmap(jax.vmap(self._metric))
            return lists(scores, examples)

        batches = self._judged_batches
        nowhere = jnp.full(len(self.examples.y), jnp.nan)
        return nowhere.at[batches].set(jax.lax.map(batch, batches))[: self.queries]

    @property
    def _network(self) -> Reranker:
        return Reranker(hidden=self.config.hidden)

    @property
    def _batch(self) -> int:
        return min(self.config.batch_queries, self.queries)

    @property
    def _steps(self) -> int:
        return -(-self.queries // self._batch)

    @property
    def _judged_batches(self) -> jax.Array:
        """[steps, F, B] the queries that each view is judged by."""
        return self._batches(self.judged, min(self._batch, self.judged.shape[1]))

    def _batches(self, order: jax.Array, size: int) -> jax.Array:
        """[steps, ..., size] of queries [..., Q]; filled up with one that is not there, for the mesh too."""
        count = order.shape[-1]
        fill = lambda values, odd: jnp.pad(
            values, [(0, 0)] * (values.ndim - 1) + [(0, odd)], constant_values=self.queries
        )
        batches = fill(order, -count % size).reshape(*order.shape[:-1], -1, size)
        return fill(jnp.moveaxis(batches, -2, 0), -size % (1 if self.mesh is None else self.mesh.size))

    def _take(self, chosen: jax.Array) -> Examples:
        """The examples [F, B, ...] of queries that each view chooses, spread over the mesh."""

        def take(axis: int, part: Any) -> Any:
            one = lambda chosen, value: jnp.take(value, chosen, axis=0)
            by_view = jax.vmap(one, in_axes=(0, 0 if axis else None))
            return jax.tree.map(lambda value: self._spread(by_view(chosen, value), 1), part)

        return by_view(take, self.examples)

    def _weights(self, key: jax.Array, hparams: Hyperparameters) -> jax.Array | None:
        """[Q] what each query counts in a lane: the Bayesian bootstrap (Rubin 1981); None: all alike."""
        if hparams.bagging is None:
            return None
        drawn = jax.random.exponential(jax.random.fold_in(key, OTHERS), (self.queries + 1,))
        return drawn**hparams.bagging

    def _spread(self, value: jax.Array, axis: int) -> jax.Array:
        if self.mesh is None:
            return value
        return jax.lax.with_sharding_constraint(value, _by_queries(self.mesh, axis))

    def _optimizer(self, hparams: Hyperparameters) -> optax.GradientTransformation:
        total = self._steps * self.config.epochs
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(total // 20, 1), max(total, 2), 0.02)
        return optax.chain(
            optax.clip_by_global_norm(5.0),
            optax.scale_by_adam(b2=0.99),
            optax.scale_by_learning_rate(lambda step: hparams.learning_rate * schedule(step)),
        )

    def _step(
        self,
        carry: tuple[Params, Any],
        chosen: jax.Array,
        weight: jax.Array,
        key: jax.Array,
        hparams: Hyperparameters,
        gates: Gates,
    ) -> tuple[tuple[Params, Any], dict[str, jax.Array]]:
        """One optimiser step on all views of a lane."""
        examples = self._take(jnp.broadcast_to(chosen, (len(self.judged), len(chosen))))

        def one(params: Params, opt_state: Any, key: jax.Array, view: Examples) -> Any:
            gradient, parts = jax.grad(_batch_loss, has_aux=True)(
                params, self._network, key, view, weight, hparams, gates
            )
            updates, opt_state = self._optimizer(hparams).update(gradient, opt_state, params)
            norms = {"gradient_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
            return (optax.apply_updates(params, updates), opt_state), parts | norms

        keys = jax.random.split(key, len(examples.gap))
        return jax.vmap(one)(*carry, keys, examples)

    def _validate(self, params: Params, hparams: Hyperparameters, gates: Gates) -> dict[str, jax.Array]:
        """[F] mean loss and metric of each view's held-out lists; NaN where nothing is held out."""

        def one(params: Params, example: Examples) -> dict[str, jax.Array]:
            scores: Any = self._network.apply(params, example.features, gates)
            total, _ = list_loss(scores, example, example.held_out, hparams)
            loss = jnp.where(jnp.any(example.held_out), total, jnp.nan)
            return {"loss": loss, "metric": self._metric(scores.rank, example)}

        def batch(chosen: jax.Array) -> dict[str, jax.Array]:
            return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(params, self._take(chosen))

        values = jax.lax.map(batch, self._judged_batches)  # [steps, F, B]
        return {f"validation_{name}": jnp.nanmean(value, axis=(0, 2)) for name, value in values.items()}

    def _metric(self, scores: jax.Array, example: Examples) -> jax.Array:
        """That of one list's held-out rows."""
        where = example.held_out
        return self.metric(scores, jnp.where(where, example.y, 0.0), where=where)


def query_order(seed: int, number: jax.Array | int, queries: int) -> jax.Array:
    """[Q] the order in which epoch `number` takes the queries, the same for every lane."""
    # Members' keys are folds of the same seed: the orders' lie elsewhere.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), OTHERS), number)
    return jax.random.permutation(key, queries)


def make_train(
    config: TrainConfig, data: Examples, metric: Callable[..., jax.Array], mesh: Mesh | None = None
) -> Train:
    """`train(key, hparams, mask) → (State, metrics)` of one lane, and its parts; callers vmap.

    `data` are padded with queries that are not there and spread over the mesh, by queries.
    """
    queries = len(data.y)
    parts = 1 if mesh is None else mesh.size
    extra = parts - queries % parts

    def place(axis: int, part: Any) -> Any:
        def put(value: Any) -> jax.Array:
            width = [(0, extra if i == axis else 0) for i in range(np.ndim(value))]
            return _put(np.pad(np.asarray(value), width), None if mesh is None else _by_queries(mesh, axis))

        return jax.tree.map(put, part)

    return Train(by_view(place, data), _judged(data.held_out, mesh), config, metric, queries, mesh)


def _judged(held_out: Any, mesh: Mesh | None) -> jax.Array:
    """[F, J] the queries of which each view holds out rows [F, Q, n]; Q where they are fewer than J."""
    queries = [np.flatnonzero(rows.any(axis=1)) for rows in np.asarray(held_out)]
    judged = np.full((len(queries), max(1, *map(len, queries))), held_out.shape[1], np.int32)
    for places, found in zip(judged, queries, strict=True):
        places[: len(found)] = found
    return _put(judged, None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _put(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """The array on the devices, each process giving the parts of its own."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


@partial(jax.jit, compiler_options=WIDE)
def init_lanes(train: Train, lanes: Lanes) -> State:
    """The states [V, ...] of lanes before the first epoch."""
    return _everywhere(train, jax.vmap(train.init)(*lanes))


@partial(jax.jit, compiler_options=WIDE)
def run_epoch(
    train: Train, state: State, number: jax.Array, lanes: Lanes
) -> tuple[State, dict[str, jax.Array]]:
    """One epoch of all lanes: states [V, ...] and metrics [V, F] by name."""
    step = jax.vmap(train.epoch, in_axes=(0, None, 0, 0))
    return _everywhere(train, step(state, number, lanes.hparams, lanes.mask))


def run_epochs(train: Train, state: State, lanes: Lanes, first: int, last: int) -> State:
    """Epochs first + 1, …, last of all lanes, or fewer where every lane has stopped."""
    for number in range(first, last):
        if stopped(state, number, train.config).all():
            break
        state, _ = run_epoch(train, state, jnp.asarray(number), lanes)
    return state


@partial(jax.jit, static_argnames="members", compiler_options=WIDE)
def judge_lanes(train: Train, state: State, lanes: Lanes, members: int) -> jax.Array:
    """[C, Q] metrics of held-out rows by configurations of so many lanes each, in their best epochs."""
    by_config = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(-1, members, *leaf.shape[1:]), tree)
    judged = jax.vmap(train.judge)(*map(by_config, (state, lanes.hparams, lanes.mask)))
    return _everywhere(train, judged)


def _by_queries(mesh: Mesh, axis: int) -> NamedSharding:
    """Parts of equal size along `axis`, where the queries are."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]))


def _everywhere(train: Train, tree: Any) -> Any:
    """Parameters and metrics are the same on every device, so that each process can read them."""
    if train.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(train.mesh, PartitionSpec()))


def stopped(state: State, number: jax.Array | int, config: TrainConfig) -> jax.Array:
    """[...] bool: lanes that are frozen after `number` epochs."""
    return number - state.best_epoch >= config.patience


def _gates(hparams: Hyperparameters, mask: jax.Array) -> Gates:
    sizes = hparams.image_size, hparams.text_size, hparams.match_size
    return make_gates(mask, *(0.0 if size is None else size for size in sizes))


def _batch_loss(
    params: Params,
    network: Reranker,
    key: jax.Array,
    view: Examples,
    weight: jax.Array,
    hparams: Hyperparameters,
    gates: Gates,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss, under `weight` [B], over the queries that one view learns from, plus the penalty."""

    def one(key: jax.Array, example: Examples) -> Any:
        drop = {} if hparams.dropout is None else {"dropout": hparams.dropout, "rngs": {"dropout": key}}
        scores: Any = network.apply(params, example.features, gates, **drop)
        return list_loss(scores, example, example.train, hparams)

    _, parts = jax.vmap(one)(jax.random.split(key, len(view.y)), view)
    learned = jnp.any(view.train, axis=1) * weight
    parts = {name: losses.masked_mean(part, learned) for name, part in parts.items()}
    parts["penalty"] = hparams.penalty * model.squared_norm(params)
    parts["total"] = parts["total"] + parts["penalty"]
    return parts["total"], parts


def _keep_best(state: State, loss: jax.Array, metric: jax.Array, epoch: jax.Array) -> State:
    """One epoch is chosen for all views: the mean over folds is steadier than each alone."""
    better = loss < state.best
    keep = lambda new, old: jax.tree.map(partial(jnp.where, better), new, old)
    return state._replace(
        best_params=keep(state.params, state.best_params),
        best=keep(loss, state.best),
        best_metric=keep(metric, state.best_metric),
        best_epoch=keep(epoch, state.best_epoch),
    )
