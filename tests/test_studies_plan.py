"""Study files and plans: ids that say what a run computes, and mistakes that are told before anything starts."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import HEAD, plan

from kshot.building import data_of
from kshot.config import read_command_line
from kshot.data import datamodule
from kshot.errors import UserError
from kshot.files import packaged_folder
from kshot.layering import written_out
from kshot.settings import OPTIONS
from kshot.settings import settings as resolve
from kshot.studies import plan as planning
from kshot.studies.resolving import NO_MATTER, Resolver, as_json, joined
from kshot.studies.study import read_study

GRID = """grid:
  method: [ridge, {coop-2: {configs: [methods/coop.yaml], options: {model.classifier.context_length: 2}}}, lora]
  shots: [1, 2]
  seed: [1, 2]
  model.optimizer.lr: [1e-3, 2e-3]
leave_out: [{method: [ridge, lora], model.optimizer.lr: 2e-3}, {method: lora, shots: 1}]
"""


def test_a_plan_has_every_cell_with_the_words_of_its_run(tmp_path):
    runs = plan(tmp_path, HEAD + GRID)
    cells = [tuple(run.axes.values()) for run in runs]
    assert [cell for cell in cells if cell[0] == "lora"] == [("lora", 2, 1, "1e-3"), ("lora", 2, 2, "1e-3")]
    assert len(cells) == len({run.id for run in runs}) == 4 + 8 + 2
    (run,) = [run for run in runs if tuple(run.axes.values()) == ("coop-2", 2, 1, "2e-3")]
    assert [word for word in run.words if "config" in word] == [
        "--config=clip_16shot.yaml",
        "--config=methods/coop.yaml",
    ]
    assert run.words[-5:] == [
        "--model.classifier.context_length=2",
        "--data.shots=2",
        "--data.split_seed=1",
        "--seed_everything=1",
        "--model.optimizer.lr=2e-3",
    ]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_cells_share_comes_to_what_the_command_line_makes_of_each(tmp_path_factory, data):
    """The settings of a cell, put together from shared text, are those that its own words resolve to."""
    folder = tmp_path_factory.mktemp("cells")
    axes = {
        "method": ["class_mean", "coop", "lora"],
        "shots": [1, "2", None],
        "seed": [3, 4],
        "data.batch_size": [8, "16"],
        "data.augment.flip": [0, 0.5, "5e-1"],
        "model.schedule.warmup_steps": [0, 3],
        "data.template": ["a {}", {"two": {"options": {"data.template": ["a {}.", "{}!"]}}}],
        "model.head_lr": ["1e-3", 0.01],
        "protocol": ["all-to-all", "base-to-new"],
    }
    chosen = data.draw(st.lists(st.sampled_from(sorted(set(axes) - {"method"})), unique=True, max_size=4))
    order = data.draw(st.permutations(["method", *chosen]))
    (folder / "cells.yaml").write_text(HEAD + json.dumps({"grid": {axis: axes[axis] for axis in order}})[1:-1])
    study = read_study(str(folder / "cells.yaml"))
    resolver = Resolver(study)
    cells = [(s, *each) for s in resolver.shared({}, list(study.axes)) for each in resolver.cells(s)]
    for shared, cell, values in random.Random(0).sample(cells, min(4, len(cells))):
        full = written_out(*resolve(read_command_line(["fit", *study.words(cell)], list(OPTIONS))))
        full["data"] = full["data"]["init_args"]
        for group, names in NO_MATTER.items():
            full[group] = {name: value for name, value in full[group].items() if name not in names}
        assert joined(shared.settings, values) == as_json(full)


def test_an_id_stays_when_an_axis_is_added_and_when_nothing_that_matters_changes(tmp_path):
    before = {run.id for run in plan(tmp_path, HEAD + "grid: {method: [ridge], shots: [1, 2]}")}
    more = {run.id for run in plan(tmp_path, HEAD + "grid: {shots: [4, 2, 1], seed: [2, 1], method: [gda, ridge]}")}
    assert len(before) == 2
    assert before < more
    elsewhere = HEAD.replace("options: {", "options: {data.num_workers: 1, data.root: /data, run.save_every: 3, ")
    assert {run.id for run in plan(tmp_path, elsewhere + "grid: {method: [ridge], shots: [1, 2]}")} == before
    for other in ("data.sampler: nested", "trainer.precision: bf16-mixed", "data.fit: pad"):
        changed = HEAD.replace("options: {", f"options: {{{other}, ")
        assert not {run.id for run in plan(tmp_path, changed + "grid: {method: [ridge], shots: [1, 2]}")} & before


def test_an_id_depends_on_the_images_and_on_the_weights(tmp_path, monkeypatch):
    text = HEAD + "grid: {method: [ridge], shots: [1, 2], seed: [1, 2]}"
    before = {run.id for run in plan(tmp_path, text)}
    with monkeypatch.context() as patch:
        draw = planning.draw
        patch.setattr(planning, "draw", lambda split, shots, seed, *rest: draw(split, shots, seed + 1, *rest))
        assert len({run.id for run in plan(tmp_path, text)} & before) == 1  # the first is drawn by its data module
    weights = HEAD.replace("options: {", "options: {model.backbone.model: test_vit, model.backbone.weights: random, ")
    vit = weights.replace("options: {", "options: {model.backbone: Timm, ") + "grid: {method: [ridge], shots: [1]}"
    assert plan(tmp_path, vit)[0].id == plan(tmp_path, vit)[0].id
    with monkeypatch.context() as patch:
        made = planning.backbone_of
        patch.setattr(planning, "backbone_of", lambda tree: setattr(b := made(tree), "weight_sha256", "x") or b)
        assert not {run.id for run in plan(tmp_path, text)} & before


def test_splits_of_a_plan_are_those_of_the_runs(tmp_path, monkeypatch):
    """What is drawn without a data module is what a data module draws."""
    found = {}
    plan_of = planning.Planner.draw_from
    monkeypatch.setattr(
        planning.Planner, "draw_from", lambda self, same: (plan_of(self, same), found.update(self.splits), None)[-1]
    )
    grid = "grid: {shots: [1, 3, null], seed: [1, 7], data.sampler: [coop-v1, nested], data.test_share: [0.3]}"
    runs = plan(tmp_path, HEAD + grid)
    digests = {text.partition(" {")[0].partition(" [")[0] for text in found.values()}
    expected = set()
    for run in runs:
        _, tree = resolve(read_command_line(["fit", *run.words], list(OPTIONS)))
        expected.add(data_of(tree).draw.digest)
    assert digests == expected
    assert len(expected) > 6


def test_a_plan_reads_images_and_builds_backbones_once(tmp_path, monkeypatch):
    built, drawn = [], []
    make, init = planning.backbone_of, datamodule.FewShotDataModule.__init__
    monkeypatch.setattr(planning, "backbone_of", lambda tree: built.append(1) or make(tree))
    monkeypatch.setattr(
        datamodule.FewShotDataModule, "__init__", lambda self, *a, **k: drawn.append(1) or init(self, *a, **k)
    )
    runs = plan(tmp_path, HEAD + "grid: {method: [ridge, gda, coop], shots: [1, 2], seed: [1, 2, 3]}")
    assert (len(runs), len(built), len(drawn)) == (18, 1, 1)


def test_runs_of_one_backbone_and_data_set_follow_each_other(tmp_path):
    text = "grid: {method: [ridge, gda], model.backbone.features: [default, last4+mean], shots: [1, 2]}"
    runs = plan(tmp_path, HEAD.replace("options: {", "options: {model.classifier.text: false, ") + text)
    groups = [run.group for run in runs]
    assert len(set(groups)) == 2
    assert groups == sorted(groups, key=groups.index)


def test_a_data_set_that_is_not_there_is_told(tmp_path):
    file = tmp_path / "far.yaml"
    file.write_text(HEAD + "grid: {method: [ridge], dataset: [digits, dtd]}")
    planner = planning.Planner(read_study(str(file)))
    planner.runs()
    assert ["dtd" in note and "would fail" in note for note in planner.notes] == [True]
    file.write_text(HEAD.replace("options: {", "options: {data.download: true, ") + "grid: {dataset: [digits, dtd]}")
    planner = planning.Planner(read_study(str(file)))
    planner.runs()
    assert planner.notes == ["dtd is not below data: the first run downloads it."]


BAD = {
    "grid: {method: [rigde]}": "grid.method: there is no method 'rigde'. Did you mean 'ridge'?",
    "grid: {methods: [ridge]}": "grid.methods: an axis is one of these, or an option in full. Did you mean 'method'?",
    "grid: {shots: []}": "grid.shots must be a list of one value or more, and is []",
    "grid: {shots: 4}": "grid.shots must be a list of one value or more, and is 4",
    "grids: {shots: [4]}": "a study has no 'grids'. Did you mean 'grid'?",
    "options: {}": "grid must name axes",
    "grid: {shots: [1, 1]}": "grid.shots: 1 is there twice",
    "grid: {method: [{a: 3}]}": "must be one label, with its configs, its options, or both",
    "grid: {method: [{a: {confgs: []}}]}": "must be one label",
    "grid: {data.shots: [[1, 2]]}": "a value that is a list needs a label",
    "grid: {method: [lora]}\noptions: {run.root: x}": "run.root is given by the study itself",
    "grid: {run.name: [x]}": "run.name is given by the study itself",
    "grid: {method: [lora]}\nleave_out: [{method: ridge}]": "leave_out: the axis method has no 'ridge'",
    "grid: {method: [lora]}\nleave_out: [{mthod: lora}]": "the grid has no axis 'mthod'. Did you mean 'method'?",
    "grid: {method: [lora]}\nleave_out: [{method: lora}]": "leave_out leaves nothing to run",
    "grid: {method: [lora]}\nleave_out: {method: lora}": "leave_out must be a list of cells",
    "grid: {method: [ridge], model.adapter.rank: [2]}": "model.adapter.rank 2: model.adapter needs a class",
    "grid: {shots: [a]}": "shots a: data.shots: Expected int or null",
    "grid: {shots: [1, 1000]}": "shots 1000: digits: 1000 shots asked for",
    "grid: {dataset: [digits, nosuch]}": "dataset nosuch: unknown data set 'nosuch'",
    "grid: {seed: [-1]}": "seed -1: data.split_seed is -1",
    "grid: {model.adapter: [LoRA, LoRAA]}": "model.adapter LoRAA: model.adapter: there is no Adapter 'LoRAA'",
    "grid: {method: [ridge, {again: {configs: [methods/ridge.yaml]}}]}": (
        "two cells are the same run: (method ridge) and (method again)"
    ),
    "grid: {model.optimizer.lr: [1e-3, 0.001]}": "two cells are the same run",
    "grid: {method: [ridge], data.num_workers: [0, 1]}": "two cells are the same run",
}


@pytest.mark.parametrize("text", BAD)
def test_a_mistake_is_told_with_its_place(tmp_path, text):
    with pytest.raises(UserError) as told:
        plan(tmp_path, ("" if "options" in text else HEAD) + text)
    assert BAD[text] in str(told.value)
    assert str(told.value).startswith(str(tmp_path / "tiny.yaml"))
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["tiny.yaml"], "something was begun"


def test_a_cell_that_is_left_out_need_not_be_possible(tmp_path):
    text = "grid: {method: [ridge, lora], model.adapter.rank: [2, 4]}\nleave_out: [{method: ridge}]"
    assert [run.axes["model.adapter.rank"] for run in plan(tmp_path, HEAD + text)] == [2, 4]


def test_the_studies_that_come_with_kshot_can_be_planned():
    files = sorted((packaged_folder("configs") / "studies").glob("*.yaml"))
    assert files
    for file in files:
        runs = planning.Planner(read_study(f"studies/{file.stem}")).runs()
        assert len(runs) > 50
