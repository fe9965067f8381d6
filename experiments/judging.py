"""What a split is judged by: labels of one kind, for queries and pictures that no model has learned from."""

import pyarrow as pa

from cotrr.data.lists import Lists
from cotrr.errors import InputError
from cotrr.evaluate import scoring
from experiments.terminal import warn


def labelled_lists(table: pa.Table, folder: str, split: str) -> tuple[Lists, str]:
    """The queries with labels of one kind: gold where there is any, else silver; never both."""
    label = scoring.label_of(table["label"].unique().to_pylist())
    lists, left_out = scoring.labelled(table, label)
    check_labelled(lists, left_out, label, folder, split)
    return lists, label


def check_labelled(lists: Lists, left_out: int, label: str, folder: str, split: str) -> None:
    """Tells how many queries of a split are left out; raises InputError where no query has labels."""
    if not len(lists.query_id):
        raise InputError(
            f"the {split} split has no labelled rows",
            file=folder,
            remedy=f"Generate the dataset with a {split} fraction above 0, from a run with reviews",
        )
    if left_out:
        warn(f"{left_out} queries without {label} labels are left out")


def refuse_overlap(who: str, learned: str, folder: str, way_out: str = "") -> None:
    """Raises InputError where `who`, as "a model has learned", did so from what of a split, in words."""
    if learned:
        raise InputError(
            f"{who} from {learned} of this split",
            file=folder,
            remedy=f"Evaluate on data that is new to it{way_out}",
        )
