"""Training as a pure function of (key, hyperparameters, mask): its callers vmap it over lanes.

A *view* is one way to divide the rows: each cross-validation fold, and the final one that learns
from all.  A *lane* is one configuration with one seed, trained on all views at once.  Every lane and
view sees the same batches of queries, so a batch is gathered, and its features are multiplied, once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cotrr.config import check_settings, setting
from cotrr.data.lists import Lists
from cotrr.data.splits import unit_hash
from cotrr.errors import InputError
from cotrr.ranker import losses, model
from cotrr.ranker.features import Features, Gates, Leaf, make_gates, make_mask
from cotrr.ranker.model import Params, Reranker, Scores

OTHERS = np.uint32(2**31)  # folds of a key beyond every epoch's and every member's
WIDE = {"xla_cpu_prefer_vector_width": 512}  # all that a CPU has; other devices ignore it


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each is a flag."""

    seed: int = setting(0, "Seed of parameters, batches and dropout.", low=0, high=2**31)
    folds: int = setting(5, "Cross-validation folds over train and validation together; 0 validates "
                            "on the validation split.", low=0)  # fmt: skip
    members: int = setting(1, "Ensemble members: lanes that differ in their seed.", low=1)
    groups: str = setting("clip,so,conflict", "Feature groups to use.")
    without: str = setting("", "Attributes of these groups to leave out, or `embeddings`.")
    image_components: int = setting(64, "Principal components of the image embeddings.", low=0)
    text_components: int = setting(16, "Principal components of the text embeddings.", low=0)
    image_size: float = setting(0.6, "Root mean square of the image components: smaller, and the "
                                     "penalty holds them tighter.", low=0)  # fmt: skip
    text_size: float = setting(0.3, "Root mean square of the text components.", low=0)
    match_size: float = setting(2.0, "Root mean square of how well an image matches the wanted words.", low=0)
    hidden: int = setting(0, "Width of the hidden layer; 0 leaves it out.", low=0)
    epochs: int = setting(60, "Passes over the queries, at most.", low=1)
    patience: int = setting(30, "Epochs without a lower validation loss before a lane stops.", low=1)
    batch_queries: int = setting(60, "Queries per step.", low=1)
    learning_rate: float = setting(1e-2, "Peak learning rate (Adam, cosine schedule).", low=0)
    penalty: float = setting(0.16, "L2 penalty: this times the sum of squared weights.", low=0)
    dropout: float = setting(0.0, "Dropout of the hidden layer.", low=0, high=0.99)
    bagging: float = setting(0.0, "A member weighs each query by an exponential draw to this power: 1 is the "
                                  "Bayesian bootstrap, 0 weighs all alike.", low=0, high=4)  # fmt: skip
    margin: float = setting(0.0, "Score margin beyond which a pair counts as right.", low=0)
    pair_power: float = setting(0.0, "A pair weighs |Δy| to this power; 0 is plain RankNet.", low=0)
    lambda_power: float = setting(0.0, "A pair weighs its ΔnDCG to this power; 1 is LambdaRank.", low=0)
    ranknet_weight: float = setting(1.0, "Weight of the pairwise loss.", low=0)
    softmax_weight: float = setting(0.0, "Weight of the listwise softmax loss.", low=0)
    pointwise_weight: float = setting(1.0, "Weight of the cross-entropy of the score to y, which "
                                           "makes scores comparable across queries.", low=0)  # fmt: skip
    conflict_weight: float = setting(16.0, "Weight of the conflict head's cross-entropy.", low=0)

    def __post_init__(self) -> None:
        check_settings(self)
        make_mask(names(self.groups), names(self.without))
        if not names(self.groups):
            raise InputError("--groups: name at least one")
        if self.members > 1 and not (self.hidden or self.bagging):
            raise InputError(
                f"--members={self.members}: without --bagging or a --hidden layer nothing is random in a "
                "member, and all would be the same"
            )
        if self.folds == 1:
            raise InputError("--folds=1: expected 0 (the validation split) or at least 2")


def names(text: str) -> tuple[str, ...]:
    """The names in a flag's comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


class Hyperparameters(NamedTuple):
    """The settings that are numbers to a compiled program: lanes may differ in them.

    None where no lane uses one: it is then left out of the program.
    """

    learning_rate: Any
    penalty: Any
    dropout: Any
    bagging: Any
    margin: Any
    pair_power: Any
    lambda_power: Any
    ranknet_weight: Any
    softmax_weight: Any
    pointwise_weight: Any
    conflict_weight: Any
    image_size: Any
    text_size: Any
    match_size: Any


class Lanes(NamedTuple):
    """What V lanes differ in: the three arguments of training, each with a leading axis."""

    key: jax.Array  # [V] of initial parameters and dropout
    hparams: Hyperparameters  # leaves [V]
    mask: Leaf  # [V, A + 1] bool, in the order of features.MASKED


class Views(NamedTuple):
    """Which rows each of F views learns from, and which it is validated on."""

    train: Leaf  # [F, Q, n] bool
    held_out: Leaf  # [F, Q, n] bool; with folds the last view, the final one, holds out nothing


class Examples(NamedTuple):
    """Q lists as F views see them: what training needs of the data."""

    features: Features  # [F, Q, ...] by the view's own statistics
    gap: Leaf  # [F, Q, n] y in the view's deviations of its domain: RankNet's labels
    train: Leaf  # [F, Q, n] bool: rows to learn from
    held_out: Leaf  # [F, Q, n] bool: rows to validate on
    y: Leaf  # [Q, n]
    conflict: Leaf  # [Q, n] 0 or 1, or a probability where silver


# Views differ in these; the labels themselves are shared.
BY_VIEW = Examples(features=0, gap=0, train=0, held_out=0, y=None, conflict=None)  # type: ignore[arg-type]


class State(NamedTuple):
    """Everything that changes while a lane is trained; parameters have a leading axis of F views."""

    key: jax.Array  # [] whatever is random in an epoch is keyed by this and the epoch's number
    params: Params
    optimizer: Any
    best_params: Params  # of the epoch with the lowest mean validation loss
    best: jax.Array  # [] that loss
    best_metric: jax.Array  # [] the mean validation metric of that epoch
    best_epoch: jax.Array  # [] counted from 1


def make_lanes(configs: Sequence[TrainConfig]) -> Lanes:
    """One lane for each member of each config, members of one config side by side."""
    members = [(config, k) for config in configs for k in range(config.members)]
    seed = jax.vmap(jax.random.key)(np.array([config.seed for config, _ in members], np.uint32))
    key = jax.vmap(jax.random.fold_in)(seed, np.array([k for _, k in members], np.uint32))

    def column(name: str) -> np.ndarray | None:
        values = np.array([getattr(config, name) for config, _ in members], np.float32)
        return values if values.any() or name in ("learning_rate", "penalty") else None

    hparams = Hyperparameters(*map(column, Hyperparameters._fields))
    mask = np.stack([make_mask(names(config.groups), names(config.without)) for config, _ in members])
    return Lanes(key, hparams, mask)


def make_views(lists: Lists, canonical_id: np.ndarray, validation: np.ndarray, folds: int) -> Views:
    """Rows by view; `canonical_id` [Q, n] object, `validation` [Q] bool: queries of that split.

    View k of the folds holds out the labelled rows whose query and picture are both in fold k and
    learns from those where neither is (folds go by keyed hashes, like splits); behind them stands
    the final view, which learns from every row.  Without folds the final view is alone and holds out
    the validation split.  Held-out rows are gold where there is any gold: they choose the epoch and
    calibrate, and gold and silver are never judged together.
    """
    labelled = lists.labelled
    judged = labelled & lists.gold if (labelled & lists.gold).any() else labelled
    if not folds:
        return Views((labelled & ~validation[:, None])[None], (judged & validation[:, None])[None])
    fold = lambda kind, ids: (unit_hash(kind, ids, "folds") * folds).astype(int)
    by_query = fold("query_id", lists.query_id)[:, None]
    by_picture = np.full(lists.where.shape, -1)
    by_picture[lists.where] = fold("canonical_id", canonical_id[lists.where])
    by_picture = np.where(_recurs(lists, canonical_id), by_picture, by_query)
    train = [labelled & (by_query != k) & (by_picture != k) for k in range(folds)] + [labelled]
    held_out = [judged & (by_query == k) & (by_picture == k) for k in range(folds)]
    return Views(np.stack(train), np.stack([*held_out, np.zeros_like(labelled)]))


def _recurs(lists: Lists, canonical_id: np.ndarray) -> np.ndarray:
    """[Q, n] bool: pictures of several queries; one of a single query goes where its query goes."""
    query, place = np.nonzero(lists.where)
    _, picture = np.unique(canonical_id[lists.where], return_inverse=True)
    pairs = np.unique(np.stack([picture, query]), axis=1)
    recurs = np.zeros(lists.where.shape, bool)
    recurs[query, place] = (np.bincount(pairs[0]) > 1)[picture]
    return recurs


def make_examples(lists: Lists, features: Features, label_scale: Leaf, views: Views) -> Examples:
    """What training needs of labelled lists; `label_scale` [F, Q] is the deviation of y by query.

    Dividing by it normalises y inside its domain: monotone, so no pair changes its order.
    """
    gap = lists.y / np.asarray(label_scale)[:, :, None]
    return Examples(features, gap, views.train, views.held_out, lists.y, lists.conflict)


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
    data_fields=["examples"],
    meta_fields=["config", "metric", "queries", "mesh"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Train:
    """The pure functions that train one lane; a tree whose leaves are the data."""

    examples: Examples  # with queries behind the last that are not there
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
        batches = self._batches(jnp.resize(order, (self._steps * self._batch,)))
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
        new = _keep_best(
            state._replace(params=params, optimizer=opt_state),
            jnp.nanmean(metrics["validation_loss"]),
            jnp.nanmean(metrics["validation_metric"]),
            number + 1,
        )
        stopped = number - state.best_epoch >= self.config.patience
        metrics = {name: jnp.where(stopped, jnp.nan, values) for name, values in metrics.items()}
        keep = lambda old, new: jax.tree.map(partial(jnp.where, stopped), old, new)
        return State(state.key, *keep(tuple(state)[1:], tuple(new)[1:])), metrics

    @property
    def _network(self) -> Reranker:
        return Reranker(hidden=self.config.hidden)

    @property
    def _batch(self) -> int:
        return min(self.config.batch_queries, self.queries)

    @property
    def _steps(self) -> int:
        return -(-self.queries // self._batch)

    def _batches(self, order: jax.Array) -> jax.Array:
        """[steps, batch] queries; batches are filled up with one that is not there, for the mesh."""
        batches = order.reshape(self._steps, self._batch)
        odd = -self._batch % (1 if self.mesh is None else self.mesh.size)
        return jnp.pad(batches, ((0, 0), (0, odd)), constant_values=self.queries)

    def _take(self, chosen: jax.Array) -> Examples:
        """The examples of some queries, spread over the mesh."""

        def take(axis: int, part: Any) -> Any:
            return jax.tree.map(lambda value: self._spread(jnp.take(value, chosen, axis=axis), axis), part)

        return _by_view(take, self.examples)

    def _weights(self, key: jax.Array, hparams: Hyperparameters) -> jax.Array | None:
        """[Q] what each query counts in a lane: the Bayesian bootstrap (Rubin 1981); None: all alike."""
        if hparams.bagging is None:
            return None
        drawn = jax.random.exponential(jax.random.fold_in(key, OTHERS), (self.queries + 1,))
        return drawn**hparams.bagging

    def _spread(self, value: jax.Array, axis: int) -> jax.Array:
        if self.mesh is None:
            return value
        spec = PartitionSpec(*[None] * axis, self.mesh.axis_names[0])
        return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, spec))

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
        examples = self._take(chosen)

        def one(params: Params, opt_state: Any, key: jax.Array, view: Examples) -> Any:
            gradient, parts = jax.grad(_batch_loss, has_aux=True)(
                params, self._network, key, view, weight, hparams, gates
            )
            updates, opt_state = self._optimizer(hparams).update(gradient, opt_state, params)
            norms = {"gradient_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
            return (optax.apply_updates(params, updates), opt_state), parts | norms

        keys = jax.random.split(key, len(examples.gap))
        return jax.vmap(one, in_axes=(0, 0, 0, BY_VIEW))(*carry, keys, examples)

    def _validate(self, params: Params, hparams: Hyperparameters, gates: Gates) -> dict[str, jax.Array]:
        """[F] mean loss and metric of each view's held-out lists; NaN where nothing is held out."""

        def one(params: Params, example: Examples) -> dict[str, jax.Array]:
            where = example.held_out
            scores: Any = self._network.apply(params, example.features, gates)
            total, _ = list_loss(scores, example, where, hparams)
            value = self.metric(scores.rank, jnp.where(where, example.y, 0.0), where=where)
            return {"loss": jnp.where(jnp.any(where), total, jnp.nan), "metric": value}

        def batch(chosen: jax.Array) -> dict[str, jax.Array]:
            lists = jax.vmap(one, in_axes=(None, 0))
            return jax.vmap(lists, in_axes=(0, BY_VIEW))(params, self._take(chosen))

        order = jnp.pad(jnp.arange(self.queries), (0, self._steps * self._batch - self.queries),
                        constant_values=self.queries)  # fmt: skip
        values = jax.lax.map(batch, self._batches(order))  # [steps, F, batch]
        return {f"validation_{name}": jnp.nanmean(value, axis=(0, 2)) for name, value in values.items()}


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
            padded = np.pad(np.asarray(value), width)
            if mesh is None:
                return jnp.asarray(padded)
            spec = PartitionSpec(*[None] * axis, mesh.axis_names[0])
            return jax.make_array_from_callback(
                padded.shape, NamedSharding(mesh, spec), lambda at: padded[at]
            )

        return jax.tree.map(put, part)

    return Train(_by_view(place, data), config, metric, queries, mesh)


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


def _everywhere(train: Train, tree: Any) -> Any:
    """Parameters and metrics are the same on every device, so that each process can read them."""
    if train.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(train.mesh, PartitionSpec()))


def stopped(state: State, number: int, config: TrainConfig) -> np.ndarray:
    """[V] bool: lanes that are frozen after `number` epochs."""
    return number - np.asarray(state.best_epoch) >= config.patience


def _by_view(function: Callable[[int, Any], Any], examples: Examples) -> Examples:
    """Applies `function(axis of the queries, part)`: behind the views, or in front of all."""
    return Examples(*(function(0 if views is None else 1, part)
                      for views, part in zip(BY_VIEW, examples, strict=True)))  # fmt: skip


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
