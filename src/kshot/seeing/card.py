"""A model card: what a run is, on what it was adapted, how good it is, and under which terms it may be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kshot.predictions import Answered
from kshot.seeing.statistics import wilson

UNSAID = "not stated"


def card(result: Mapping[str, Any], answered: Answered | None, licence: str = "", data_licence: str = "") -> str:
    """A model card in Markdown, with the header that Hugging Face's hub reads.

    Args:
        result: of the run.
        answered: to its test set; None where it was not tested.
        licence: of what was trained, by its SPDX name in lower case.
        data_licence: of the images.
    """
    split, accuracy, versions = result.get("split") or {}, result.get("acc"), result.get("versions") or {}
    about: dict[str, Any] = {
        "library_name": "kshot",
        "pipeline_tag": "image-classification",
        "tags": ["kshot", "few-shot", str(result["method"])],
        "license": licence or "unknown",
    }
    if accuracy is not None:
        metric = {"type": "accuracy", "value": round(float(accuracy), 4)}
        task = {"type": "image-classification"}
        data = {"name": str(result["dataset"]), "type": str(result["dataset"]), "split": "test"}
        results = [{"task": task, "dataset": data, "metrics": [metric]}]
        about["model-index"] = [{"name": f"{result['method']} on {result['dataset']}", "results": results}]
    header = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in about.items())  # is YAML
    rows = {
        "method": result["method"],
        "backbone": f"{result.get('backbone')}, weights `{str(result.get('backbone_sha256'))[:16]}`",
        "data set": result["dataset"],
        "images": f"{drawn(split)}, {(split.get('counts') or {}).get('train')} in all, seed {split.get('seed')}",
        "digest of the draw": f"`{split.get('digest')}`",
        "digest of the images": f"`{split.get('images_sha256')}`",
        "protocol": result.get("protocol"),
        "trainable parameters": f"{result.get('trainable_parameters', 0):,} of {result.get('total_parameters', 0):,}",
        **measured(result, answered),
        "licence": licence or UNSAID,
        "licence of the images": data_licence or UNSAID,
        "licence of the backbone": f"that of {result.get('backbone')}: see where its weights come from",
        "made by": f"kshot {versions.get('kshot')}, torch {versions.get('torch')}",
    }
    table = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows.items())
    names = ", ".join(answered.class_names) if answered else ""
    classes = f"\n## Classes\n\n{cell(names)}\n" if names else ""
    return f"""---
{header}
---

# {cell(result["method"])} on {cell(result["dataset"])}

Adapted by kshot from a few images a class. The files hold what was trained and
nothing of the backbone, whose weights are fetched from where they were published.

| | |
|---|---|
{table}

## Use

```python
import kshot

run = kshot.load("hf://ORG/NAME")  # reads tensors and settings, and runs no code of theirs
```
{classes}
## Limits

It knows these classes only, and answers with one of them whatever it is shown. Its accuracy was measured on images
like those that it was adapted on; on others it may be anything.
"""


def drawn(split: Mapping[str, Any]) -> str:
    """How many images a class there were."""
    return f"{split['shots']} a class ({split.get('sampler')})" if split.get("shots") else str(split.get("sampler"))


def measured(result: Mapping[str, Any], answered: Answered | None) -> dict[str, str]:
    """Accuracy with its interval, and calibration."""
    if answered is None:
        return {"accuracy": "not tested"}
    right, images = int(answered.right.sum()), len(answered.label)
    low, high = wilson(right, images)
    figures = (result.get("test_sets") or {}).get(answered.name, {})
    found = {"accuracy": f"{right / images:.1%} of {images:,} test images (95 % interval {low:.1%} to {high:.1%})"}
    if figures.get("zero_shot_acc") is not None:
        found["zero-shot accuracy"] = f"{figures['zero_shot_acc']:.1%}"
    temperature = (result.get("calibration") or {}).get("temperature")
    told = "temperature 1, not calibrated" if temperature is None else f"temperature {temperature:.3g}"
    if figures.get("ece") is not None:
        found["calibration"] = f"error (ECE) {figures['ece']:.2%}, Brier's score {figures['brier']:.4f}; {told}"
    return found


def cell(value: Any) -> str:
    """Text that a table of Markdown takes as it is."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
