"""Choosing a method on the shots (``fit --budget``) beside the methods it could take: the tables of docs/choosing.md.

    python benchmarks/choose.py --images ../shared/data --vit vits14.safetensors
    python benchmarks/choose.py --stage
    python benchmarks/choose.py --report

Five pairs of data and backbone, 1 to 16 shots, seeds 1-3; auto with 30 s and 5 min. digits and clothes (fashion_mnist)
with the carried CLIP; satellite scenes (rsscn7), traffic signs (gtsrb) and clothes with a trained ViT-S/14 at 56
pixels, 4 recorded views an image, where what trains the tower sees about 2,000 images (40 epochs at most, 4 at least),
auto's candidates too. Closed forms and auto with 30 s come first, then seed 1 of the others. A process for each pair
makes ordinary ``kshot fit``s one after the other; rows are appended, and one that is there is not run again, so that
the script can be stopped and taken up; rows that were made beside other work have no seconds. What follows ``--`` is
handed to every run. ``--stage`` measures what choosing among the closed forms takes, on random features; ``--report``
prints tables and targets from the CSV files alone.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from few_shot import append, machine, parse, rows_of
from methods import CHOOSING, CLOTHES, SIGNS, VIT

FIELDS = (
    "pair", "method", "shots", "seed", "acc", "ece", "ece_before", "brier", "forecast", "low", "high", "seconds",
    "chosen", "commit", "machine",
)  # fmt: skip
STAGE_FIELDS = (
    "classes",
    "shots",
    "width",
    "views",
    "seconds",
    "cpu_seconds",
    "start_mb",
    "peak_mb",
    "commit",
    "machine",
)
HERE = Path(__file__).parent
NAMED = ["--data.class_names", json.dumps(CLOTHES)]
PAIRS = {  # config, and what is added to it
    "digits+clip": ("clip_16shot.yaml", []),
    "fashion_mnist+clip": ("clip_16shot.yaml", NAMED),
    "rsscn7+vit": ("dinov2_vits14_16shot.yaml", VIT),
    "gtsrb+vit": ("dinov2_vits14_16shot.yaml", SIGNS),
    "fashion_mnist+vit": ("dinov2_vits14_16shot.yaml", VIT),
}
CLASSES = {"rsscn7": 7, "gtsrb": 43, "fashion_mnist": 10}
CLOSED = ("zero_shot", "class_mean", "class_mean_text", "ridge", "gda", "kernel_ridge", "ridge_layers")
HEADS = ("linear_probe", "linear_probe_lbfgs", "tip_adapter_f", "task_res", "coop", "prolip", "2sfs")
GROUPS = (CLOSED, ("auto_30s",), HEADS, ("auto_5m", "lora", "lora_layers"), ("dora", "vera", "randlora", "vpt"))
METHODS = [method for group in GROUPS for method in group]
TEXT = ("zero_shot", "class_mean_text", "tip_adapter_f", "task_res", "coop", "prolip", "2sfs")  # need a text tower
LAYERS = {  # what is added to a method for its features of several layers
    "ridge_layers": ["--model.backbone.features", "last4+mean", "--model.classifier.text", "false"],
    "lora_layers": ["--model.backbone.features", "last4+mean", "--model.classifier", "LinearProbe"],
}
SHOTS, SEEDS = (1, 2, 4, 8, 16), (1, 2, 3)
Cell = tuple[str, int, int]  # method, shots, seed


def arguments(pair: str, method: str, shots: int, options: argparse.Namespace) -> list[str]:
    """What follows ``fit`` for a pair, a method and a number of shots."""
    config, extra = PAIRS[pair]
    data, backbone = pair.split("+")
    words = ["--config", config]
    if not method.startswith("auto_"):
        words += ["--config", f"methods/{method.removesuffix('_layers')}.yaml"]
    words += [*extra, "--data.shots", str(shots)]
    if data != "digits":
        words += ["--data.dataset", str(options.images / data)]
        words += ["--data.sampler", "coop-v1+val"] if method in CHOOSING else []
    if backbone == "vit":
        words += ["--model.backbone.weights", str(options.vit), "--data.views", "4"]
        if method not in (*CLOSED, *HEADS):
            words += ["--trainer.max_epochs", str(min(40, max(4, 2000 // (CLASSES[data] * shots))))]
    words += LAYERS.get(method, [])
    return [*words, "--budget", method.removeprefix("auto_")] if method.startswith("auto_") else words


def rounds(options: argparse.Namespace) -> Iterator[tuple[str, list[Cell]]]:
    """Pairs with the cells that have no row yet, the most telling ones first."""
    there = {file.stem for file in (HERE.parent / "configs" / "methods").glob("*.yaml")}
    there |= {method for method in METHODS if method.startswith("auto_") or method in LAYERS}
    if missing := [method for method in options.methods if method not in there]:
        print(f"Passed over, for configs/methods has none of them: {', '.join(missing)}.", file=sys.stderr)
    done = {tuple(row[name] for name in FIELDS[:4]) for row in rows_of(options.out)}
    first, others = [s for s in options.seeds if s == 1], [s for s in options.seeds if s != 1]
    order = [(group, seeds) for part in (GROUPS[:2], GROUPS[2:]) for seeds in (first, others) for group in part]
    for group, seeds in order:
        for pair in options.only:
            methods = [m for m in group if m in options.methods and m in there and not (m in TEXT and "vit" in pair)]
            cells = [(m, shots, seed) for seed in seeds for shots in options.shots for m in methods]
            cells = [cell for cell in cells if (pair, *map(str, cell)) not in done]
            if cells:
                yield pair, cells


def run_cells(pair: str, cells: Sequence[Cell], options: argparse.Namespace, extra: list[str]) -> None:
    """Runs cells of a pair in this process and appends a row for each; says in a line which are refused."""
    from kshot.commands import run
    from kshot.errors import UserError

    for method, shots, seed in cells:
        with tempfile.TemporaryDirectory() as folder:
            words = ["fit", *arguments(pair, method, shots, options), "--data.split_seed", str(seed)]
            words += ["--seed_everything", str(seed), "--run.root", folder, "--trainer.enable_progress_bar", "false"]
            try:
                cli = run([*words, *extra])
            except UserError as error:
                print(f"passed over: {pair} {method} {shots} {seed}: {error}", file=sys.stderr)
                continue
            result = json.loads((cli.directory / "result.json").read_text())
        chosen, told = result["auto"] or {}, result["forecast"] or {}
        spent = [result["seconds"].get(name, 0) for name in ("fit", "calibrate")]
        row = {name: result.get(name) for name in FIELDS} | {"pair": pair, "method": method, "shots": shots}
        row |= {"seed": seed, "forecast": told.get("accuracy"), "low": told.get("low"), "high": told.get("high")}
        row |= {"seconds": round(sum(spent) + chosen.get("seconds", 0), 2), "chosen": chosen.get("words", "")}
        append(options.out, FIELDS, row | {"commit": result["git_commit"], "machine": machine()})
        said = f"{pair} {method} {shots} shots, seed {seed}: {row['acc']:.1%} in {row['seconds']:.0f} s"
        print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- the stage


def run_stage(classes: int, options: argparse.Namespace) -> None:
    """Judges all closed forms on random features beside texts, chooses and fits; a row of seconds and memory."""
    import open_clip
    import torch

    from kshot.auto import CANDIDATES, Search
    from kshot.classifiers import Shots
    from kshot.config import read_command_line
    from kshot.folds import Judge
    from kshot.record import git_commit
    from kshot.settings import OPTIONS, settings

    class OnRandomFeatures(Search):
        """Takes features of a class as scattered about a point, and no images."""

        began = time.process_time()  # by the processor, as started is by the clock

        def judge(self, tree: dict) -> Judge:
            clocks = time.monotonic(), time.process_time()
            judge = super().judge(tree)
            if not judge.kept:
                wide, chance = judge.backbone.feature_dim, torch.Generator().manual_seed(1)
                label = torch.arange(classes).repeat_interleave(options.stage_shots)
                centre = torch.randn(classes, wide, generator=chance)[label]
                views = [centre + 4 * torch.randn(centre.shape, generator=chance) for _ in range(options.views)]
                judge.label, shots = label, Shots(torch.stack(views), label)
                judge.kept = {("train", False): shots, ("judged", False): Shots(shots.features[:1], label)}
            self.started += time.monotonic() - clocks[0]  # stands for loading a backbone and encoding with it
            self.began += time.process_time() - clocks[1]
            return judge

    name = "random_clip"
    with tempfile.TemporaryDirectory() as folder:
        vision = {"image_size": 32, "patch_size": 16, "width": options.width, "layers": 4, "head_width": 64}
        text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
        config = {"embed_dim": options.width, "vision_cfg": vision, "text_cfg": text}
        (Path(folder) / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
    trained = ("clap", "prolip", "2sfs", "coop", "lora")
    closed = [words for words in CANDIDATES if not any(part in words for part in trained)]
    words = ["fit", "--config", "auto.yaml", "--model.backbone.model", name, "--model.backbone.pretrained", "random"]
    words += ["--budget", "10h", "--candidates", json.dumps(closed)]
    line = read_command_line(words, list(OPTIONS))
    search = OnRandomFeatures(line, settings(line)[1])
    search.data.class_names = [f"class {number}" for number in range(classes)]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, choice = search.run()
    search.trees[choice.words] = settings(read_command_line(search.words_with(choice.words), list(OPTIONS)))[1]
    with search.module(choice.words) as (module, judge):
        judge.parts.clear()  # as a run has let go of all that its choice was made by
        every = torch.arange(len(judge.label))
        judge.closed(module, every, every[:1])
    seconds = {"seconds": search.budget - search.left, "cpu_seconds": time.process_time() - search.began}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"classes": classes, "shots": options.stage_shots, "width": options.width, "views": options.views}
    row |= {name: round(value, 2) for name, value in seconds.items()}
    row |= {"start_mb": start // 1000, "peak_mb": peak // 1000}
    append(options.stage_out, STAGE_FIELDS, row | {"commit": git_commit(), "machine": machine()})


# -------------------------------------------------------------------------------------------------------- the report


def mean_of(rows: Sequence[dict[str, str]], name: str) -> float:
    """The mean of a column."""
    return statistics.mean(float(row[name]) for row in rows)


def by_cell(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str, str], dict[str, dict[str, str]]]:
    """Rows by pair, method and shots, and then by seed."""
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["pair"], row["method"], row["shots"]), {})[row["seed"]] = row
    return found


def gaps(rows: Sequence[dict[str, str]], auto: str, rivals: Sequence[str]) -> dict[tuple[str, str], tuple[float, str]]:
    """By pair and shots, the points by which auto lies above the best rival in hindsight, and which that is.

    Both are means over the seeds of auto; a rival that lacks one of them is left out.
    """
    cells, found = by_cell(rows), {}
    for (pair, method, shots), own in cells.items():
        seeds = {m: cells.get((pair, m, shots), {}) for m in rivals}
        means = {m: mean_of([there[s] for s in own], "acc") for m, there in seeds.items() if own.keys() <= there.keys()}
        if method == auto and means:
            best = max(means, key=lambda m: means[m])
            found[pair, shots] = 100 * (mean_of(list(own.values()), "acc") - means[best]), best
    return found


def accuracies(rows: Sequence[dict[str, str]], pair: str) -> list[str]:
    """The table of a pair: accuracy by method and shots, with the number of seeds where some are missing."""
    cells = by_cell(rows)
    most = max(len(own) for (p, _, _), own in cells.items() if p == pair)
    lines = [f"**{pair}**", "", "| method | " + " | ".join(map(str, SHOTS)) + " | s |", "|---|" + "---|" * 6]
    for method in METHODS:
        own = [cells.get((pair, method, str(shots)), {}) for shots in SHOTS]
        if any(own):
            words = [f"{100 * mean_of(list(c.values()), 'acc'):.1f}" if c else "" for c in own]
            words = [f"{w} ({len(c)})" if w and len(c) < most else w for w, c in zip(words, own, strict=True)]
            timed = [row for row in next(c for c in reversed(own) if c).values() if row["seconds"]]
            seconds = f"{mean_of(timed, 'seconds'):.0f}" if timed else ""
            lines.append(f"| {method} | " + " | ".join(words) + f" | {seconds} |")
    return [*lines, ""]


def told(rows: Sequence[dict[str, str]]) -> list[str]:
    """What a forecast and probabilities are worth, in cells of a table: of rows with a forecast."""
    off = [float(row["forecast"]) - float(row["acc"]) for row in rows]
    inside = [float(row["low"]) <= float(row["acc"]) <= float(row["high"]) for row in rows]
    bias, size = 100 * statistics.mean(off), 100 * statistics.mean(map(abs, off))
    eces = [f"{mean_of(rows, name):.3f}" for name in ("ece_before", "ece")]
    return [str(len(rows)), f"{bias:+.1f}", f"{size:.1f}", f"{statistics.mean(inside):.0%}", *eces]


def report(rows: Sequence[dict[str, str]], stages: Sequence[dict[str, str]]) -> str:
    """All tables in Markdown, and each target with what was measured."""
    lines = [line for pair in PAIRS if any(row["pair"] == pair for row in rows) for line in accuracies(rows, pair)]
    lines += ["Rows from 4 shots on | rows | bias | off by | in the interval | ECE before | ECE after"]
    lines[-1:] = ["| " + lines[-1] + " |", "|---|" + "---|" * 6]
    late = [row for row in rows if int(row["shots"]) >= 4 and row["forecast"]]
    kinds: dict[str, Callable[[dict[str, str]], bool]] = {
        **{pair: lambda row, pair=pair: row["pair"] == pair for pair in PAIRS},
        **{f"{shots} shots": lambda row, shots=shots: row["shots"] == str(shots) for shots in SHOTS},
        "auto": lambda row: row["method"].startswith("auto_"),
        "all": bool,
    }
    for name, fits in kinds.items():
        if some := [row for row in late if fits(row)]:
            lines.append(f"| {name} | " + " | ".join(told(some)) + " |")
    lines += ["", "| target | wanted | measured | of |", "|---|---|---|---|"]
    single = [method for method in METHODS if not method.startswith("auto_")]
    for auto in ("auto_5m", "auto_30s"):
        for what, rivals, least in (("any method", single, -1.0), ("closed form", CLOSED, -2.0)):
            if found := gaps(rows, auto, rivals):
                values = [gap for gap, _ in found.values()]
                (pair, shots), (worst, best) = min(found.items(), key=lambda item: item[1][0])
                wanted = f"{least:+.1f} in the mean" if rivals is single else f"{least:+.1f} at worst"
                measured = f"{statistics.mean(values):+.1f} in the mean, {worst:+.1f} at worst"
                where = f"{len(values)} cells; the worst {pair}, {shots} shots, {best}"
                lines.append(f"| {auto} less the best {what} in hindsight, points | {wanted} | {measured} | {where} |")
    for name, some in (("auto", [row for row in late if kinds["auto"](row)]), ("all", late)):
        if some:
            count, _, size, inside, _, ece = told(some)
            lines.append(f"| forecast less accuracy from 4 shots on, absolute, {name} | 4.0 | {size} | {count} rows |")
            lines.append(f"| accuracies in the interval of 95 %, {name} | 85-98% | {inside} | {count} rows |")
            lines.append(f"| ECE after the temperature, {name} | 0.060 | {ece} | {count} rows |")
    for row in stages:
        wanted = "5 s" if row["classes"] == "100" else "4000 MB"
        what = f"closed forms of {row['classes']} classes x {row['shots']} shots x {row['width']}, {row['views']} views"
        measured = f"{float(row['seconds']):.1f} s ({row['cpu_seconds']} of a core), "
        measured += f"{row['peak_mb']} MB ({row['start_mb']} at the start)"
        lines.append(f"| {what} | {wanted} | {measured} | {row['machine']} |")
    hours = sum(float(row["seconds"] or 0) for row in rows) / 3600
    return "\n".join([*lines, "", f"{len(rows)} rows; {hours:.1f} hours of fitting and choosing."])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with fashion_mnist, rsscn7 and gtsrb")
    parser.add_argument("--vit", type=Path, help="ViT-S/14 weights for timm")
    parser.add_argument("--only", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shots", nargs="+", type=int, default=list(SHOTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "choose.csv")
    parser.add_argument("--report", action="store_true", help="print the tables; run nothing")
    parser.add_argument("--stage", type=int, nargs="*", help="numbers of classes; by default 100 and 1,000")
    parser.add_argument("--stage-shots", type=int, default=16)
    parser.add_argument("--width", type=int, default=768, help="of random features")
    parser.add_argument("--views", type=int, default=1, help="of random features")
    parser.add_argument("--stage-out", type=Path, default=HERE / "results" / "choose_stage.csv")
    parser.add_argument("--in-process", action="store_true", help="start no processes")
    options, extra = parse(parser, given)
    if options.report:
        print(report(rows_of(options.out), rows_of(options.stage_out)))
        return
    if options.stage is None and set(options.only) - {"digits+clip"} and not options.images:
        parser.error("all pairs but digits+clip need --images")
    if options.stage is None and any("vit" in pair for pair in options.only) and not options.vit:
        parser.error("pairs with the ViT need --vit")

    def start(*words: str) -> None:
        own = ["--in-process", "--out", str(options.out), "--stage-out", str(options.stage_out), *words]
        for name in ("images", "vit", "stage_shots", "width", "views"):
            value = getattr(options, name)
            own += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        command = [sys.executable, str(HERE / "choose.py"), *own, "--", *extra]
        threads = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)

    if options.stage is not None:
        for classes in options.stage or (100, 1000):
            run_stage(classes, options) if options.in_process else start("--stage", str(classes))
        return
    if options.in_process:
        for pair, cells in rounds(options):
            run_cells(pair, cells, options, extra)
        return

    def in_a_process(pair: str, cells: Sequence[Cell]) -> None:
        methods, shots, seeds = (list(dict.fromkeys(map(str, each))) for each in zip(*cells, strict=True))
        start("--only", pair, "--methods", *methods, "--shots", *shots, "--seeds", *seeds)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(in_a_process, pair, cells) for pair, cells in rounds(options)]:
            done.result()


if __name__ == "__main__":
    main()
