"""Class names: from folder names to the words of a prompt, by what the user gives, or without numbers and codes."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from kshot.data.splits import Split, check_distinct, display_name, shown, words
from kshot.errors import UserError, first_line, nearest_first
from kshot.files import file_content

NAME_FILES = ("classes.yaml", "classes.yml", "classes.txt")  # in the folder of a data set
MOST_BYTES = 2**22  # of such a file
MOST_LETTERS = 300  # of a name, in which its code is looked for
ROWS = 8  # of the table of names that are shown
Names = Sequence[str] | Mapping[str, str]
_CODE = re.compile(r"(?:[0-9]+[._\-\s]+|n[0-9]{8}[._\-\s]+)(?=.*[^\W\d_])")  # a number, or WordNet's


def named(split: Split, given: Names | None = None, folder: Path | None = None, codes: bool = False) -> Split:
    """Gives a split the names that prompts say.

    Args:
        split: as its reader made it.
        given: names in label order, or by the source's names; the others of a mapping stay as they are.
        folder: where there may be one of ``NAME_FILES``, which counts unless names are given.
        codes: take numbers and codes before the names off.

    Raises:
        UserError: names are not as many as the classes, of a class that there is not, or read the same.
    """
    where = "class_names" if given is not None else split.file
    file = next((folder / name for name in NAME_FILES if folder and (folder / name).is_file()), None)
    if given is None and file is not None:
        given, where = names_in(file, split.class_names), str(file)
    own = without_codes(split.class_names) if codes else list(split.said)
    if isinstance(given, Mapping):
        # On a command line {1: grass} has a number for a key.
        mapping = {unicodedata.normalize("NFC", str(key)): str(name) for key, name in given.items()}
        known = [unicodedata.normalize("NFC", name) for name in split.class_names]
        if foreign := [key for key in mapping if key not in known]:
            raise UserError(
                f"{where}: {split.name} has no class {shown(foreign[0])}. {nearest_first(foreign[0], known)}"
            )
        own = [mapping.get(name, plain) for name, plain in zip(known, own, strict=True)]
    elif given is not None:
        if len(given) != len(own):
            those = "class_names" if where == "class_names" else f"names in {where}"
            raise UserError(f"{len(given)} {those} for the {len(own)} of {split.name}")
        own = list(given)
    check_distinct(own, where)
    own = [unicodedata.normalize("NFC", name) for name in own]
    if tuple(own) == split.class_names:
        return split
    changed = [(a, b) for a, b in zip(split.class_names, own, strict=True) if words(a) != words(b)]
    rows = [f"\n  {a} -> {display_name(b)}" for a, b in changed[:ROWS]]
    more = f"\n  and {len(changed) - ROWS} more" if len(changed) > ROWS else ""
    notes = (f"class names of {split.name}:{''.join(rows)}{more}",) if changed else ()
    return replace(split, prompt_names=tuple(own), notes=(*split.notes, *notes))


def without_codes(class_names: Sequence[str]) -> list[str]:
    """Takes numbers and codes off: ``001.Black_footed_Albatross``, ``n02084071-dog``.

    Only where every name starts with one, each with another, and the names that remain are distinct: ``3_series`` and
    ``5_series`` stay as they are.
    """
    found = [_CODE.match(name[:MOST_LETTERS]) for name in class_names]
    codes = {match[0] for match in found if match}
    rest = [name[match.end() :] for name, match in zip(class_names, found, strict=True) if match]
    apart = len(codes) == len(set(map(words, rest))) == len(class_names) > 1
    return rest if apart else list(class_names)


def names_in(file: Path, class_names: Sequence[str]) -> Names | None:
    """Reads one of ``NAME_FILES``: a YAML mapping or list, or lines of ``FOLDER NAME`` or names in label order.

    None where it only lists the folders. Raises UserError for other content.
    """
    content = file_content(file)
    if len(content) > MOST_BYTES:
        raise UserError(f"{file}: more than {MOST_BYTES:,} bytes, which no list of class names has")
    try:
        text = content.decode("utf-8-sig")
        if file.suffix != ".txt":
            value = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar is a word; nothing is run
            values = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(values, list) or not all(isinstance(each, str) for each in (*value, *values)):
                raise UserError(f"{file}: must map folders to names, or list names in label order")
            return value  # type: ignore[no-any-return]
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [[*line.split(None, 1), ""][:2] for line in lines]
    if {head for head, rest in pairs if rest} >= set(class_names):
        return {head: rest for head, rest in pairs if head in class_names}
    if set(lines) == set(class_names) or {rest for _, rest in pairs} == set(class_names):
        return None
    if len(lines) != len(class_names):
        raise UserError(f"{file}: {len(lines)} lines for {len(class_names)} classes; give FOLDER NAME in each")
    return lines
