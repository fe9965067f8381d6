"""A Step 4 run of any size whose truth is known: the generative model, in full.

World. A shoot has a style (one of the domains) and draws a colour word, a glass, garnishes, ice
and a haze (0 transparent, 1 cloudy) from that style's tastes; a share `no_drink_rate` of pictures
shows no drink. Its 1 to `frames` frames are the pictures: they share `canonical_id`, style,
attributes, brightness and background, and differ by a little colour and brightness, by the share
of the picture the drink fills (prominence) and by clutter. True colour is a Lab point, normal
about the word's prototype. A query has a domain, whose tastes it shares, and asks for a colour, a
glass, a garnish and an ice, each with its own probability, at least one.

Encoder. Image and text are coded by the same attributes: soft memberships of the colour words
(softmax of -CIEDE2000 / 8), one-hot glass, garnish, ice and style, subject and exposure, each
group scaled by how well CLIP sees it (`STRENGTH`). The image code carries normal errors of sd
`embedding_noise`, half their variance common to the shoot. A random linear map, fixed by
`encoder_seed` alone, takes codes to D dimensions; an offset per modality and, for images, white
noise of norm `scene_noise` are added, and the sum is normalised. `clip_score` is the cosine:
honest, for it sees all attributes at once, and imperfect, for style, exposure and errors count.

Retrieval. A query's candidates are the pictures of the shared catalogue of highest cosine, after
normal noise of sd `retrieval_noise` on it (an approximate index); so pictures recur across
queries.

Detectors, once per picture. A glass or ice is taken for another with probability e =
`detector_error`, each garnish is missed with probability 2e and each absent one seen with e/4, the
drink is missed with e/4, areas have log-normal errors of sd 2e and haze a normal one of sd 2e.
Confidences are Beta(8, 2) for a detector that is right, Beta(4, 4) for one that is wrong. The
pixels' colour is the true one moved by `pixel_error` times the sum of background leaking in (more
where the drink is small), exposure and normal noise of sd 12.

Step 4. `compliance_score` = presence x plain mean of the credits for colour (a ramp in CIEDE2000),
glass and garnish; ice is ignored. Conflicts follow `RULES` from DETECTED attributes;
`conflict_score` = sum of weight x confidence, weight 1 if strong and 0.5 if soft; `conflict_prob`
and `conflict_calibrated` are two logistic curves in it. `dual_score` = 0.7 compliance_score + 0.3
(1 - conflict_prob) + 0.2 clip_score ("the rule").

Reviewers judge TRUE attributes: compliance = presence x weighted mean (`TASTE_WEIGHT`) of the
credits, a near colour or a glass of the same family earning a part, ice included; plus normal
noise of sd `reviewer_noise`, clipped and rounded to the nearest 0.05. Conflicts follow the same
`RULES` from true attributes; each rule's verdict is flipped with probability `reviewer_error`.

Omissions. `color_delta_e` is absent where no colour is asked for. Each field of `OPTIONAL` is lost
after scoring with probability `missing_rate`, each review absent with probability
`unreviewed_rate`, independently.

Drift. `brightness_shift` and `color_cast` move what cameras record, not what drinks are.

`truth.json` holds the settings, this text and the reachable metrics of five orders by the
reviewer's labels: linear-gain nDCG, ties at their expected value, unreviewed rows left out of the
lists, queries without a review left out, queries without any gain left out of nDCG (both counted).
All come out of the model; none is set.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
from numpy.random import Generator

from cotrr.data.simulated_world import (
    RULES,
    Array,
    Catalogue,
    Drinks,
    Query,
    Simulation,
    clarity_wanted,
    color_difference,
    conflicts_by_rule,
    constraints,
    make_catalogue,
    make_query,
    query_text,
    step4_compliance,
    true_compliance,
)
from cotrr.files import replacing, write_json

OPTIONAL = (
    "subject_ratio", "object_area", "glass_ratio", "garnish_ratio", "ice_ratio", "color_delta_e",
    "brightness", "contrast", "saturation", "conflict_calibrated", "temperature_conflict",
    "clarity_conflict",
)  # fmt: skip
METRICS = ("compliance_at_1", "compliance_at_3", "compliance_at_5", "ndcg_at_10")


def _scores(query: Query, catalogue: Catalogue, index: Array) -> tuple[dict[str, Array], Array]:
    """Numeric fields [n] of the scored lines, rounded as written; the rules broken [n, rules]."""
    seen = Drinks(*(field[index] for field in catalogue.seen))
    confidence, broken = catalogue.confidence[index], conflicts_by_rule(query, seen)
    weight = np.array([1.0 if severity == "strong" else 0.5 for severity in RULES.values()])
    score = np.round((weight * broken * np.round(confidence, 3)).sum(axis=1), 4)
    glass = seen.glass == query.want["glass"] if query.want["glass"] >= 0 else seen.glass >= 0
    garnish, clarity = seen.garnish, clarity_wanted(query)
    garnish = garnish[:, query.want["garnish"]] if query.want["garnish"] >= 0 else garnish.any(axis=1)
    temperature = np.where(broken[:, 4], confidence[:, 4], 1 - confidence[:, 4])
    columns = {name: column[index] for name, column in catalogue.pixels.items()} | {
        "clip_score": np.round(catalogue.embedding[index] @ query.embedding, 6),
        "subject_ratio": seen.prominence,
        "glass_ratio": 0.6 * seen.prominence * glass,
        "garnish_ratio": 0.15 * seen.prominence * garnish,
        "ice_ratio": seen.prominence * np.array([0, 0.3, 0.5, 0.25])[seen.ice],
        "color_delta_e": color_difference(query, seen),
        "compliance_score": step4_compliance(query, seen),
        "conflict_score": score,
        "conflict_prob": 1 / (1 + np.exp(1.5 - 3 * score)),
        "conflict_calibrated": 1 / (1 + np.exp(0.3 - 2.5 * score)),
        "temperature_conflict": temperature if query.want["ice"] >= 0 else np.zeros(len(index)),
        "clarity_conflict": np.abs(seen.haze - clarity) if clarity is not None else np.zeros(len(index)),
    }
    columns = {
        name: column if name == "clip_score" else np.round(column, 4) for name, column in columns.items()
    }
    fused = (
        0.7 * columns["compliance_score"] + 0.3 * (1 - columns["conflict_prob"]) + 0.2 * columns["clip_score"]
    )
    return columns | {"dual_score": np.round(fused, 6)}, broken


class Batch(NamedTuple):
    """One query's scored lines, and what the truth is computed from."""

    rows: list[dict[str, Any]]
    labels: Array  # [n], the reviewer's compliance
    conflict: Array  # [n], the reviewer's verdict
    reviewed: Array  # [n], whether the line tells
    scores: dict[str, Array]  # ranking -> [n], best highest


def _review(simulation: Simulation, rng: Generator, query: Query, true: Drinks) -> tuple[Array, Array]:
    """The reviewer's compliance [n] and broken rules [n, rules]."""
    count = len(true.glass)
    noisy = true_compliance(query, true) + simulation.reviewer_noise * rng.normal(size=count)
    want = query.want
    # A reviewer errs only about what the query is about.
    about = np.array([True, *(index >= 0 for index in want.values()), clarity_wanted(query) is not None])
    flipped = (rng.random((count, len(RULES))) < simulation.reviewer_error) & about
    return np.round(np.clip(noisy, 0, 1) * 20) / 20, conflicts_by_rule(query, true) ^ flipped


def make_batch(simulation: Simulation, catalogue: Catalogue, number: int) -> Batch:
    """Query `number` with its candidates, retrieved, scored and reviewed."""
    # A generator per query: the first queries of a longer run are those of a shorter one.
    rng = np.random.default_rng([simulation.seed, 2, number])
    query = make_query(simulation, rng, number)
    cosine = catalogue.embedding @ query.embedding
    found = cosine + simulation.retrieval_noise * rng.normal(size=len(cosine))
    index = np.argsort(-found, kind="stable")[: simulation.candidates]
    true = Drinks(*(field[index] for field in catalogue.true))
    columns, broken = _scores(query, catalogue, index)
    labels, verdict = _review(simulation, rng, query, true)
    reviewed = rng.random(len(index)) >= simulation.unreviewed_rate
    lost = rng.random((len(index), len(OPTIONAL))) < simulation.missing_rate
    lost[:, OPTIONAL.index("color_delta_e")] |= query.want["color"] < 0
    rows = _rows(query, catalogue, index, columns)
    for row, absent, confidence, rules, label, told, judged in zip(
        rows, lost, catalogue.confidence[index], broken, labels, reviewed, verdict, strict=True
    ):
        for field in np.flatnonzero(absent):
            del row[OPTIONAL[field]]
        row["conflicts"] = _conflicts(rules, confidence)
        if told:
            types = [rule for rule, on in zip(RULES, judged, strict=True) if on]
            row["review"] = {
                "compliance": float(label), "conflict": int(bool(types)), "conflict_types": types,
            }  # fmt: skip
    scores = {
        "reviewer": labels, "noise_free": true_compliance(query, true), "random": 0 * labels,
        "clip_score": columns["clip_score"], "step4_rule": columns["dual_score"],
    }  # fmt: skip
    return Batch(rows, labels, np.asarray(verdict.any(axis=1)), reviewed, scores)


def _truths(batch: Batch) -> list[dict[str, Any]]:
    """The lines of `truth.jsonl`: each candidate's compliance, free of noise."""
    noise_free = batch.scores["noise_free"].tolist()
    return [
        {"query_id": row["query_id"], "id": row["id"], "compliance": round(true, 6)}
        for row, true in zip(batch.rows, noise_free, strict=True)
    ]


def _conflicts(rules: Array, confidence: Array) -> list[dict[str, Any]]:
    """The conflicts of one line."""
    return [
        {"type": rule, "severity": severity, "confidence": round(float(sure), 3)}
        for (rule, severity), on, sure in zip(RULES.items(), rules, confidence, strict=True)
        if on
    ]


def _rows(
    query: Query, catalogue: Catalogue, index: Array, columns: dict[str, Array]
) -> list[dict[str, Any]]:
    """Scored lines without conflicts and reviews."""
    common = {
        "query_id": f"q{query.number:06d}", "query": query_text(query), "domain": query.domain_name,
        "constraints": constraints(query),
        "cluster_id": f"session{query.number // 3:05d}",  # of three queries, independent as they are
    }  # fmt: skip
    text = msgspec.Raw(msgspec.json.encode(query.embedding.tolist()))
    # Beyond these bounds no colour is written, however far a simulated error may lead.
    palette = np.clip(catalogue.seen.lab, (0, -128, -128), (100, 127, 127)).round(2).tolist()
    numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = []
    for picture, values in zip(index.tolist(), numbers, strict=True):
        name, shoot = picture_id(picture), f"shoot{catalogue.shoot[picture]:06d}"
        keys = {
            "id": name,
            "canonical_id": shoot,
            "url": f"https://photos.example/{shoot}/{name}.jpg",
            "palette_lab": [palette[picture]],
        }
        embeddings = {"image_embedding": catalogue.encoded[picture], "text_embedding": text}
        rows.append(common | keys | dict(zip(columns, values, strict=True)) | embeddings)
    return rows


def picture_id(picture: int) -> str:
    """The `id` of the catalogue's picture."""
    return f"p{picture:06d}"


# ---- the truth


def expected_metrics(scores: Array, labels: Array) -> Array:
    """METRICS [4] of one list, expected over the orders of tied scores; nDCG NaN without gain."""
    _, tie = np.unique(-scores, return_inverse=True)
    mean = np.bincount(tie, labels) / np.bincount(tie)
    gains, ideal = mean[np.sort(tie)], -np.sort(-labels)
    discount = 1 / np.log2(np.arange(2, 2 + min(10, len(labels))))
    best = ideal[:10] @ discount
    ndcg = gains[:10] @ discount / best if best > 0 else np.nan
    return np.array([*(gains[:k].mean() for k in (1, 3, 5)), ndcg])


@dataclasses.dataclass
class _Tally:
    """Running sums, so that memory does not grow with the run."""

    sums: dict[str, Array] = dataclasses.field(default_factory=dict)
    rows: int = 0
    reviewed: int = 0
    conflicts: int = 0
    queries: int = 0
    without_review: int = 0
    without_gain: int = 0
    compliance_score: float = 0.0

    def add(self, batch: Batch) -> None:
        """Counts one query."""
        told = batch.reviewed
        self.queries += 1
        self.rows += len(batch.rows)
        self.reviewed += int(told.sum())
        self.conflicts += int(batch.conflict[told].sum())
        self.compliance_score += sum(row["compliance_score"] for row in batch.rows)
        self.without_review += not told.any()
        self.without_gain += bool(told.any() and not batch.labels[told].any())
        if told.any():
            for name, scores in batch.scores.items():
                values = np.nan_to_num(expected_metrics(scores[told], batch.labels[told]))
                self.sums[name] = self.sums.get(name, 0.0) + values

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Ranking -> metric -> mean over queries; None where no query has one."""
        lists = self.queries - self.without_review
        counts = [lists, lists, lists, lists - self.without_gain]
        return {
            ranking: {
                name: float(total / count) if count else None
                for name, total, count in zip(METRICS, sums, counts, strict=True)
            }
            for ranking, sums in self.sums.items()
        }

    def truth(self, simulation: Simulation) -> dict[str, Any]:
        """The content of `truth.json`."""
        return {
            "run_id": simulation.run_id, "model": __doc__,
            "settings": dataclasses.asdict(simulation),
            "rows": self.rows, "reviewed_rows": self.reviewed,
            "conflict_rate": self.conflicts / self.reviewed if self.reviewed else None,
            "queries": self.queries, "queries_without_review": self.without_review,
            "queries_without_gain": self.without_gain, "metrics": self.metrics(),
        }  # fmt: skip


# ---- files


def write_run(
    simulation: Simulation,
    folder: str | pathlib.Path,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes a run folder, manifest last; returns its truth. `progress` gets the queries written.

    Beside the run stand `truth.json` (settings, reachable metrics) and `truth.jsonl` (the true
    compliance of every candidate, to measure regret on any part of the run).

    Memory holds the catalogue and one query: lines and the manifest's ids are written as they come.
    """
    folder = pathlib.Path(folder)
    catalogue, tally = make_catalogue(simulation), _Tally()
    encoder = msgspec.json.Encoder()
    with replacing(folder / "manifest.json") as unfinished, open(unfinished, "wb") as manifest:
        _begin_manifest(simulation, manifest)
        with (
            replacing(folder / "scored.jsonl") as path, open(path, "wb") as lines,
            replacing(folder / "truth.jsonl") as known, open(known, "wb") as truths,
        ):  # fmt: skip
            for number in range(simulation.queries):
                batch = make_batch(simulation, catalogue, number)
                lines.write(encoder.encode_lines(batch.rows))
                truths.write(encoder.encode_lines(_truths(batch)))
                ids = [encoder.encode(f"{row['query_id']}/{row['id']}") for row in batch.rows]
                manifest.write((b",\n" if number else b"") + b",".join(ids))
                tally.add(batch)
                if progress:
                    progress(number + 1)
            # An older run's manifest must not vouch for the new lines.
            (folder / "manifest.json").unlink(missing_ok=True)
        truth = tally.truth(simulation)
        write_json(folder / "truth.json", truth)
        mean = round(tally.compliance_score / tally.rows, 6)
        metrics = {"queries": tally.queries, "scored": tally.rows, "mean_compliance_score": mean}
        manifest.write(b']},\n"metrics":' + encoder.encode(metrics) + b"}\n")
    return truth


def _begin_manifest(simulation: Simulation, manifest: BinaryIO) -> None:
    """Everything but the ids of scored lines and the metrics, which come as lines are written."""
    run_id = simulation.run_id
    head = {
        "manifest_id": f"manifest_{run_id}", "run_id": run_id, "status": "completed",
        "model_version": f"simulated_encoder_{simulation.encoder_seed}", "overlay_version": "none",
        "created_at": simulation.created_at, "embedding_dim": simulation.embedding_dim,
        "scored_path": "scored.jsonl",
    }  # fmt: skip
    manifest.write(msgspec.json.format(msgspec.json.encode(head), indent=1).removesuffix(b"\n}"))
    pictures = msgspec.json.encode([picture_id(picture) for picture in range(simulation.pictures)])
    manifest.write(b',\n"items_by_stage":{"raw_candidates":' + pictures + b',\n"scored":[')
