"""Checkpoints: a failed write costs nothing, a file runs no code, and what does not fit is refused with a reason."""

import json
import math
import pickle
import resource
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kshot.adapters import LoRA
from kshot.checkpoint import AtomicCheckpoints, check_numbers, check_tensors, read_tensors, write_tensors
from kshot.errors import UserError
from kshot.header import check_fits, check_same_run, described, first_difference

HEADER = {
    "method": "LoRA",
    "backbone": "ViT",
    "backbone_sha256": "a" * 64,
    "class_names": ["cat", "dog"],
    "model": {"classifier": {"class": "CoOp", "position": "end"}, "adapter": None, "targets": None},
    "frozen": [],
    "split": None,
    "training": {"seed_everything": 1, "model": {"optimizer": {"lr": 0.002}}, "data": {"shots": 4, "batch_size": 32}},
}


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def one_line(error) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_disk_that_is_really_full(tmp_path, kind):
    """The libraries' own writers, under a limit on the size of files: whatever they raise ends as one line."""
    path = tmp_path / f"last.{kind}"

    def write(tensors):
        if kind == "ckpt":
            AtomicCheckpoints().save_checkpoint({"state_dict": tensors}, path)
        else:
            write_tensors(path, tensors, HEADER)

    write({"a": torch.ones(3)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError) as raised:
            write({"a": torch.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in one_line(raised)
    assert path.read_bytes() == before
    assert files(tmp_path) == [path.name]


class TestTensors:
    def test_round_trip(self, tmp_path):
        tensors = {
            "a": torch.randn(3, 4),
            "transposed": torch.randn(3, 4).T,
            "half": torch.randn(2).bfloat16(),
            "count": torch.tensor(7),
            "trained": torch.nn.Parameter(torch.randn(2)),
        }
        header = HEADER | {"class_names": ["größe", "犬"], "split": {"seed": 1}}
        write_tensors(tmp_path / "tuned.safetensors", tensors, header)
        loaded, read = read_tensors(tmp_path / "tuned.safetensors")
        assert read == header | {"dtypes": ["bfloat16", "float32", "int64"]}
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
            assert not loaded[name].requires_grad

    def test_views_of_one_storage_are_kept_apart(self, tmp_path):
        whole = torch.arange(6.0).view(3, 2)
        write_tensors(tmp_path / "t.safetensors", {"a": whole[:1], "b": whole[1:]}, HEADER)
        loaded, _ = read_tensors(tmp_path / "t.safetensors")
        assert loaded["a"].tolist() == [[0, 1]]
        assert loaded["b"].tolist() == [[2, 3], [4, 5]]

    def test_a_file_of_another_program(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="not written by kshot") as raised:
            read_tensors(tmp_path / "other.safetensors")
        one_line(raised)


RAN: list[str] = []


class Malicious:
    def __reduce__(self):
        return (RAN.append, ("code ran",))


class TestLoading:
    def test_round_trip(self, tmp_path):
        checkpoint = {"state_dict": {"a": torch.randn(3)}, "epoch": 2, "kshot": HEADER, "loops": {"x": [1, 2.5, None]}}
        plugin = AtomicCheckpoints()
        plugin.save_checkpoint(checkpoint, str(tmp_path / "last.ckpt"))
        loaded = plugin.load_checkpoint(tmp_path / "last.ckpt")
        assert torch.equal(loaded.pop("state_dict")["a"], checkpoint.pop("state_dict")["a"])
        assert loaded == checkpoint
        assert files(tmp_path) == ["last.ckpt"]

    def test_safetensors_are_checkpoints_of_weights(self, tmp_path):
        write_tensors(tmp_path / "tuned.safetensors", {"a": torch.ones(2)}, HEADER)
        loaded = AtomicCheckpoints().load_checkpoint(tmp_path / "tuned.safetensors")
        assert loaded["kshot"] == HEADER | {"dtypes": ["float32"]}
        assert torch.equal(loaded["state_dict"]["a"], torch.ones(2))
        assert "pytorch-lightning_version" in loaded

    def test_torch_load_is_told_weights_only(self, tmp_path, monkeypatch):
        torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
        seen, load = [], torch.load
        monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k) or load(*a, **k))
        AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
        assert [k["weights_only"] for k in seen] == [True]

    @pytest.mark.parametrize("writer", ["torch", "pickle"])
    def test_code_is_refused_and_not_run(self, tmp_path, writer):
        path = tmp_path / "last.ckpt"
        if writer == "torch":
            torch.save({"state_dict": Malicious()}, path)
        else:
            path.write_bytes(pickle.dumps({"state_dict": Malicious()}))
        with pytest.raises(UserError) as raised:
            AtomicCheckpoints().load_checkpoint(path, weights_only=False)
        assert RAN == []
        assert str(path) in one_line(raised)

    @pytest.mark.parametrize("name", ["last.ckpt", "tuned.safetensors"])
    def test_missing_empty_and_cut_files(self, tmp_path, name):
        path, plugin = tmp_path / name, AtomicCheckpoints()
        with pytest.raises(UserError, match="no checkpoint") as raised:
            plugin.load_checkpoint(path)
        assert str(path) in one_line(raised)
        if name.endswith("ckpt"):
            plugin.save_checkpoint({"state_dict": {"a": torch.randn(100)}}, path)
        else:
            write_tensors(path, {"a": torch.randn(100)}, HEADER)
        whole = path.read_bytes()
        for cut in (0, 1, len(whole) // 2, len(whole) - 10):
            path.write_bytes(whole[:cut])
            with pytest.raises(UserError) as raised:
                plugin.load_checkpoint(path)
            assert str(path) in one_line(raised)


def tensors(*names, shape=(2,)):
    return {name: torch.zeros(shape) for name in names}


class TestFits:
    def refused(self, saved=("a",), wanted=("a",), **changes) -> str:
        def check():
            check_fits(HEADER | changes, HEADER)
            check_tensors(tensors(*saved), tensors(*wanted))

        with pytest.raises(UserError) as raised:
            check()
        return one_line(raised)

    def test_what_fits(self):
        check_fits(dict(HEADER), HEADER)
        check_fits(HEADER | {"split": {"seed": 3}, "kshot": "0.0.1"}, HEADER)
        check_tensors(tensors("a", "b"), tensors("b", "a"))

    def test_another_backbone(self):
        message = self.refused(backbone="ResNet", backbone_sha256="b" * 64)
        assert "ResNet" in message
        assert "b" * 12 in message
        assert "ViT" in message
        assert "a" * 12 in message

    def test_other_weights_of_the_same_backbone(self):
        assert "b" * 12 in self.refused(backbone_sha256="b" * 64)

    def test_another_method(self):
        message = self.refused(method="CoOp")
        assert "trained by CoOp" in message
        assert "says LoRA" in message

    def test_other_classes(self):
        assert "3 classes apart (cat, dog, cow" in self.refused(class_names=["cat", "dog", "cow"])
        assert "dog, cat" in self.refused(class_names=["dog", "cat"]), "the order is the meaning of a label"

    def test_other_tensors(self):
        assert "1 missing, such as b" in self.refused(saved=("a",), wanted=("a", "b"))
        assert "2 unknown, such as x" in self.refused(saved=("a", "y", "x"), wanted=("a",))
        both = self.refused(saved=("x",), wanted=("a",))
        assert "1 missing, such as a" in both
        assert "1 unknown, such as x" in both

    def test_other_shapes(self):
        saved, wanted = tensors("a", "b", shape=(2, 3)), tensors("a") | tensors("b", shape=(2, 3))
        with pytest.raises(UserError) as raised:
            check_tensors(saved, wanted)
        assert "a is (2, 3) there and (2,) here" in one_line(raised)

    @pytest.mark.parametrize("form", [3, 2])
    def test_another_setting_of_the_adapter(self, form):
        adapter = {"rank": 8, "alpha": None, "dropout": 0.1, "scale": 1.0}

        def header(**changes):
            settings = adapter | changes
            if form == 2:
                return {key: HEADER[key] for key in HEADER if key != "model"} | {"adapter": settings}
            return HEADER | {"model": HEADER["model"] | {"adapter": settings}}

        own = HEADER | {"model": HEADER["model"] | {"adapter": adapter}}
        check_fits(header(dropout=0.0, path="factorised"), own)
        for name, value in (("rank", 4), ("alpha", 16.0), ("scale", 1.0001)):
            with pytest.raises(UserError, match=rf"model.adapter.{name} {value}, .* {adapter[name]}\.$") as raised:
                check_fits(header(**{name: value}), own)
            one_line(raised)

    def test_another_setting_of_the_classifier_or_other_targets(self):
        for key, value, named in (
            ("classifier", {"class": "CoOp", "position": "front"}, "model.classifier.position front, .* end"),
            ("targets", ["*.q"], "model.targets .* None"),
        ):
            with pytest.raises(UserError, match=named):
                check_fits(HEADER | {"model": HEADER["model"] | {key: value}}, HEADER)

    def test_other_settings_of_the_backbone(self):
        settings = {"features": "default", "preprocessing": {"size": 32, "mean": (0.1, 0.2, 0.3), "resize": "shortest"}}
        own = HEADER | {"model": HEADER["model"] | {"backbone": settings}}
        check_fits(json.loads(json.dumps(own)), own)
        check_fits(HEADER, own)  # an older file does not say
        for change, named in (
            ({"features": "cls"}, "model.backbone.features cls, and the config default"),
            (
                {"preprocessing": settings["preprocessing"] | {"resize": "squash"}},
                "preprocessing.resize squash, .* shortest",
            ),
            ({"preprocessing": settings["preprocessing"] | {"size": 64}}, "preprocessing.size 64, and the config 32"),
        ):
            with pytest.raises(UserError, match=named):
                check_fits(HEADER | {"model": HEADER["model"] | {"backbone": settings | change}}, own)

    def test_a_run_begun_before_backbones_had_settings_goes_on(self, tmp_path):
        own = HEADER | {"model": HEADER["model"] | {"backbone": {"features": "default"}}}
        check_same_run(HEADER, own, tmp_path)
        theirs = HEADER | {"model": HEADER["model"] | {"backbone": {"features": "cls"}}}
        with pytest.raises(UserError, match=r"model\.backbone\.features cls, and this one has default"):
            check_same_run(theirs, own, tmp_path)

    def test_heads_of_before_they_could_start_elsewhere(self, tmp_path):
        def header(**classifier):
            return HEADER | {"model": HEADER["model"] | {"classifier": {"class": "LinearProbe"} | classifier}}

        check_same_run(header(), header(head_start="ridge", head_scale=2.0), tmp_path)
        check_fits(header(), header(head_start="ridge"))
        check_fits(header(head_start="zero"), header(head_start="ridge"))  # a measurement does not depend on it
        with pytest.raises(UserError, match=r"head_start zero, and this one has ridge"):
            check_same_run(header(head_start="zero"), header(head_start="ridge"), tmp_path)
        three, two = (header(head_start="gda", head_scale=scale) for scale in (3.0, 2.0))
        with pytest.raises(UserError, match=r"head_scale 3\.0, and this one has 2\.0"):
            check_same_run(three, two, tmp_path)

    def test_another_basis(self):
        own = HEADER | {"frozen": [{"A": {"seed": 1, "shape": (3, 4), "checksum": "ab"}, "svd": {"image.0.q": 0.5}}]}
        theirs = json.loads(json.dumps(own))
        check_fits(theirs, own)
        theirs["frozen"][0]["svd"]["image.0.q"] = 0.50005
        check_fits(theirs, own)
        theirs["frozen"][0]["svd"]["image.0.q"] = 0.6
        with pytest.raises(UserError, match=r"svd\.image\.0\.q is 0\.6, .* 0\.5"):
            check_fits(theirs, own)
        theirs["frozen"][0] |= {"svd": own["frozen"][0]["svd"], "A": {"seed": 2, "shape": [3, 4], "checksum": "ab"}}
        with pytest.raises(UserError, match=r"A\.seed is 2, .* 1"):
            check_fits(theirs, own)
        with pytest.raises(UserError):
            check_fits(own | {"frozen": []}, own)

    @pytest.mark.parametrize(
        ("place", "key", "value"),
        [
            (("training",), "seed_everything", 2),
            (("training", "model", "optimizer"), "lr", 0.0021),
            (("training", "data"), "shots", 8),
            (("training", "data"), "batch_size", 16),
        ],
    )
    def test_going_on_with_other_settings(self, place, key, value):
        own = json.loads(json.dumps(HEADER))
        check_same_run(HEADER, own, "last.ckpt")
        inner = own
        for part in place:
            inner = inner[part]
        was, inner[key] = inner[key], value
        with pytest.raises(UserError, match=rf"{'.'.join([*place[1:], key])} {was}, .* {value}:"):
            check_same_run(HEADER, own, "last.ckpt")

    def test_where_data_differs(self):
        assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ("a.b", 2, 3)
        assert first_difference({"a": 1}, {}) == ("a", 1, None)
        assert first_difference([1.0], [1.0000001]) == ("", 1.0, 1.0000001)
        assert first_difference([1.0], [1.0000001], tolerance=1e-3) is None
        assert first_difference({"a": 1, "b": (1, 2)}, {"a": 2, "b": [1, 2]}, indifferent=frozenset("a")) is None
        assert first_difference([1, 2], [1]) == ("", [1, 2], [1])

    def test_no_header_at_all(self):
        with pytest.raises(UserError) as raised:
            check_fits({}, HEADER)
        one_line(raised)


class TestDescribed:
    def test_a_class_but_for_some_arguments(self):
        given = described(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
        assert given["class"] == "SGD"
        assert (given["lr"], given["momentum"], given["weight_decay"]) == (0.1, 0.9, 0)
        assert "params" not in given
        assert described(partial(partial(torch.optim.SGD, lr=0.1), lr=0.2))["lr"] == 0.2
        assert described(torch.optim.AdamW)["betas"] == [0.9, 0.999]

    def test_records_and_plain_values(self):
        settings = LoRA(rank=4).settings()
        assert described(LoRA(rank=4)) == {"class": "LoRA"} | {n: settings[n] for n in settings if n != "scale"}
        assert described(None) is None
        assert described({"a": (1, "b", 2.5, True)}) == {"a": [1, "b", 2.5, True]}
        json.dumps(described({"x": object()}))


class TestDamage:
    """Whatever bit of a file has changed, the file is refused by its name."""

    @pytest.fixture(params=["last.ckpt", "tuned.safetensors"])
    def written(self, request, tmp_path):
        path, tensors = tmp_path / request.param, {"a": torch.randn(40), "b": torch.arange(3)}
        header = HEADER | {"format": 3, "class_names": ["größe", "犬"]}
        if path.suffix == ".ckpt":
            AtomicCheckpoints().save_checkpoint({"state_dict": tensors, "kshot": header}, path)
        else:
            write_tensors(path, tensors, header)
        return path

    def test_every_bit(self, written):
        whole = written.read_bytes()
        AtomicCheckpoints().load_checkpoint(written)
        answers = set()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            written.write_bytes(damaged)
            try:
                AtomicCheckpoints().load_checkpoint(written)
                answers.add("accepted")
            except UserError as error:
                answers.add(str(error).replace(str(written), "FILE"))
        assert answers
        assert all("FILE" in answer and "\n" not in answer for answer in answers), answers

    def test_a_file_with_more_behind_it_or_without_its_digest(self, written):
        whole = written.read_bytes()
        mark = whole.index(b"kshot-sha256:")
        for damaged in (whole + b"x", whole[:mark] + b"k" * 77 + whole[mark + 77 :]):
            written.write_bytes(damaged)
            with pytest.raises(UserError, match="damaged"):
                AtomicCheckpoints().load_checkpoint(written)

    def test_a_newer_format(self, written, tmp_path):
        write_tensors(tmp_path / "new.safetensors", {"a": torch.ones(1)}, HEADER | {"format": 4})
        with pytest.raises(UserError, match=r"format 4, .* update kshot"):
            AtomicCheckpoints().load_checkpoint(tmp_path / "new.safetensors")

    def test_other_programs_read_it(self, written):
        if written.suffix == ".ckpt":
            assert set(torch.load(written, weights_only=True)["state_dict"]) == {"a", "b"}
            assert zipfile.ZipFile(written).testzip() is None
        else:
            assert set(load_file(written)) == {"a", "b"}

    def test_numbers(self):
        check_numbers({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int8)}, ["float32", "int8"])
        check_numbers({"a": torch.ones(2).half()}, None)
        for bad in (torch.ones(2, dtype=torch.int8), torch.ones(2).half()):
            with pytest.raises(UserError, match=r"checkpoint's a is of .*, and its run had float32"):
                check_numbers({"a": bad}, ["float32"])
        for value in (math.nan, math.inf):
            with pytest.raises(UserError, match="a holds values that are not finite"):
                check_numbers({"a": torch.tensor([1.0, value])}, None)
