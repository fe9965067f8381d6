"""Training as pure functions: many lanes (folds × members) are one vmapped, compiled program.

All lanes see the same batches of queries; each has its own parameters, its own mask of the rows it
may learn from, and its own held-out rows, which together decide the best epoch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cotrr.config import check_settings, setting
from cotrr.data.lists import Lists
from cotrr.data.splits import unit_hash
from cotrr.errors import InputError
from cotrr.ranker import losses, model
from cotrr.ranker.features import Features, Leaf
from cotrr.ranker.model import Params, Reranker, Scores


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each is a flag."""

    seed: int = setting(0, "Seed of parameters, batches and dropout.", low=0, high=2**31)
    folds: int = setting(5, "Cross-validation folds over train and validation together; 0 validates "
                            "on the validation split.", low=0)  # fmt: skip
    members: int = setting(1, "Ensemble members (and as many lanes per fold).", low=1)
    groups: str = setting("clip,so,conflict", "Feature groups to use.")
    image_components: int = setting(64, "Principal components of the image embeddings.", low=0)
    text_components: int = setting(16, "Principal components of the text embeddings.", low=0)
    image_size: float = setting(0.6, "Root mean square of the image components: smaller, and the "
                                     "penalty holds them tighter.", low=0)  # fmt: skip
    text_size: float = setting(0.1, "Root mean square of the text components.", low=0)
    hidden: int = setting(0, "Width of the hidden layer; 0 leaves it out.", low=0)
    epochs: int = setting(50, "Passes over the queries, at most.", low=1)
    patience: int = setting(50, "Epochs without a lower validation loss before training stops.", low=1)
    batch_queries: int = setting(60, "Queries per step.", low=1)
    learning_rate: float = setting(1e-2, "Peak learning rate (Adam, cosine schedule).", low=0)
    penalty: float = setting(0.01, "L2 penalty: this times the sum of squared weights.", low=0)
    dropout: float = setting(0.0, "Dropout of the hidden layer.", low=0, high=0.99)
    pair_power: float = setting(0.0, "A pair weighs |Δy| to this power; 0 is plain RankNet.", low=0)
    margin: float = setting(0.0, "Score margin beyond which a pair counts as right.", low=0)
    pointwise_weight: float = setting(1.0, "Weight of the cross-entropy of the score to y, which "
                                           "makes scores comparable across queries.", low=0)  # fmt: skip
    conflict_weight: float = setting(0.5, "Weight of the conflict head's cross-entropy.", low=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.folds == 1:
            raise InputError("--folds=1: expected 0 (the validation split) or at least 2")


class Hyperparameters(NamedTuple):
    """The settings that are numbers to a compiled program: lanes may differ in them."""

    learning_rate: jax.Array | float
    penalty: jax.Array | float
    dropout: jax.Array | float
    pair_power: jax.Array | float
    margin: jax.Array | float
    pointwise_weight: jax.Array | float
    conflict_weight: jax.Array | float


class Examples(NamedTuple):
    """Q lists as each of L lanes sees them."""

    features: Features  # [L, Q, ...] by the lane's own statistics
    y: Leaf  # [L, Q, n]
    gap: Leaf  # [L, Q, n] y in the lane's deviations of its domain: RankNet's labels
    conflict: Leaf  # [L, Q, n] 0 or 1, or a probability where silver
    train: Leaf  # [L, Q, n] bool: rows to learn from
    held_out: Leaf  # [L, Q, n] bool: rows to validate on


class Lanes(NamedTuple):
    """Which rows each of L lanes learns from, and which it is validated on."""

    train: Leaf  # [L, Q, n] bool
    held_out: Leaf  # [L, Q, n] bool; a final member with folds holds out nothing
    final: Leaf  # [L] bool: the members whose mean is the score


class State(NamedTuple):
    """Everything that changes during training; parameters have a leading axis of L lanes."""

    params: Params
    optimizer: Any
    best_params: Params  # of the epoch with the lowest mean validation loss
    best: jax.Array  # [] that loss
    best_epoch: jax.Array  # [] counted from 1


def hyperparameters(config: TrainConfig, lanes: int) -> Hyperparameters:
    """A config's numbers, the same for each lane: leaves [L]."""
    return Hyperparameters(*(jnp.full(lanes, getattr(config, name), jnp.float32)
                             for name in Hyperparameters._fields))  # fmt: skip


def make_lanes(lists: Lists, canonical_id: np.ndarray, validation: np.ndarray, config: TrainConfig) -> Lanes:
    """Rows by lane; `canonical_id` [Q, n] object, `validation` [Q] bool: queries of that split.

    With folds, lane k holds out the labelled rows whose query and picture are both in fold k and
    learns from those where neither is (folds go by keyed hashes, like splits); behind them stand
    the final members, which learn from every row.  Without folds all lanes are final members and
    hold out the validation split.  Held-out rows are gold where there is any gold: they choose the
    epoch and calibrate, and gold and silver are never judged together.
    """
    labelled = lists.labelled
    judged = labelled & lists.gold if (labelled & lists.gold).any() else labelled
    if not config.folds:
        train, held_out = [labelled & ~validation[:, None]], [judged & validation[:, None]]
    else:
        fold = lambda kind, ids: (unit_hash(kind, ids, "folds") * config.folds).astype(int)
        by_query = fold("query_id", lists.query_id)[:, None]
        by_picture = np.full(lists.where.shape, -1)
        by_picture[lists.where] = fold("canonical_id", canonical_id[lists.where])
        folds = range(config.folds)
        train = [labelled & (by_query != k) & (by_picture != k) for k in folds] + [labelled]
        held_out = [judged & (by_query == k) & (by_picture == k) for k in folds]
        held_out += [np.zeros_like(labelled)]
    final = np.arange(len(train)) == len(train) - 1
    return Lanes(*(np.repeat(np.stack(part), config.members, axis=0)
                   for part in (train, held_out, final)))  # fmt: skip


def list_loss(
    scores: Scores, example: Examples, where: jax.Array, hparams: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of one list and its parts; `where` [n] are the rows to learn from."""
    label = lambda values: jnp.where(where, values, 0.0)
    conflict = where & ~jnp.isnan(example.conflict)
    parts = {
        "ranknet": losses.ranknet(
            scores.rank, label(example.gap), where=where, margin=hparams.margin, power=hparams.pair_power
        ),
        "pointwise": losses.cross_entropy(scores.rank, label(example.y), where=where),
        "conflict": losses.cross_entropy(
            scores.conflict, jnp.where(conflict, example.conflict, 0.0), where=conflict
        ),
    }
    total = (
        parts["ranknet"]
        + hparams.pointwise_weight * parts["pointwise"]
        + hparams.conflict_weight * parts["conflict"]
    )
    return total, parts | {"total": total}


class Trainer(NamedTuple):
    """The two pure functions of a training run."""

    init: Callable[[jax.Array], State]
    epoch: Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]  # jitted


def make_train(
    config: TrainConfig, examples: Examples, hparams: Hyperparameters, metric: Callable[..., jax.Array]
) -> Trainer:
    """Does the static work; returns `init(key) → State` and `epoch(state, key, number) → …`.

    `metric(scores [n], y [n], where=[n])` is logged for held-out lists (NaN: the list does not
    count); their mean loss decides which epoch is best, being the steadier of the two.  `key` stays
    the same for the whole run: whatever is random in an epoch is keyed by its number, so that a
    resumed run goes on exactly as it would have.  Metrics are [L] arrays by name.
    """
    network = Reranker(hidden=config.hidden)
    count, queries = examples.y.shape[:2]
    batch = min(config.batch_queries, queries)
    steps = -(-queries // batch)
    optimizer = partial(_optimizer, total_steps=steps * config.epochs)
    step = partial(_step, network, optimizer)

    @jax.jit
    def init(key: jax.Array) -> State:
        def one(key: jax.Array, hparams: Hyperparameters, first: Features) -> tuple[Params, Any]:
            params = network.init(key, first)
            return params, optimizer(hparams).init(params)

        first = jax.tree.map(lambda value: value[:, 0], examples.features)
        keys = jax.random.split(jax.random.fold_in(key, 0), count)
        params, opt_state = jax.vmap(one)(keys, hparams, first)
        return State(params, opt_state, params, jnp.float32(jnp.inf), jnp.int32(0))

    @jax.jit
    def run_epoch(
        state: State, key: jax.Array, number: jax.Array, examples: Examples, hparams: Hyperparameters
    ) -> tuple[State, dict[str, jax.Array]]:
        order_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), number))
        # Where the batches do not divide the queries, the first few of the order come twice.
        order = jnp.resize(jax.random.permutation(order_key, queries), (steps, batch))

        def one(carry: tuple[Params, Any], at: tuple[jax.Array, jax.Array]) -> Any:
            chosen, key = at
            taken = jax.tree.map(lambda value: value[:, chosen], examples)
            keys = jax.random.split(key, count)
            params, opt_state, metrics = jax.vmap(step)(*carry, keys, taken, hparams)
            return (params, opt_state), metrics

        begun = state.params, state.optimizer
        (params, opt_state), metrics = jax.lax.scan(one, begun, (order, jax.random.split(drop_key, steps)))
        metrics = {name: jnp.mean(values, axis=0) for name, values in metrics.items()}
        metrics |= jax.vmap(partial(_validate, network, metric))(params, examples, hparams)
        state = state._replace(params=params, optimizer=opt_state)
        return _keep_best(state, jnp.nanmean(metrics["validation_loss"]), number + 1), metrics

    # The data are arguments of the program, not constants in it: it compiles in a fifth of the time.
    data = jax.tree.map(jnp.asarray, (examples, hparams))
    return Trainer(init, lambda state, key, number: run_epoch(state, key, number, *data))


def _optimizer(hparams: Hyperparameters, total_steps: int) -> optax.GradientTransformation:
    warmup = max(total_steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(total_steps, 2), 0.02)
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.scale_by_adam(b2=0.99),
        optax.scale_by_learning_rate(lambda step: hparams.learning_rate * schedule(step)),
    )


def _batch_loss(
    params: Params, network: Reranker, key: jax.Array, examples: Examples, hparams: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One lane's loss: mean over the queries that it learns from, plus the penalty."""

    def one(key: jax.Array, example: Examples) -> Any:
        scores = network.apply(params, example.features, hparams.dropout, rngs={"dropout": key})
        return list_loss(scores, example, example.train, hparams)

    _, parts = jax.vmap(one)(jax.random.split(key, len(examples.y)), examples)
    learned = jnp.any(examples.train, axis=1).astype(jnp.float32)
    parts = {name: losses.masked_mean(part, learned) for name, part in parts.items()}
    parts["penalty"] = hparams.penalty * model.squared_norm(params)
    parts["total"] = parts["total"] + parts["penalty"]
    return parts["total"], parts


def _step(
    network: Reranker,
    optimizer: Callable[[Hyperparameters], optax.GradientTransformation],
    params: Params,
    opt_state: Any,
    key: jax.Array,
    examples: Examples,
    hparams: Hyperparameters,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """One optimiser step of one lane."""
    gradient, parts = jax.grad(_batch_loss, has_aux=True)(params, network, key, examples, hparams)
    updates, opt_state = optimizer(hparams).update(gradient, opt_state, params)
    norms = {"gradient_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
    return optax.apply_updates(params, updates), opt_state, parts | norms


def _validate(
    network: Reranker,
    metric: Callable[..., jax.Array],
    params: Params,
    examples: Examples,
    hparams: Hyperparameters,
) -> dict[str, jax.Array]:
    """One lane's mean loss and metric on its held-out lists; NaN where nothing is held out."""

    def one(example: Examples) -> tuple[jax.Array, jax.Array]:
        where = example.held_out
        scores: Any = network.apply(params, example.features)
        total, _ = list_loss(scores, example, where, hparams)
        return total, metric(scores.rank, jnp.where(where, example.y, 0.0), where=where)

    total, value = jax.vmap(one)(examples)
    held = jnp.any(examples.held_out, axis=1)
    loss = jnp.sum(jnp.where(held, total, 0.0)) / jnp.sum(held)
    return {"validation_loss": loss, "validation_metric": jnp.nanmean(value)}


def _keep_best(state: State, value: jax.Array, epoch: jax.Array) -> State:
    """One epoch is chosen for all lanes: the mean over folds is steadier than each alone."""
    better = value < state.best
    keep = lambda new, old: jax.tree.map(partial(jnp.where, better), new, old)
    return state._replace(
        best_params=keep(state.params, state.best_params),
        best=jnp.where(better, value, state.best),
        best_epoch=jnp.where(better, epoch, state.best_epoch),
    )


def make_examples(lists: Lists, features: Features, label_scale: Leaf, lanes: Lanes) -> Examples:
    """What the trainer needs of labelled lists; `label_scale` [L, Q] is the deviation of y by query.

    Dividing by it normalises y inside its domain: monotone, so no pair changes its order.
    """
    every_lane = lambda values: np.broadcast_to(values, lanes.train.shape)
    gap = lists.y / np.asarray(label_scale)[:, :, None]
    return Examples(features, every_lane(lists.y), gap, every_lane(lists.conflict),
                    lanes.train, lanes.held_out)  # fmt: skip
