"""Every method on four data sets, 16 shots, seeds 1-3: the tables of docs/methods.md.

    python benchmarks/methods.py --data ../shared/data --weights vits14.safetensors

digits and clothes (fashion_mnist) with the carried CLIP, whose text the classifiers use; satellite scenes (rsscn7) and
traffic signs (gtsrb) with a trained ViT-S/14 at 56 pixels and a linear head, for the methods that need no text. What
trains little but a head takes the epochs of its own config. Every run is an ordinary ``kshot fit`` by few_shot.py; rows
that are there already are not run again. The tables are written between the markers of docs/methods.md.
"""

import argparse
import io
import json
import statistics
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from few_shot import main as few_shot
from few_shot import rows_of

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "methods.md"
CLOSED = ["class_mean", "linear_probe_lbfgs"]  # and without text
CHOOSING = ["linear_probe_lbfgs", "tip_adapter", "tip_adapter_f", "lp_plus_plus"]  # by validation images
HEADS = [*CLOSED, "linear_probe"]
TEXT = [
    "tip_adapter", "tip_adapter_f", "clip_adapter", "task_res", "lp_plus_plus", "coop", "cocoop", "kgcoop", "maple",
    "ivlp", "promptsrc", "dept",
]  # fmt: skip
TUNING = [
    "lora", "dora", "adalora", "autolora", "pissa", "svft", "lora_xs", "hydralora", "pranc", "nola", "vera", "randlora",
    "full", "bitfit", "layernorm",
]  # fmt: skip
METHODS = ["zero_shot", *HEADS, "vpt", *TEXT, *TUNING]
VIT = ["--model.backbone.image_size", "56", "--trainer.precision", "bf16-mixed", "--data.eval_batch_size", "64"]
CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SIGNS = [*VIT, "--data.augment.flip", "0", "--data.augment.scale", "[0.7,1.0]"]
CASES = {
    "digits": ("kshot:glyph_clip, 40 epochs", "clip_16shot.yaml", []),
    "fashion_mnist": ("kshot:glyph_clip, 40 epochs", "clip_16shot.yaml", ["--data.class_names", json.dumps(CLOTHES)]),
    "rsscn7": ("ViT-S/14 at 56 pixels, linear head, 20 epochs", "dinov2_vits14_16shot.yaml", VIT),
    "gtsrb": ("ViT-S/14 at 56 pixels, linear head, 4 epochs", "dinov2_vits14_16shot.yaml", SIGNS),
}
EPOCHS = {"rsscn7": "20", "gtsrb": "4"}
RUN_ON = {
    "digits": METHODS,
    "fashion_mnist": ["zero_shot", *HEADS, "vpt", *TEXT, "lora"],
    "rsscn7": [*HEADS, "vpt", *TUNING],
    "gtsrb": ["class_mean", "linear_probe", "vpt", *TUNING],  # 16 training images a class: none left over to choose by
}


def arguments(case: str, method: str, options: argparse.Namespace) -> list[str]:
    """What a case adds to its config."""
    _, _, extra = CASES[case]
    if case == "digits":
        return extra
    own = [*extra, "--data.dataset", str(options.data / case)]
    if method in CHOOSING:
        own += ["--data.sampler", "coop-v1+val"]  # the same shots, and others to choose by
    if case == "fashion_mnist":
        return own
    own += ["--model.backbone.weights", str(options.weights)]
    return own if method in HEADS else [*own, "--trainer.max_epochs", EPOCHS[case]]


def table(case: str, rows: list[dict[str, str]]) -> list[str]:
    """One case's table in Markdown, in the order of METHODS."""
    title, config, _ = CASES[case]
    lines = [f"**{case}**, {title} (`{config}`)", ""]
    lines += ["| method | accuracy | trainable | file bytes | fit s | peak MB |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        found = [row for row in rows if (row["config"], row["method"]) == (f"methods_{case}", method)]
        if not found:
            continue
        accuracy = [100 * float(row["acc"]) for row in found]
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        seconds = statistics.mean(float(row["fit_seconds"]) for row in found)
        trainable = round(statistics.mean(int(row["trainable_parameters"]) for row in found))
        size = round(statistics.mean(int(row["checkpoint_bytes"] or 0) for row in found))
        memory = min(int(row["peak_memory_mb"]) for row in found)  # of the first run in its process
        cells = (
            f"{statistics.mean(accuracy):.1f}{spread}",
            f"{trainable:,}",
            f"{size:,}",
            f"{seconds:.0f}",
            f"{memory:,}",
        )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with fashion_mnist, rsscn7 and gtsrb")
    parser.add_argument("--weights", type=Path, help="ViT-S/14 weights for timm")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "methods.csv")
    parser.add_argument("--page", type=Path, default=DOC, help="has markers around the tables")
    options = parser.parse_args(given)
    if set(options.cases) - {"digits"} and None in (options.data, options.weights):
        parser.error("all cases but digits need --data and --weights")
    for case in options.cases:
        for method in [m for m in RUN_ON[case] if m in options.methods]:
            words = ["--config", CASES[case][1], "--methods", method, "--shots", "16", "--seeds", *options.seeds]
            words += ["--out", str(options.out), "--label", f"methods_{case}"]
            with redirect_stdout(io.StringIO()):  # a table of its own
                few_shot([*words, "--", *arguments(case, method, options)])
    lines = [line for case in CASES for line in table(case, rows_of(options.out))]
    before, rest = options.page.read_text(encoding="utf-8").split("<!-- table -->\n", 1)
    _, after = rest.split("<!-- end of table -->\n", 1)
    text = "\n".join(lines)
    options.page.write_text(f"{before}<!-- table -->\n{text}\n<!-- end of table -->\n{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
