"""Weights that cannot be had get one clear line, quickly, and never a random model."""

import logging
import socket

import pytest
import timm
from command_line import QUICK, fit, photos, predict
from huggingface_hub import constants
from safetensors.torch import save_file

from kshot.backbones import OpenClip, Timm
from kshot.backbones.hub import answers, quiet_loading
from kshot.cli import main
from kshot.errors import UserError


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    asked = []

    def refuse(address, *_, **__):
        asked.append(address)
        raise socket.gaierror("Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return asked


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (lambda: OpenClip("ViT-B-16-quickgelu", "openai"), "set pretrained to a local file"),
        (lambda: OpenClip("hf-hub:nobody/nothing"), "set pretrained to a local file"),
        (lambda: Timm("vit_small_patch14_dinov2.lvd142m"), "set weights to a local file"),
    ],
)
def test_a_hub_out_of_reach(build, setting, no_network):
    with pytest.raises(UserError) as error:
        build()
    message = str(error.value)
    assert "\n" not in message
    assert "HF_HUB_CACHE" in message
    assert setting in message
    assert len(no_network) == 1, "the libraries' own retries take most of a minute"


@pytest.mark.usefixtures("no_network")
def test_settings_are_restored_whatever_happens():
    def fail():
        with quiet_loading(hub=True):
            assert constants.HF_HUB_OFFLINE
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not constants.HF_HUB_OFFLINE
    assert logging.root.manager.disable == 0


def test_a_proxy_is_trusted_to_reach_the_hub(no_network, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with quiet_loading(hub=True):
        assert not constants.HF_HUB_OFFLINE


@pytest.mark.network
def test_published_weights_load(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    clip, dino = OpenClip("ViT-B-32-quickgelu", "openai"), Timm("vit_small_patch14_dinov2.lvd142m")
    assert clip.supports_prompts
    assert float(clip.logit_scale) == pytest.approx(100, rel=1e-3)
    assert (clip.image_size, dino.image_size, dino.feature_dim) == (224, 224, 384)


def test_local_weights_need_no_hub(no_network, tmp_path):
    import timm
    import torch
    from safetensors.torch import save_file

    vit = timm.create_model("test_vit", num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    backbone = Timm("test_vit", weights=str(tmp_path / "vit.safetensors"))
    assert torch.equal(backbone.vit.cls_token, vit.cls_token)


def test_a_run_on_local_weights_opens_no_connection_and_asks_no_name(tmp_path, monkeypatch, few_scans):
    """As for a user without the variable HF_HUB_OFFLINE: not even a name is looked up."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def forbidden(*given, **_):
        asked.append(given)
        raise AssertionError(f"the network was asked: {given}")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    vit = ["--model.backbone", "Timm", "--model.backbone.model", "test_vit", "--model.backbone.weights", str(weights)]
    directory = fit(tmp_path / "clip", *few_scans)
    fit(tmp_path / "vit", "--config", "methods/linear_probe.yaml", *few_scans, *vit)
    common = ["--config", "clip_16shot.yaml", "--ckpt_path", str(directory / "tuned.safetensors")]
    common += ["--run.root", str(tmp_path / "more")]
    main(["test", *common, *QUICK, *few_scans])
    predict(directory, "--images", photos(tmp_path / "photos", 2), "--out", tmp_path / "found.csv")
    assert asked == []


def test_a_name_that_nobody_answers_for_is_not_waited_for(unanswered):
    assert not answers("https://huggingface.co", timeout=0.2)
    assert not unanswered
