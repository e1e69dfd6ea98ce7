"""``python main.py data store``: what is kept of images for later runs, and how to be rid of it."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from kshot.files import amount
from kshot.showing import show
from kshot.store import clear, contents, root_folder


def run_store(given: argparse.Namespace) -> None:
    """Lists what is kept, the newest first, or deletes it."""
    root = root_folder()
    if given.clear:
        freed = clear()
        print(json.dumps({"folder": str(root), "freed": freed}) if given.json else f"{root}: {amount(freed)} freed")
        return
    rows = sorted(contents(), key=lambda row: -row["used"])
    if given.json:
        print(json.dumps([row | {"context": json.loads(row["context"])} for row in rows], indent=1))
        return
    total = f"{amount(sum(row['bytes'] for row in rows))} in {root}"
    header = ("kind", "of", "pixels", "precision", "device", "rows", "size", "last used")
    show(f"Kept for later runs: {total}", map(told, rows), header)


def told(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table: kind, backbone, pixels, precision, device, number of rows, size, day of last use."""
    context = json.loads(row["context"])
    pixels = context.get("pixels", context)
    side, chance = pixels["preprocessing"]["size"], pixels.get("augment", {"class": "evaluation"})["class"]
    return (
        row["kind"],
        context.get("backbone", ""),
        f"{side} x {side}, {chance.rpartition('.')[2]}",
        context.get("precision", ""),
        context.get("device", ""),
        f"{row['rows']:,}",
        amount(row["bytes"]),
        time.strftime("%Y-%m-%d", time.localtime(row["used"])),
    )
