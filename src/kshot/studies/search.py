"""Searching in a study (``sweep --search``): each run chooses its settings on its own shots before it is fitted.

A run that searches is ``fit --search ...``, so that every engine, claim and file is that of an ordinary run. What was
tried is kept in its folder, ``runs/ID/search-*.jsonl``, from which a worker goes on after another's death.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kshot.config import Tree, read_command_line, words_of
from kshot.errors import UserError, nearest_first
from kshot.layering import options_below
from kshot.places import Places
from kshot.ranges import checked_ranges
from kshot.settings import OPTIONS, laid
from kshot.studies.study import Cell, Study, name_of


def searching(study: Study, trials: int | None) -> Study:
    """The study as it is to be run.

    Args:
        study: with the ranges of its file.
        trials: of each search; 0 for as many as the file says, None for no search.

    Raises:
        UserError: the file has no ranges.
    """
    if trials is None:
        return study
    if study.ranges is None:
        raise UserError(f"{study.file} has no ranges to search: ranges: {{model.optimizer.lr: [1e-4, 1e-3]}} in it.")
    return replace(study, search=study.ranges | ({"trials": trials} if trials else {}))


class Searches:
    """The searches of a study's cells: each in the ranges of those options that it has."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.lacking: dict[str, list[str]] = {name: [] for name in self.ranges}  # cells without an option
        self.known: set[str] = set()  # options that some cell has

    @property
    def ranges(self) -> Mapping[str, Any]:
        """All of the file's, where there is a search."""
        found: Mapping[str, Any] = (self.study.search or {}).get("ranges", {})
        return found

    def of(self, shared: Cell, first: Cell, places: Places, tree: Tree) -> dict[str, Any] | None:
        """The search of some cells, as ``fit --search`` takes it; None where none of the options is theirs.

        Args:
            shared: what the cells have in common.
            first: one of them.
            places: for their settings.
            tree: their settings.

        Raises:
            UserError: a range that the command line refuses.
        """
        options = {name for name, _, _ in options_below(places, tree)} if self.ranges else set()
        self.known |= options
        own = {name: spec for name, spec in self.ranges.items() if name in options}
        for name in self.ranges.keys() - own:
            self.lacking[name].append(name_of(shared) or "every run")
        if not own:
            return None
        search = {**(self.study.search or {}), "ranges": own}
        line = read_command_line(["fit", *self.study.words(first), *words_for(search)], list(OPTIONS))
        checked_ranges(own, line, *laid(line))
        return search

    def told(self) -> list[str]:
        """A line for each range that some cells go without; raises UserError for one that no cell has."""
        for name in self.lacking:
            if name not in self.known:
                near = nearest_first(name, [each for each in self.known if each.startswith("model.")])
                raise UserError(f"{self.study.file}: ranges: no run of the grid has an option {name!r:.200}. {near}")
        lacking = {name: "; ".join(dict.fromkeys(cells)) for name, cells in self.lacking.items() if cells}
        return [
            f"{name} is searched where a run has it, which is not so for {cells}." for name, cells in lacking.items()
        ]


def words_for(search: Mapping[str, Any] | None) -> list[str]:
    """A search as words of a command line."""
    return words_of({"search": search}, {}) if search else []
