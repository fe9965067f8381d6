"""What is exported says what the NumPy scorer says, and its sidecar says all that a caller must know."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from cotrr.data.contract import ATTRIBUTES
from cotrr.deploy import jax_export, onnx_model
from cotrr.deploy.registry import Registry
from cotrr.deploy.scorer import Query, Scorer
from cotrr.errors import InputError
from cotrr.ranker import artifact, calibrators, model_files
from cotrr.ranker.calibrators import Beta, Intervals, Isotonic, Platt, Scored
from cotrr.store import open_store
from experiments import export
from tests.deploy.small import single_lane
from tests.ranker.test_artifact import CALIBRATION, LISTS, make_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEEDS = {"onnx": ("onnx", "onnxruntime"), "jax": ("flatbuffers",)}
LARGEST = 1e-5
BARE = LISTS._replace(image=LISTS.image[..., :0], text=LISTS.text[..., :0])


@pytest.fixture(autouse=True)
def few_lists(monkeypatch):
    """Each length is a compilation."""
    monkeypatch.setattr(export, "LISTS", 12)
    monkeypatch.setattr(export, "LENGTHS", (1, 9))


@pytest.fixture(scope="module", params=NEEDS)
def kind(request):
    for package in NEEDS[request.param]:
        pytest.importorskip(package)
    return export.KINDS[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(make_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(kind, folder):
    return contents_of(folder), exported(kind, folder)


def saved(model, folder):
    artifact.save(model, folder)
    return folder


def contents_of(folder):
    return model_files.parse(model_files.read_files(folder), folder)


def exported(kind, folder):
    return kind.runner(kind.build(model_files.read_files(folder), str(folder)))


def largest(contents, run, seed=1):
    """By output, on lists of several lengths of which nothing, a fifth or everything is missing."""
    return {k: v["difference"] for k, v in export.compare(contents, run, seed).items()}


def assert_alike(kind, model, folder):
    contents = contents_of(saved(model, folder))
    assert max(largest(contents, exported(kind, folder)).values()) < LARGEST


@pytest.mark.parametrize("hidden", [0, 4])
def test_it_says_what_the_scorer_says(kind, hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LISTS", 64)
    monkeypatch.setattr(export, "LENGTHS", (1, 2, 20, 100))
    assert_alike(kind, make_model(hidden=hidden), tmp_path)


@pytest.mark.parametrize(
    "calibrator",
    [
        Platt(3.0, 0.5),
        Beta(0.7, 1.8, 0.3),
        Isotonic((-1.5, -0.2, -0.2, 0.4, 1.0), (0.01, 0.3, 0.35, 0.35, 0.99)),
        Isotonic((0.3,), (0.4,)),
    ],
    ids=["platt", "beta", "isotonic", "flat"],
)
def test_calibration_and_intervals_are_inside(kind, calibrator, tmp_path):
    apart = Intervals((0.2, 0.5, 0.8), (0.1, 0.3, 0.6), (0.2, 0.45, 0.7))
    fitted = CALIBRATION._replace(rank=calibrator, conflict=calibrator, intervals=apart)
    assert_alike(kind, make_model(hidden=0)._replace(calibration=fitted), tmp_path)


def test_a_model_without_calibration(kind, tmp_path):
    assert_alike(kind, make_model(hidden=0)._replace(calibration=calibrators.NONE), tmp_path)


@pytest.mark.parametrize("change", [{"groups": "so"}, {"without": "embeddings,conflict_prob,clip_score"}])
def test_what_is_masked_does_not_count(kind, change, tmp_path):
    model = make_model()
    assert_alike(kind, model._replace(config=model.config | change), tmp_path)


def test_a_model_without_embeddings_has_no_such_inputs(kind, tmp_path):
    assert_alike(kind, make_model(lists=BARE), tmp_path)
    assert {*export.sidecar(contents_of(tmp_path))["inputs"]} == {"domain", "wants", "attributes"}


def test_a_single_lane_has_no_spread(kind, tmp_path):
    model = single_lane(make_model())
    assert_alike(kind, model, tmp_path)


def test_nothing_is_known_of_a_query_and_its_candidates(made):
    contents, run = made
    query = Query(np.full(6, np.nan, np.float32), "never seen", ("color=unheard", "odd=1"))
    image, values = np.full((3, 6), np.nan, np.float32), np.full((3, len(ATTRIBUTES)), np.nan, np.float32)
    inputs = export.inputs_of(contents, query, image, values)
    assert inputs["domain"] == len(contents.vocabulary.domains)
    word = contents.vocabulary.constraints.index("color")  # the key is known, the value is not
    assert inputs["wants"][word] == 1 and inputs["wants"].sum() == 1
    found, wanted = run(inputs), Scorer(contents).score(query, image, values)
    for name, value in wanted._asdict().items():
        np.testing.assert_allclose(found[name], value, atol=LARGEST, rtol=0)
        assert found[name].dtype == np.float32


def test_real_lists_in_any_order(made):
    contents, run = made
    for q in range(3):
        query, where = Query(LISTS.text[q], LISTS.domain[q], LISTS.constraints[q]), LISTS.where[q]
        image, values = LISTS.image[q][where], LISTS.attributes[q][where]
        wanted = Scorer(contents).score(query, image, values)
        found = run(export.inputs_of(contents, query, image[::-1], values[::-1]))
        for name, value in wanted._asdict().items():
            np.testing.assert_allclose(found[name][::-1], value, atol=LARGEST, rtol=0)


def test_an_empty_list(kind, made):
    """ONNX gives empty outputs; a symbolic length of jax.export is at least 1."""
    contents, run = made
    query = Query(LISTS.text[0], LISTS.domain[0], LISTS.constraints[0])
    inputs = export.inputs_of(contents, query, LISTS.image[0, :0], LISTS.attributes[0, :0])
    if kind is export.KINDS["jax"]:
        with pytest.raises(ValueError, match="Expected value >= 1"):
            run(inputs)
    else:
        assert {name: value.shape for name, value in run(inputs).items()} == dict.fromkeys(
            Scored._fields, (0,)
        )


def test_the_same_model_gives_the_same_bytes(kind, folder):
    content = model_files.read_files(folder)
    first = kind.build(content, str(folder))
    assert first == kind.build(content, str(folder))
    assert b".py" not in first  # nor does it say in which checkout it was made


def test_differences_are_seen(made):
    contents, run = made

    def off(name, by):
        return lambda inputs: (found := run(inputs)) | {name: found[name] + np.float32(by)}

    for name in Scored._fields:
        assert export.compare(contents, off(name, 1e-4), 0)[name]["unexplained"] > 3e-5, name
        assert export.compare(contents, off(name, np.nan), 0)[name]["unexplained"] == np.inf
    assert max(v["unexplained"] for v in export.compare(contents, run, 0).values()) < LARGEST


def test_what_a_steep_calibrator_makes_of_the_last_bits_is_explained(folder, monkeypatch):
    monkeypatch.setattr(export, "LENGTHS", (100,))
    steep = CALIBRATION._replace(rank=Platt(140.0, 0.0))  # as steep as they are fitted
    contents = contents_of(folder)._replace(calibration=steep)
    scorer, final = Scorer(contents), contents.weights["final"]
    lists = export.random_lists(contents, scorer, 0)

    def rounded(inputs):
        logits = scorer.logits(*next(lists)).astype(float) + 3e-6
        where = np.ones(len(inputs["attributes"]), bool)
        return calibrators.conclude(steep, logits[:, 0], logits[:, 1], final, where)._asdict()

    found = export.compare(contents, rounded, 0)
    assert found["score"]["difference"] > LARGEST
    assert max(output["unexplained"] for output in found.values()) < LARGEST


def test_the_sidecar_names_every_attribute_with_its_unit(folder):
    described = json.loads(json.dumps(export.sidecar(contents_of(folder))))
    assert [each["name"] for each in described["attributes"]] == list(ATTRIBUTES)
    for each in described["attributes"]:
        assert each["unit"] and each["group"] == ATTRIBUTES[each["name"]]
        low, high = each["range"]
        assert low is not None and (high is not None or each["name"] in export.COUNTS)
    ranges = {each["name"]: each["range"] for each in described["attributes"]}
    assert ranges["brightness"] == [0, 1] and ranges["color_delta_e"] == [0, 1e6]
    assert described["vocabulary"]["domains"] == ["d0", "d1"]
    assert described["vocabulary"]["constraints"] == ["color", "color=pink", "glass", "glass=coupe"]
    assert described["inputs"]["domain"]["range"] == [0, 2]
    assert described["embeddings"] == {"text": 6, "image": 6}
    assert described["members"] == {"std": 4, "score": 2}
    assert described["calibration"]["rank"]["kind"] == "platt"
    for each in (*described["inputs"].values(), *described["outputs"].values()):
        assert each["unit"] and each["meaning"] and len(each["range"]) == 2


def test_the_sidecar_and_the_onnx_file_agree(folder):
    for package in NEEDS["onnx"]:
        pytest.importorskip(package)
    import onnxruntime

    session = onnxruntime.InferenceSession(
        onnx_model.build(contents_of(folder)), providers=["CPUExecutionProvider"]
    )
    described = export.sidecar(contents_of(folder))
    types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    for told, there in ((described["inputs"], session.get_inputs()),
                        (described["outputs"], session.get_outputs())):  # fmt: skip
        assert {k: (types[v["dtype"]], list(v["shape"])) for k, v in told.items()} == {
            each.name: (each.type, each.shape) for each in there
        }
    assert session.get_modelmeta().custom_metadata_map == {"model_version": described["model"]["version"]}


def test_the_sidecar_and_the_program_agree(folder):
    pytest.importorskip("flatbuffers")
    program = jax_export.read(jax_export.build(artifact.load(folder)))
    described = export.sidecar(contents_of(folder))
    (given,), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    assert {k: (str(v.dtype), [str(size) for size in v.shape]) for k, v in given.items()} == {
        k: (jax_export.dtype_of(v["dtype"]), [str(size) for size in v["shape"]])
        for k, v in described["inputs"].items()
    }
    assert {*jax.tree.unflatten(program.out_tree, program.out_avals)} == {*described["outputs"]}
    assert program.platforms == ("cpu", "cuda", "tpu")
    # In fewer bits, as accelerators multiply by default, it would not say the same there.
    products = [line for line in program.mlir_module().splitlines() if "= stablehlo.dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_an_export_is_whole_or_refused(kind, folder, tmp_path, capsys):
    name = next(name for name, each in export.KINDS.items() if each is kind)
    out = tmp_path / "out"
    written = export.export(model_files.read_files(folder), str(folder), out, [name])
    described = export.read(out)
    assert {*written} == {*described["files"]} == {str(p.relative_to(out)) for p in out.rglob("*")
                                                   if p.is_file()} - {export.SIDECAR}  # fmt: skip
    assert described[name]["file"] == kind.file
    assert max(v["unexplained"] for v in described["parity"]["differences"][name].values()) < LARGEST
    assert contents_of(out / "model").facts["version"] == described["model"]["version"]
    export.check(out)
    assert "as it was written" in capsys.readouterr().out
    for file in written:
        before = (out / file).read_bytes()
        (out / file).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(InputError, match="changed since it was written"):
            export.check(out)
        (out / file).unlink()
        with pytest.raises(InputError, match="missing"):
            export.check(out)
        (out / file).write_bytes(before)
    (out / export.SIDECAR).write_text("[]")
    with pytest.raises(InputError, match="no sidecar"):
        export.check(out)


def test_what_says_something_else_is_not_written(kind, folder, tmp_path, monkeypatch):
    name = next(name for name, each in export.KINDS.items() if each is kind)
    wrong = kind._replace(runner=lambda data: lambda inputs: dict.fromkeys(
        Scored._fields, np.zeros(len(inputs["attributes"]))))  # fmt: skip
    monkeypatch.setitem(export.KINDS, name, wrong)
    with pytest.raises(InputError, match="differs from the scorer"):
        export.export(model_files.read_files(folder), str(folder), tmp_path / "out", [name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "package"), [(n, p) for n, packages in NEEDS.items() for p in packages])
def test_a_package_that_is_not_there_is_named(name, package, folder, tmp_path, monkeypatch):
    for each in NEEDS[name]:
        pytest.importorskip(each)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"{package} is not installed.*pip install"):
        export.export(model_files.read_files(folder), str(folder), tmp_path / "out", [name])


def test_the_champion_of_a_registry_is_exported(folder, tmp_path):
    for package in NEEDS["onnx"]:
        pytest.importorskip(package)
    registry = Registry(open_store(str(tmp_path / "registry")))
    registry.register(model_files.read_files(folder) | {"card.md": b"a card"}, {}, "somebody")
    call = [sys.executable, "-m", "experiments.export", f"--registry={tmp_path / 'registry'}",
            "--format=onnx", f"--output={tmp_path / 'out'}"]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = lambda *more: subprocess.run(
        [*call, *more], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run().returncode == 2  # nothing is live
    said = run("--version=v1")
    assert said.returncode == 0, said.stderr
    assert f"next: python -m experiments.export --check={tmp_path / 'out'}" in said.stdout
    assert export.read(tmp_path / "out")["model"]["version"] == contents_of(folder).facts["version"]
    assert "expected some of onnx,jax" in run("--version=v1", "--format=torch").stderr
