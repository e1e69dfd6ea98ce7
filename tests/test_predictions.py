"""What a test answered, image by image, against what the run says of itself and against its module."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from command_line import UNTESTED, WHOLE, fit
from pyarrow import parquet
from torchmetrics.functional.classification import multiclass_calibration_error

from kshot.calibration import Calibration
from kshot.data import FewShotDataModule
from kshot.errors import UserError
from kshot.opening import open_run
from kshot.predictions import FILE, TOP, Answers, read, write


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A calibrated run that was tested on all scans."""
    root = tmp_path_factory.mktemp("runs")
    return fit(root, "--config", "methods/gda.yaml", "--data.shots", "4", "--run.calibrate", "true", *WHOLE)


def whole(answered):
    """Probabilities in label order, (N, 10)."""
    found = np.zeros_like(answered.probabilities)
    np.put_along_axis(found, answered.answers, answered.probabilities, 1)
    return torch.from_numpy(found)


def test_figures_made_of_the_answers_are_those_of_the_run(tested):
    answered, result = read(tested), json.loads((tested / "result.json").read_text())
    assert result["predictions"] == FILE
    assert len(answered.label) == result["tested"]["test"] == 539
    assert answered.right.mean() == pytest.approx(result["acc"])
    assert (answered.zero_shot == answered.label).mean() == pytest.approx(result["zero_shot_acc"])
    assert result["calibration"]["temperature"] != 1
    label, found = torch.tensor(answered.label).long(), whole(answered)
    assert float(multiclass_calibration_error(found, label, 10, n_bins=15)) == pytest.approx(result["ece"], abs=1e-5)
    squares = (found - torch.nn.functional.one_hot(label, 10)).square().sum(1).mean()
    assert float(squares) == pytest.approx(result["brier"], abs=1e-5)
    with (tested / "per_class.csv").open() as file:
        for row in csv.DictReader(file):
            mine = answered.label == int(row["label"])
            assert answered.right[mine].mean() == pytest.approx(float(row["accuracy"]), abs=1e-6)
            assert answered.class_names[int(row["label"])] == row["class_name"]


def test_rows_are_what_the_module_answers_to_these_images(tested):
    opened, answered = open_run(tested), read(tested)
    data = FewShotDataModule("digits", shots=4)
    data.use_preprocessing(opened.module.backbone.preprocessing)
    data.setup("test")
    part = data.part("test")
    assert answered.index.tolist() == list(range(539))
    assert answered.path == part.paths
    assert answered.image == part.source.digests(part.paths)
    assert answered.label.tolist() == part.labels.tolist()
    with torch.inference_mode():
        logits = opened.module(part.images([(i, 0) for i in range(50)])) / opened.module.calibration.temperature
    torch.testing.assert_close(whole(answered)[:50], logits.softmax(1), rtol=1e-3, atol=1e-5)
    table = parquet.read_table(tested / FILE)[:50]
    assert table["energy"].to_numpy() == pytest.approx(logits.logsumexp(1).numpy(), rel=1e-4)
    of_label = logits.softmax(1).gather(1, part.labels[:50, None])[:, 0]
    assert table["label_probability"].to_numpy() == pytest.approx(of_label.numpy(), abs=1e-5)
    assert table["correct"].to_pylist() == (logits.argmax(1) == part.labels[:50]).tolist()


def test_each_test_set_has_its_own_answers(tmp_path):
    run = fit(tmp_path, "--data.protocol", "base-to-new", "--config", "methods/zero_shot.yaml", *WHOLE)
    result = json.loads((run / "result.json").read_text())
    for name, classes in (("base", ["zero", "one"]), ("new", ["five", "six"])):
        answered = read(run, name)
        assert answered.class_names[:2] == classes
        assert answered.right.mean() == pytest.approx(result["test_sets"][name]["acc"])
        assert answered.answers.shape[1] == 5
    assert read(run).name == "base"
    with pytest.raises(UserError, match=r"was not tested on 'old'. There are: base, new"):
        read(run, "old")


def test_a_test_that_is_cut_short_keeps_what_it_saw(tmp_path):
    run = fit(tmp_path, "--config", "methods/zero_shot.yaml")
    assert read(run).index.tolist() == list(range(16))


def test_a_run_without_a_test_keeps_none(tmp_path):
    run = fit(tmp_path, "--config", "methods/zero_shot.yaml", *UNTESTED)
    with pytest.raises(UserError, match=r"has no predictions.parquet.* --ckpt_path .*tuned.safetensors"):
        read(run)


def some(labels=3, classes=12, zero_shot=None):
    generator = torch.Generator().manual_seed(0)
    answers = Answers()
    logits = torch.randn(labels, classes, generator=generator)
    answers.add(torch.arange(labels), torch.arange(labels), logits, Calibration(2.0), zero_shot)
    part = SimpleNamespace(paths=["a\udcff.png", "b|c.png", "d.png"], row_keys=lambda: ["0", "1", "2"])
    return answers.whole(), part, logits


def test_of_many_classes_the_likeliest_are_kept(tmp_path):
    found, part, logits = some()
    write(tmp_path / FILE, {"test": (found, part)}, {"test": [f"c{i}" for i in range(12)]})
    answered = read(tmp_path)
    values, ranked = (logits / 2).softmax(1).sort(dim=1, descending=True)
    assert answered.answers.tolist() == ranked[:, :TOP].tolist()
    assert answered.probabilities == pytest.approx(values[:, :TOP].numpy())
    assert answered.zero_shot is None
    assert answered.path == ["a\\udcff.png", "b|c.png", "d.png"], "names that are no UTF-8 are written out"


def test_equal_logits_are_taken_as_accuracy_takes_them():
    answers, logits = Answers(), torch.zeros(1, 300)
    logits[0, 5:200] = 1.0
    answers.add(torch.tensor([0]), torch.tensor([0]), logits, Calibration(), None)
    first, *others = answers.whole()["answers"][0].tolist()
    assert first == logits.argmax(1)
    assert len({first, *others} & set(range(5, 200))) == TOP


def test_answers_of_several_devices_come_in_the_order_of_the_images(monkeypatch):
    """Each device saw every other image, and one may have seen none."""
    parts = []
    for rank in range(2):
        answers = Answers()
        logits = torch.eye(4)[torch.arange(rank, 4, 2)]
        answers.add(torch.arange(rank, 4, 2), torch.arange(rank, 4, 2), logits, Calibration(), logits)
        parts.append(answers)

    def gather(into, own):
        into[:] = [parts[0].whole(), {}, own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    found = parts[1].whole(devices=3)
    assert found["index"].tolist() == found["answers"][:, 0].tolist() == found["zero_shot"].tolist() == [0, 1, 2, 3]


def test_what_is_no_file_of_answers_gets_one_line(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is damaged or cannot be read"):
        read(tmp_path)
    parquet.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="is no file of answers that kshot wrote"):
        read(tmp_path)
    about = {"format": 2, "class_names": {"test": ["a"]}}
    parquet.write_table(pa.table({"a": [1]}).replace_schema_metadata({b"kshot": json.dumps(about)}), path)
    with pytest.raises(UserError, match=r"by a newer kshot \(format 2, and this one reads 1\)"):
        read(tmp_path)
    about["format"] = 1
    parquet.write_table(pa.table({"a": [1]}).replace_schema_metadata({b"kshot": json.dumps(about)}), path)
    with pytest.raises(UserError, match="is damaged or cannot be read"):
        read(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    found, part, _ = some()
    write(tmp_path / FILE, {"test": (found, part)}, {"test": [str(i) for i in range(12)]})
    before = (tmp_path / FILE).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / FILE, {"test": (found, part)}, {"test": [str(i) for i in range(12)]})
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before
