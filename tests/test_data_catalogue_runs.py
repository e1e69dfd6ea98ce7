"""Every data set of the catalogue, tiny and in each of its layouts: downloaded, checked, divided, and trained on."""

import dataclasses
import gzip
import hashlib
import json
import sys
import urllib.parse
from pathlib import Path, PurePosixPath

import pytest
import tiny_sets
from command_line import refused, tiny_clip
from test_data_command import checked, told
from test_data_downloads import server  # noqa: F401  a fixture

from kshot.adapters import LoRA
from kshot.cli import main
from kshot.data import FewShotDataModule
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.splits import split_bytes
from kshot.run import build, evaluate, fit, make_trainer

DOMAINS = [name for name, entry in CATALOGUE.items() if entry.parts]
IN_FILES = [name for name, entry in CATALOGUE.items() if entry.kind in {"files", "folders"}]
ARRAYS = [name for name, entry in CATALOGUE.items() if entry.kind == "arrays"]
LAYOUTS = [(name, layout) for name in IN_FILES for layout in CATALOGUE[name].layouts]


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    """The first images of every split that comes with kshot."""
    folder = tmp_path_factory.mktemp("data_splits")
    for name in IN_FILES:
        if (file := CATALOGUE[name].split) and not CATALOGUE[name].split_from:
            (folder / file).write_bytes(gzip.compress(split_bytes(tiny_sets.tiny_split(name)[0])))
    return folder


@pytest.fixture
def backbone(tiny):
    return tiny


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, splits):
    """Tiny splits, and torchvision without the checksums of its files, which only the true ones have."""
    monkeypatch.setattr("kshot.data.entries.packaged_folder", lambda _: splits)
    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.datasets.") and hasattr(module, "check_integrity"):
            monkeypatch.setattr(module, "check_integrity", lambda file, *_, **__: Path(file).is_file())


def write(root: Path, files: tiny_sets.Files) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def lies_in(path: str, place: PurePosixPath) -> bool:
    return place in (PurePosixPath(path), *PurePosixPath(path).parents)


def downloaded_layout(name: str) -> str:
    """The layout that the archives of an entry make."""
    places = [PurePosixPath(archive.into, give) for archive in CATALOGUE[name].archives for give in archive.gives]
    return next(each for each in CATALOGUE[name].layouts if any(lies_in(each, place) for place in places))


def offer(served, name: str, files: tiny_sets.Files, monkeypatch) -> None:
    """Serves archives with these files, named and built as the catalogue says; each file has to have its place."""
    archives, left = [], dict(files)
    for archive in CATALOGUE[name].archives:
        inside = {}
        for path in [p for p in files if any(lies_in(p, PurePosixPath(archive.into, give)) for give in archive.gives)]:
            inside[str(PurePosixPath(path).relative_to(archive.into))] = left.pop(path)
        if archive.inner:
            own = {each: {p: c for p, c in inside.items() if each.endswith(f"/{p}.gz")} for each in archive.inner}
            inside = {each: tiny_sets.packed(own[each] or inside, each) for each in archive.inner}
        content = tiny_sets.packed(inside, archive.name)
        path = urllib.parse.urlparse(archive.urls[0]).path[1:]
        served.files[path] = content
        digests = {"md5": hashlib.md5(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}
        same = {key: digests[key] for key in digests if getattr(archive, key)}
        archives.append(dataclasses.replace(archive, urls=[served.url(path)], **same))
    assert left == {}, "no archive of the catalogue has these"
    monkeypatch.setitem(CATALOGUE.own, name, dataclasses.replace(CATALOGUE[name], archives=archives))


def two_steps(backbone, name: str, root: Path, **settings) -> FewShotDataModule:
    """Trains for two steps on two shots of a data set, and tests."""
    data = FewShotDataModule(name, str(root), shots=2, batch_size=2, **settings)
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.0.q"])
    trainer = make_trainer(max_steps=2)
    fit(module, data, trainer)
    assert trainer.global_step == 2
    evaluate(module, data, make_trainer())
    module.detach()
    return data


def trained(backbone, name: str, root: Path, names: list[str]) -> None:
    """Checks what a data set is in its place, and trains on it; on ImageNet for its domains."""
    if name not in DOMAINS:
        data = two_steps(backbone, name, root)
        assert data.class_names == names
        assert data.split_info()["counts"]["train"] == 2 * len(names)
        assert data.templates == [CATALOGUE[name].template]
        return
    write(root, tiny_sets.file_set("imagenet", "imagenet/images")[0])
    data = two_steps(backbone, "imagenet", root, protocol="domain-generalisation", targets=[name])
    assert [list(each.class_names) for each in data.test_sets] == [[*tiny_sets.IMAGENET.values()], names]
    assert data.split_info()["counts"]["test"] == 10 + 10 * len(names)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if CATALOGUE[name].archives])
def test_from_the_server_to_a_run(name, capsys, tmp_path, server, monkeypatch, backbone):  # noqa: F811
    arrays = CATALOGUE[name].kind == "arrays"
    files, names = tiny_sets.array_set(name) if arrays else tiny_sets.file_set(name, downloaded_layout(name))
    offer(server, name, files, monkeypatch)
    root = tmp_path / "data"
    done = told(capsys, "download", name, "--root", root)
    assert {each["verified"] for each in done["files"]} <= {"md5", "sha256", "no checksum is published"}
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == files.keys()
    assert checked(capsys, name, "--root", root, "--shots", 2).keys() <= {"tiny (below 32 pixels)", "grey"}
    out = root / "own.json"
    if arrays:
        assert "data split is for image files" in refused(
            capsys, ["data", "split", name, "--root", str(root), "--out", str(out)]
        )
    else:
        told(capsys, "split", name, "--root", root, "--out", out)
        split, entry = load_split(str(out), root)
        assert len(split.train) > 0
        assert len(entry.images(root, "test", split.test).open(split.test[0].path).size) == 2
    trained(backbone, name, root, names)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout(name, layout, capsys, tmp_path, backbone):
    files, names = tiny_sets.file_set(name, layout)
    write(tmp_path, files)
    known = told(capsys, "info", name, "--root", tmp_path)
    assert Path(known["here"]) == tmp_path / layout
    assert (known["classes"], known["missing"]) == (len(names), "")
    assert sum(known["images"].values()) == sum(path.endswith(".jpg") for path in files)
    assert checked(capsys, name, "--root", tmp_path, "--shots", 2) == {}
    if name not in DOMAINS:
        assert two_steps(backbone, name, tmp_path).class_names == names


@pytest.mark.parametrize("name", [name for name in ARRAYS if not CATALOGUE[name].archives])
def test_arrays_that_are_got_by_hand(name, capsys, tmp_path, backbone):
    files, names = tiny_sets.array_set(name)
    write(tmp_path, files)
    known = told(capsys, "info", name, "--root", tmp_path)
    assert known["here"] == str(tmp_path / CATALOGUE[name].layouts[0])
    assert (known["classes"], known["missing"]) == (len(names), "")
    assert checked(capsys, name, "--root", tmp_path, "--shots", 2).keys() <= {"grey"}
    trained(backbone, name, tmp_path, names)


def test_all_domains_of_imagenet_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet", *DOMAINS):
        write(tmp_path / "data", tiny_sets.file_set(name, CATALOGUE[name].layouts[0])[0])
    words = ["--data.dataset", "imagenet", "--data.protocol", "domain-generalisation", "--data.shots", "2"]
    words += ["--data.targets", "[imagenetv2, imagenet_sketch, imagenet_a, imagenet_r]", "--trainer.max_steps", "2"]
    main(["fit", "--config", "clip_16shot.yaml", *tiny_clip(), *words, "--trainer.enable_progress_bar", "false"])
    (result,) = Path("runs").glob("*/*/result.json")
    sizes = {"imagenet": 10, "imagenetv2": 50, "imagenet_sketch": 50, "imagenet_a": 20, "imagenet_r": 20}
    assert json.loads(result.read_text())["test_images"] == sizes
