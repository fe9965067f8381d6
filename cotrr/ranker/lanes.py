"""What a training run is told: its settings, and the numbers and masks that its lanes differ in."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cotrr.config import check_settings, setting
from cotrr.errors import InputError
from cotrr.ranker.encoding import Leaf, make_mask, names


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

    looked_at: int = setting(1, "How many configurations were compared before this one was chosen: reports "
                                "and cards say so.", low=1)  # fmt: skip

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
    mask: Leaf  # [V, A + 1] bool, in the order of encoding.MASKED


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
