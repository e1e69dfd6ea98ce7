"""Published accuracies, for those runs of a study that repeat what was published."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from kshot.studies.grid import Grid, Row

FILE = Path(__file__).with_name("published.toml")
ELEVEN = {  # data sets of the printed averages: CoOp's
    *("imagenet", "sun397", "fgvc_aircraft", "eurosat", "stanford_cars", "food101", "oxford_pets", "oxford_flowers"),
    *("caltech101", "dtd", "ucf101"),
}


@dataclass(frozen=True)
class Published:
    """What was published of a contender on a data set, or on average.

    Attributes:
        points: shots and values in [0, 1].
        source: of the values, and how their digits were checked.
    """

    points: list[tuple[float, float]]
    source: str


@cache
def known() -> list[dict[str, Any]]:
    """All published values, as their file has them."""
    found: list[dict[str, Any]] = tomllib.loads(FILE.read_text(encoding="utf-8"))["row"]
    return found


def published(grid: Grid, contender: str, name: str | None, rows: list[dict[str, Any]]) -> Published | None:
    """What was published of a contender on a data set, or on the average of all for None.

    Recipe, backbone, protocol and metric must agree, and so must shots and data set; an average takes the runs of all
    eleven data sets that it was printed for. A contender with settings of its own repeats nothing.

    Args:
        grid: the runs.
        contender: by name.
        name: of the data set.
        rows: as :func:`known` gives them.
    """
    cells = {(each, k): runs for (who, each, k), runs in grid.runs.items() if who == contender}
    mine = [next(iter(runs.values())) for (each, _), runs in cells.items() if name in (None, each)]
    for entry in rows:
        if not mine or not all(repeats(row, contender, entry, grid.metric) for row in mine):
            continue
        values, key = entry["values"], "average" if name is None else str(mine[0]["dataset"])
        if name is None and {row["dataset"] for row in mine} != ELEVEN:
            continue
        shots = {k for _, k in cells}
        points = [
            (float(k), value / 100) for k, value in zip(entry["shots"], values.get(key, ()), strict=False) if k in shots
        ]
        if points:
            return Published(points, f"{entry['source']}; {entry['checked']}")
    return None


def repeats(row: Row, contender: str, entry: dict[str, Any], metric: str) -> bool:
    """Whether a run is one of a published recipe, as far as a row tells."""
    method = str(row.get("method"))
    plain = contender in (method, f"{method} · {row.get('backbone')}")
    return (
        plain
        and metric == entry["metric"]
        and PurePath(method).stem == entry["recipe"]
        and row.get("backbone") in entry["backbones"]
        and row.get("protocol") == entry["protocol"]
    )
