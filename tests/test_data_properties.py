"""What holds of every folder: order, copies, names, links and permissions, on files that are really there."""

import contextlib
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import many_runs
import pytest
from data_fixtures import image_folder, save_image
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kshot.cli import main
from kshot.data import FewShotDataModule
from kshot.data.catalogue import load_split
from kshot.data.splits import PARTS, Split
from kshot.errors import UserError

NOBODY = 65534
NAMES = st.text("abZ é\u0301ö日 _-.,'&()[]", min_size=1, max_size=6).filter(
    lambda name: name.strip(" ._-,'&()[]\u0301") and not name.startswith((".", "~")) and name == name.strip()
)
CLASSES = st.lists(NAMES, min_size=2, max_size=4, unique_by=lambda name: unicodedata.normalize("NFC", name).lower())


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder that any user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def listed_in_order(random) -> Iterator[None]:
    """Folders give their entries in a drawn order."""
    true = os.scandir

    class Shuffled(list):
        def __enter__(self):
            return iter(self)

        def __exit__(self, *_):
            pass

    def shuffled(path):
        with true(path) as entries:
            found = Shuffled(entries)
        random.shuffle(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", shuffled)
        yield


def split_or_refusal(path: Path) -> Split | str:
    """The split, or why there is none: names may read the same."""
    try:
        return load_split(str(path))[0]
    except UserError as error:
        return str(error).replace(str(path), "")


@given(CLASSES, st.integers(2, 5), st.randoms(use_true_random=False), st.sampled_from(["", "train", "Test/01 Train"]))
@settings(max_examples=40, deadline=None)
def test_the_order_of_entries_decides_nothing_and_no_image_is_lost_or_in_two_parts(names, count, random, inner):
    with empty_folder() as folder:
        for name in names:
            (folder / "x" / inner / name).mkdir(parents=True)
            for i in range(count):
                (folder / "x" / inner / name / f"{name} {i}.png").write_bytes(b"")
        first = split_or_refusal(folder / "x")
        with listed_in_order(random):
            assert split_or_refusal(folder / "x") == first
        files = sorted((folder / "x").rglob("*.png"))
        random.shuffle(files)
        packed = {"zip": folder / "x.zip", "tar": folder / "x.tar"}
        with zipfile.ZipFile(packed["zip"], "w") as archive, tarfile.open(packed["tar"], "w") as tar:
            for file in files:
                archive.write(file, file.relative_to(folder / "x"))
                tar.add(file, str(file.relative_to(folder / "x")))
        for archive in packed.values():
            assert split_or_refusal(archive) == first
        if isinstance(first, Split):
            paths = [row.path for part in PARTS for row in getattr(first, part)]
            assert len(paths) == len(set(paths)) == len(files)
            assert {str(folder / "x" / path) for path in paths} == set(map(str, files))
            assert all(Path(row.path).parent.name == row.class_name for row in first.train)


@given(CLASSES)
@settings(max_examples=25, deadline=None)
def test_composed_and_decomposed_names_are_the_same_class(names):
    with empty_folder() as folder:
        for part, form in (("train", "NFC"), ("test", "NFD")):
            for name in names:
                place = folder / part / unicodedata.normalize(form, name)
                place.mkdir(parents=True)
                for i in range(2):
                    (place / f"{i}.png").write_bytes(b"")
        found = split_or_refusal(folder)
        if isinstance(found, Split):  # others read the same as another name, whatever the form
            assert len(found.test) == len(found.train) == 2 * len(names)
            assert len(found.class_names) == len(names)


@given(st.lists(st.lists(st.integers(0, 30), min_size=6, max_size=9), min_size=2, max_size=3), st.integers(0, 99))
@example([[0, 1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 1]], 3)
@settings(max_examples=10, deadline=None)
def test_after_a_division_no_bytes_are_in_two_parts(classes, seed):
    """Images are drawn from a few, so that most folders have copies, within classes and across them."""
    with empty_folder() as folder, contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for c, contents in enumerate(classes):
            for i, content in enumerate(contents):
                save_image(folder / "photos" / f"class {c}" / f"{i}.png", seed=content)
        with contextlib.suppress(SystemExit):
            main(["data", "split", "photos", "--out", "split.json", "--seed", str(seed)])
        if not Path("split.json").exists():
            assert sum(map(len, classes)) - len(set().union(*classes)) > 3, "refused only where many are copies"
            return
        split = load_split("split.json")[0]
        rows = {part: getattr(split, part) for part in PARTS}
        assert sum(map(len, rows.values())) == sum(map(len, classes))
        content = {part: {Path(row.path).read_bytes() for row in those} for part, those in rows.items()}
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not content[one] & content[other], (one, other)


class TestLinks:
    @pytest.mark.parametrize("kind", ["files", "classes", "root"])
    def test_what_is_linked_is_as_what_lies_there(self, tmp_path, kind):
        store = image_folder(tmp_path / "store", {"a b": 6, "ü": 6})
        root = tmp_path / "linked" / "store"
        if kind == "root":
            root.parent.mkdir()
            root.symlink_to(store)
        for place in store.iterdir() if kind == "classes" else ():
            root.mkdir(parents=True, exist_ok=True)
            (root / place.name).symlink_to(place)
        for file in store.rglob("*.png") if kind == "files" else ():
            (root / file.parent.name).mkdir(parents=True, exist_ok=True)
            (root / file.parent.name / file.name).symlink_to(file)
        assert load_split(str(root))[0] == load_split(str(store))[0]
        data = FewShotDataModule(str(root), shots=2, image_size=8)
        data.setup("fit")
        shutil.rmtree(store)
        with pytest.raises(UserError):
            FewShotDataModule(str(root), shots=2, image_size=8).setup("fit")

    def test_cycles_are_counted_and_passed_over(self, tmp_path):
        root = image_folder(tmp_path / "photos", {"a": 4, "b": 4})
        (root / "a" / "up").symlink_to(root)
        (root / "a" / "self").symlink_to("self")
        (root / "b" / "here").symlink_to(".")
        split = load_split(str(root))[0]
        assert sum(len(getattr(split, part)) for part in PARTS) == 8
        assert dict(split.left_out) == {"links to folders around them": 2, "broken links": 1}


def as_nobody(work: Callable[[], object]) -> object:
    """What a process finds that may not do everything; for root one of another user, which chmod stops."""

    def lowered() -> object:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            return work()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return many_runs.in_child(lowered)


class TestPermissions:
    @pytest.fixture
    def root(self):
        with empty_folder() as folder:
            yield image_folder(folder / "photos", {"a": 10, "b": 10})
            for place in folder.rglob("*"):
                place.chmod(0o755)

    def test_nothing_is_written_into_a_data_set(self, root, tmp_path):
        for place in (*root.rglob("*"), root, root.parent):
            place.chmod(0o555 if place.is_dir() else 0o444)

        def work() -> object:
            assert not os.access(root, os.W_OK)
            assert not os.access(root.parent, os.W_OK)
            data = FewShotDataModule(str(root), shots=2, image_size=8)
            data.setup("fit")
            data.check_test_files()
            data.setup("test")
            return [int(data.part(part).images([(0, 0)]).sum()) > 0 for part in ("train", "val", "test")]

        assert as_nobody(work) == [True] * 3
        assert {stat.S_IMODE(place.stat().st_mode) for place in root.rglob("*.png")} == {0o444}

    @pytest.mark.parametrize("what", ["folder", "file", "root"])
    def test_what_may_not_be_read_gets_one_line_with_its_name(self, root, what):
        locked = {"folder": root / "a", "root": root, "file": next(iter(sorted((root / "a").iterdir())))}[what]
        locked.chmod(0)

        def work() -> object:
            data = FewShotDataModule(str(root), shots=None, image_size=8)
            data.setup("fit")
            data.check_test_files()
            return json.dumps(data.split_info()["counts"])

        said = as_nobody(work)
        assert str(locked) in said
        assert said.startswith(("UserError: ", "UnreadableImageError: "))
        assert "permission denied" in said.lower()
        assert "\n" not in said
