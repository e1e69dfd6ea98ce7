"""How long a run is for which no length is given."""

import json
import re

import pytest
from command_line import fit, tiny_clip
from lightning.pytorch.callbacks import Callback

from kshot.classifiers import LinearProbe
from kshot.data.datamodule import FewShotDataModule
from kshot.module import FewShotModule
from kshot.optim import epochs_for
from kshot.run import build, make_trainer, set_length
from kshot.run import fit as train

OPEN = ["--config", "methods/linear_probe.yaml", "--trainer.max_epochs", "null"]


def test_steps_grow_with_the_root_of_those_in_an_epoch():
    assert [epochs_for(each) for each in (1, 3, 21, 500, 10**6)] == [90, 52, 20, 4, 1]
    for each in (1, 2, 3, 5, 10, 100):
        assert abs(epochs_for(each) * each - 90 * each**0.5) <= each / 2


def test_the_command_line_follows_it_tells_it_and_records_it(tmp_path, capsys, monkeypatch):
    planned, configure = [], FewShotModule.configure_optimizers

    def configured(self):
        planned.append(int(self.trainer.estimated_stepping_batches))
        return configure(self)

    monkeypatch.setattr(FewShotModule, "configure_optimizers", configured)
    result = json.loads((fit(tmp_path, *OPEN, *tiny_clip()) / "result.json").read_text())
    assert result["steps"] == 90
    assert planned == [90], "what plans by steps"
    (note,) = [note for note in result["notes"] if "length" in note]
    assert "20 images are trained on for 90 steps (90 epochs)" in note
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_epochs", "3"], 3),
        (["--trainer.max_steps", "5"], 5),
        (["--trainer.max_epochs", "3", "--trainer.max_steps", "5"], 3),
        (["--trainer.fast_dev_run", "2"], None),
        (["--data.batch_size", "3"], 128),  # 90 √2 in epochs of 2, of six images
        (["--data.batch_size", "3", "--trainer.accumulate_grad_batches", "2"], 90),  # two batches a step
    ],
)
def test_what_is_given_counts(options, steps, tmp_path, capsys, few_scans):
    words = [*OPEN, *few_scans, *tiny_clip(), *options]
    if steps:
        result = json.loads((fit(tmp_path, *words) / "result.json").read_text())
        assert result["steps"] == steps
    else:
        with pytest.raises(ValueError, match="not enough values"):
            fit(tmp_path, *words)
    told = re.search(r"No length is given", capsys.readouterr().err)
    assert bool(told) == (steps in (90, 128))


def test_a_script_may_ask_for_it(tiny):
    data, ended = FewShotDataModule("digits", shots=1, batch_size=4), []

    class Ends(Callback):
        def on_fit_end(self, trainer, pl_module):
            ended.append((trainer.current_epoch, trainer.global_step))

    trainer = make_trainer(limit_val_batches=0, callbacks=[Ends()])
    assert "10 images are trained on for 128 steps (64 epochs)" in set_length(trainer, data)
    module = build(tiny, data, classifier=LinearProbe)
    train(module, data, trainer)
    assert ended == [(64, 128)]
