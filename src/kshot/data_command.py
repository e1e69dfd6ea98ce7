"""``python main.py data``: what data sets there are, what is wrong with one, dividing, importing and downloading."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, track

from kshot.data import checking
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.downloads import download, found_at
from kshot.data.entries import Archive, DatasetEntry
from kshot.data.images import FileImages, ImageSource
from kshot.data.readers import read_split_zhou
from kshot.data.splits import PARTS, Row, Split, check_path, listed, split_bytes, words
from kshot.errors import UserError, nearest_first
from kshot.files import amount, file_content, may_be_read, write_atomically
from kshot.showing import Parser, show
from kshot.store_command import run_store


def run_data(words: Sequence[str]) -> int:
    """Runs ``data list|info|check|split|import|download|store``; returns 1 where training would fail or leak, else 0.

    Raises:
        UserError: words that there are not, a data set that there is not, or a file that is in the way.
    """
    given = _parser().parse_args(list(words))
    with may_be_read():
        return int(given.run(given) or 0)


def _parser() -> Parser:
    parser = Parser(prog="main.py data", description="Data sets: what there is, what is wrong with one, and more.")
    commands = parser.add_subparsers(required=True, metavar="{list,info,check,split,import,download,store}")

    def add(name: str, run: Any, what: str, given: str = "", about: str = "") -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
        if given:
            command.add_argument("given", metavar=given, help=about)
        command.add_argument("--root", type=Path, default=Path("data"), help="the data root (default: data)")
        command.add_argument("--json", action="store_true", help="JSON instead of tables")
        command.set_defaults(run=run)
        if run in {_check, _split}:
            command.add_argument("--seed", type=int, default=1, help="of the draw or division (default: 1)")
            command.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0, none)")
        return command

    either = "catalogue name, folder, CSV or split file"
    add("list", _list, "the catalogue, and what is on this machine")
    add("info", _info, "classes, numbers of images, template, source and licence", "DATASET", either)
    check = add("check", _check, "broken files, duplicates, leaks, and what training would use", "DATASET", either)
    check.add_argument("--shots", type=positive, default=16, help="images a class to train on (default: 16)")
    check.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="a picture of what was found")
    split = add("split", _split, "divide images into parts anew, with duplicates in one part", "DATASET", either)
    split.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="a new file, in CoOp's format")
    parts = "percentages of train, val and test (default: 50 20 30)"
    split.add_argument("--shares", type=int, nargs=3, default=(50, 20, 30), metavar="P", help=parts)
    add("import", _import, "check a split file of CoOp's, and put it beside its images", "FILE", ".json or .json.gz")
    add("download", _download, "fetch, verify and unpack a data set of the catalogue", "NAME", "catalogue name")
    store = add("store", run_store, "features and decoded images that are kept for later runs")
    store.add_argument("--clear", action="store_true", help="delete all of them")
    return parser


def positive(text: str) -> int:
    """A number of at least 1, for a parser."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def tell(given: argparse.Namespace, title: str, told: Mapping[str, Any], last: str = "") -> None:
    """Prints what came of a command, as JSON or as a table of what is not empty, and what to do next."""
    if given.json:
        print(json.dumps(told, indent=1))
        return
    show(title, [item for item in told.items() if item[1] not in ("", None)])
    print(last, end="\n" if last else "")


def _list(given: argparse.Namespace) -> None:
    rows, facts = [], []
    for name, entry in sorted(CATALOGUE.items()):
        sizes = dict(zip(PARTS, entry.sizes or ("", "", ""), strict=True))
        rows.append({"name": name, "classes": entry.classes, **sizes, "here": found_at(name, given.root)})
        facts.append({key: getattr(entry, key) for key in ("protocols", "url", "by_hand", "licence", "citation")})
    if given.json:
        print(json.dumps([row | more for row, more in zip(rows, facts, strict=True)], indent=1))
    else:
        show(f"Data sets, and where they are below {given.root}", (row.values() for row in rows), list(rows[0]))


def _info(given: argparse.Namespace) -> None:
    name, known, split, why = given.given, CATALOGUE.get(given.given), None, ""
    try:
        split, read = load_split(name, given.root)
    except UserError as error:
        if not known:
            raise
        why = str(error)
    entry = known or read
    counts = dict(zip(PARTS, [len(getattr(split, part)) for part in PARTS] if split else entry.sizes, strict=False))
    table = checking.class_table(split) if split else []
    drawn = f"{entry.split}: {entry.split_from}; sha256 of its 16 shots of seed 1: {entry.draw}..."
    facts: dict[str, Any] = {
        "name": split.name if split else name,
        "classes": len(table) or entry.classes,
        "images": counts,
        "template": entry.template,
        "here": found_at(name, given.root) if known else name,
        "size": size_of_images(split, entry, given.root) if split else "",
        "protocols": entry.protocols if known else "",
        "url": entry.url,
        "archives": [f"{each.urls[0]} {_checksum(each)}".strip() for each in entry.archives],
        "by hand": entry.by_hand,
        "layouts": entry.layouts if known and entry.kind in {"files", "folders"} else [],
        "split": f"{split.file}, sha256 {split.sha256}" if split else "",
        "CoOp's split": drawn if entry.split_from else "",
        "notes": list(split.notes) if split else [],
        "licence": entry.licence,
        "citation": entry.citation,
        "missing": why,
    }
    if given.json:
        print(json.dumps(facts | {"table": table}, indent=1))
        return
    lines = {key: "\n".join(value) for key, value in facts.items() if isinstance(value, list)}
    tell(given, facts["name"], facts | lines | {"images": ", ".join(f"{n:,} {p}" for p, n in counts.items())})
    if table:
        show("Classes", (row.values() for row in table), list(table[0]))


def _checksum(archive: Archive) -> str:
    return f"sha256 {archive.sha256}" if archive.sha256 else f"md5 {archive.md5}" if archive.md5 else ""


def opened(split: Split, entry: DatasetEntry, root: Path) -> tuple[list[tuple[str, Row]], dict[str, ImageSource]]:
    """Gives part and row of all images, and the sources of the parts; raises UserError when they are not there."""
    sources = {part: entry.images(root, part, rows) for part in PARTS if (rows := getattr(split, part))}
    return [(part, row) for part in sources for row in getattr(split, part)], sources


def size_of_images(split: Split, entry: DatasetEntry, root: Path) -> str:
    """Bytes of the image files in words; nothing where one is not there, or they are no files."""
    with suppress(UserError, OSError):
        images, sources = opened(split, entry, root)
        places = [(sources[part], row.path) for part, row in images]
        files = [source.folder / path for source, path in places if isinstance(source, FileImages)]
        return amount(sum(file.stat().st_size for file in files)) if files else ""
    return ""


def _check(given: argparse.Namespace) -> int:
    refuse_existing(given.contact_sheet)
    try:
        split, entry = load_split(given.given, given.root)
    except UserError as error:
        places = [path for path in (Path(given.given), given.root / given.given) if given.given and path.exists()]
        lists = (".csv", ".json", ".json.gz")
        if given.given in CATALOGUE or not any(path.is_dir() or path.name.endswith(lists) for path in places):
            raise  # no data set at all
        return report(given, {"name": given.given}, [checking.Finding("training refuses it", True, text=str(error))])
    images, sources = opened(split, entry, given.root)
    seen = looked_at(images, sources, given.workers)
    used: dict[str, Any] = {"text": f"No image is for training: {entry.protocols}."}
    few: list[checking.Finding] = []
    if not entry.parts:
        used, few = checking.training(split, given.shots, given.seed)
    found = [*checking.findings(images, seen), *few]
    if given.contact_sheet:
        sheet = checking.contact_sheet(checking.pictures(found, images, sources))
        write_atomically(given.contact_sheet, lambda path: sheet.save(path, format="PNG"))
    known = {"name": split.name, "images": len(images), "training": used, "classes": checking.class_table(split)}
    return report(given, known, found, images)


def looked_at(
    images: Sequence[tuple[str, Row]], sources: Mapping[str, ImageSource], workers: int
) -> list[checking.Seen]:
    """Looks at all images, with a bar on a terminal."""
    looks = checking.look_at_all([(sources[part], row.path) for part, row in images], workers)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return list(track(looks, "reading images", len(images), console=console, transient=True, disable=quiet))


def report(
    given: argparse.Namespace,
    known: Mapping[str, Any],
    found: Sequence[checking.Finding],
    images: Sequence[tuple[str, Row]] = (),
) -> int:
    """Prints what a check found; returns 1 where training would fail or leak."""
    fails = any(each.fails for each in found)
    rows, told = [], []
    for each in found:
        groups = [[f"{images[i][0]}: {images[i][1].path}" for i in group] for group in each.groups]
        which = "; ".join(" = ".join(group[:3]) for group in groups[:2]) + ("; ..." if len(groups) > 2 else "")
        rows.append(("!" if each.fails else "", each.kind, len(groups) or "", each.text or which))
        told.append({"kind": each.kind, "fails": each.fails, "text": each.text, "images": groups})
    if given.json:
        print(json.dumps({**known, "findings": told, "result": "fails" if fails else "ok"}, indent=1))
        return int(fails)
    show(f"{known['name']}: {known.get('images', 'no')} images", rows, ("", "finding", "count", "which"))
    if classes := known.get("classes"):
        few = sorted(classes, key=lambda row: int(row["train"]))[:10]
        show(f"The smallest of {len(classes)} classes", (row.values() for row in few), list(few[0]))
        print(known["training"]["text"])
    what = "Training" if "shots" in known.get("training", {"shots": 0}) else "Testing"
    print(f"{what} would fail or leak: see the lines with '!'." if fails else f"{what} can begin.")
    return int(fails)


def refuse_existing(file: Path | None) -> None:
    """Raises UserError for a new file that is there already, or has no folder: before the work, not after it."""
    if file and file.exists():
        raise UserError(f"{file} is there already, and nothing is overwritten: name another file or take it away")
    if file and not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {str(file.parent)!r}")


def _split(given: argparse.Namespace) -> None:
    refuse_existing(given.out)
    if sum(given.shares) != 100 or min(given.shares) < 0 or not given.shares[0]:
        raise UserError(
            f"--shares {' '.join(map(str, given.shares))}: three percentages that make 100, the first not 0"
        )
    if given.out.suffix != ".json":
        raise UserError(f"--out {given.out}: a split file ends in .json")
    split, entry = load_split(given.given, given.root)
    images, sources = opened(split, entry, given.root)
    images.sort(key=lambda image: (image[1].label, image[1].path))
    names = names_apart(split)
    rows = [Row(below(sources[part], row.path, given.out), row.label, names[row.label]) for part, row in images]
    seen = looked_at(images, sources, given.workers)
    good = [i for i, each in enumerate(seen) if not each.problem]
    alike = checking.alike_groups([seen[i] for i in good])
    parts = checking.divide([rows[i] for i in good], alike, given.shares, given.seed)
    content = split_bytes(parts)
    write_atomically(given.out, lambda path: path.write_bytes(content))
    told = {"written": str(given.out)} | {part: len(parts[part]) for part in PARTS}
    told |= {"left out as unreadable": len(rows) - len(good), "groups kept together": len(alike)}
    tell(given, f"{split.name} divided", told, f"Train with --data.dataset {given.out}")


def names_apart(split: Split) -> list[str]:
    """Class names as prompts say them: without numbers and codes, or as a classes.yaml says.

    Those that read the same get their own name behind it, ``missile (n04008634)``: a split file has a name but once.
    """
    count = Counter(map(words, split.said))
    pairs = zip(split.said, split.class_names, strict=True)
    return [said if count[words(said)] == 1 else f"{said} ({own})" for said, own in pairs]


def below(source: ImageSource, path: str, out: Path) -> str:
    """The path of an image as a split file beside it says it; raises UserError for one that is elsewhere."""
    if not isinstance(source, FileImages):
        raise UserError("data split is for image files; other data sets keep their own division")
    file, folder = source.folder / path, out.resolve().parent
    found = file.parent.resolve() / file.name
    if not found.is_relative_to(folder):
        raise UserError(f"--out {out}: the images must lie below its folder, and {file} does not")
    relative = found.relative_to(folder).as_posix()
    check_path(relative, str(out))
    return relative


def _import(given: argparse.Namespace) -> None:
    file = Path(given.given)
    split = read_split_zhou(file)
    if split.item_kind == "index":
        raise UserError(f"{file}: the rows have an index instead of a file, which only catalogue data sets may")
    names = [name for name, entry in CATALOGUE.items() if entry.split.removesuffix(".gz") == split.file]
    rows = [row for part in PARTS for row in getattr(split, part)]
    known = [given.root / layout for name in names for layout in CATALOGUE[name].layouts]
    looked = [*known, given.root, *sorted(given.root.glob("*/")), *sorted(given.root.glob("*/*/"))]
    folder = next((place for place in looked if (place / rows[0].path).is_file()), None)
    if folder is None:
        hint = f", such as in {str(known[0])!r}" if known else ""
        raise UserError(f"{file}: no {rows[0].path!r} in or below {str(given.root)!r}{hint}: get the images first")
    if missing := [row.path for row in rows if not (folder / row.path).is_file()]:
        raise UserError(f"{file}: {len(missing)} of {len(rows)} images are not in {folder}: {listed(missing)}")
    same = (name for name in names if not CATALOGUE[name].split_from and load_split(name)[0].sha256 == split.sha256)
    shipped = next(same, "")
    target, content = folder / split.file, file_content(file)
    if not shipped and not (target.exists() and target.read_bytes() == content):
        refuse_existing(target)
        write_atomically(target, lambda path: path.write_bytes(content))
    told = {"dataset": shipped or str(target), "images": len(rows), "classes": len(split.class_names)}
    told |= {"sha256": split.sha256, "comes with kshot": bool(shipped)}
    tell(given, f"{split.file}: all images are there", told, f"Train with --data.dataset {told['dataset']}")


def _download(given: argparse.Namespace) -> None:
    name = given.given
    if name not in CATALOGUE:
        raise UserError(f"unknown data set {name!r}. {nearest_first(name, CATALOGUE, shown=40)}")
    entry = CATALOGUE[name]
    done: list[dict[str, Any]] = []
    if not found_at(name, given.root):
        if not entry.archives:
            hand, places = f"{entry.url}: {entry.by_hand}", " or ".join(entry.layouts)
            raise UserError(
                f"{name} cannot be downloaded for you, get it from {hand}; it goes to {places} below {given.root}"
            )
        with bar() as progress:
            done = download(name, given.root, progress)
    told = {"name": name, "here": found_at(name, given.root), "files": done}
    if given.json:
        print(json.dumps(told, indent=1))
        return
    if done:
        show(name, (row.values() for row in done), list(done[0]))
    where = "" if given.root == Path("data") else f" --data.root {given.root}"
    print(f"{name} is there: {told['here']}", f"Train with --data.dataset {name}{where}", sep="\n")


@contextmanager
def bar() -> Iterator[Any]:
    """A bar for every file on a terminal; elsewhere nothing, so that a log stays short."""
    console, tasks = Console(stderr=True), {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:

        def progress(name: str, there: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name)
            shown.update(tasks[name], completed=there, total=total)

        yield progress
