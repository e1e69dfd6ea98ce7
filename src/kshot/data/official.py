"""Parts and class names as the authors of a data set publish them: lists of files, and words for ImageNet's ids."""

import hashlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kshot.data.names import names_in
from kshot.data.readers import list_content
from kshot.data.splits import PARTS, VAL_PERCENT, Row, Split, check_path, listed, make_split, shown, stratify, words
from kshot.errors import UserError


def split_from_lists(
    name: str, base: Path, lists: Mapping[str, Sequence[str]], line: str, path: str, image_root: str
) -> Split:
    """Reads a split from lists of images.

    Labels follow the sorted classes. Without a list for validation 20 % of every class's training images are for it.
    The digest is that of the files in their order.

    Args:
        name: id of the data set.
        base: folder with the lists.
        lists: files by part; several are pasted side by side, line by line. Under another name than a part's, the
            groups ``train``, ``val`` and ``test`` of the line tell the part.
        line: regular expression for a line, with the group ``class``, and ``kind`` for a word before the class's name.
        path: of the image below the image folder, a format of the groups.
        image_root: folder below the data set's folder to which the paths refer.

    Raises:
        UserError: a list is missing, has another number of lines than its neighbour or a line that is none, or a rule
            of ``make_split`` is broken.
    """
    digest = hashlib.sha256()
    found: dict[str, list[tuple[tuple[str, str], str]]] = {part: [] for part in PARTS}
    for part, files in lists.items():
        contents = [list_content(base / file, "\n") for file in files]
        digest.update(b"".join(contents))
        columns = [content.decode("utf-8", "replace").splitlines() for content in contents]
        if len({len(column) for column in columns}) > 1:
            raise UserError(f"{base}: {' and '.join(files)} have different numbers of lines")
        texts = (" ".join(cells).strip() for cells in zip(*columns, strict=True))
        for number, text in [(number, text) for number, text in enumerate(texts, 1) if text]:
            match = re.fullmatch(line, text)
            where = f"{base / files[0]}, line {number}"
            if match is None:
                raise UserError(f"{where}: {shown(text)} is not what {name} lists its images by")
            groups = match.groupdict(default="")
            place = check_path(path.format_map(groups), where)
            found[part if part in PARTS else str(match.lastgroup)].append(
                ((groups["class"], groups.get("kind", "")), place)
            )
    classes = sorted({each for rows in found.values() for each, _ in rows})
    labels = {each: label for label, each in enumerate(classes)}
    rows = {
        part: [Row(place, labels[each], f"{each[1]} {each[0]}".strip()) for each, place in those]
        for part, those in found.items()
    }
    parts = rows if rows["val"] else stratify(rows["train"], (VAL_PERCENT, 0)) | {"test": rows["test"]}
    files = [file for those in dict.fromkeys(map(tuple, lists.values())) for file in those]
    roots = dict.fromkeys(PARTS, image_root)
    return make_split(name, parts, file=" + ".join(files), sha256=digest.hexdigest(), image_root=roots)


def imagenet_names(folder: Path) -> dict[str, str]:
    """Gives the words of ImageNet's 1,000 classes by WordNet id and by label, "0" to "999", in label order.

    They are CLIP's, as open_clip has them, or those of CoOp's ``classnames.txt`` where the folder has it; the ids are
    timm's. Raises UserError for a file that is not CoOp's.
    """
    from open_clip import IMAGENET_CLASSNAMES

    ids = (pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt") or b"").decode().split()
    file = folder / "classnames.txt"
    if file.is_file():
        own = names_in(file, ids)
        if not isinstance(own, Mapping):
            raise UserError(f"{file}: must have a line with id and name for each of ImageNet's {len(ids)} classes")
        ordered = [own[each] for each in ids]
    else:
        ordered = [str(name) for name in IMAGENET_CLASSNAMES]
    return dict(zip(ids, ordered, strict=True)) | {str(label): name for label, name in enumerate(ordered)}


def with_names(split: Split, names: Mapping[str, str]) -> Split:
    """Gives classes the names that prompts say, and labels in the order of these.

    Classes that a data set calls alike, as CLIP's list does two pairs, stay so, and a note says it. Raises UserError
    for a class without a name.
    """
    if unknown := [each for each in split.class_names if each not in names]:
        raise UserError(f"{split.name}: has no class {listed(unknown)}; its folders are called {listed(list(names))}")
    present = set(split.class_names)
    order = [each for each in names if each in present]
    if tuple(order) != split.class_names:
        labels = {each: label for label, each in enumerate(order)}
        parts = ([row._replace(label=labels[row.class_name]) for row in getattr(split, part)] for part in PARTS)
        train, val, test = map(tuple, parts)
        split = replace(split, class_names=tuple(order), train=train, val=val, test=test)
    alike: dict[str, list[str]] = {}
    for each in order:
        alike.setdefault(words(names[each]), []).append(each)
    notes = [
        f"{split.name}: {listed(those)} are all called {name!r}" for name, those in alike.items() if len(those) > 1
    ]
    return replace(split, prompt_names=tuple(names[each] for each in order), notes=(*split.notes, *notes))
