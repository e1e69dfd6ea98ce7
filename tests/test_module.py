"""The module alone: groups and rates of what trains, small states, headers, and the order in which it is built."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import towers
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kshot.adapters import AdaLoRA, DoRA, FullTuning, HydraLoRA, LoRA, PiSSA
from kshot.checkpoint import packed, round_trip, unpacked
from kshot.classifiers import VPT, CoOp, DePT, KgCoOp, LinearProbe, NearestClassMean, PromptSRC, TextPrompt
from kshot.data import Batch
from kshot.errors import UserError
from kshot.header import header_of
from kshot.module import FewShotModule
from kshot.optim import make_optimizer

NAMES = ("cat", "dog", "yellow bird", "tree")
SENTENCES = ["a photo of a {}.", "{} in the rain"]
HEADS = {
    "CoOp": partial(CoOp, context_length=3),
    "KgCoOp": KgCoOp,
    "VPT": partial(VPT, depth=2),
    "PromptSRC": partial(PromptSRC, templates=SENTENCES),
    "DePT": partial(DePT, base=partial(CoOp, context_length=3)),
    "DePT-PromptSRC": partial(DePT, base=partial(PromptSRC, templates=SENTENCES)),
}
CAT = ("text_gain", "text_shift", "image_gain", "image_shift", "head.weight", "head.bias")


def module_of(head=TextPrompt, **settings) -> FewShotModule:
    return FewShotModule(towers.backbone(), head, NAMES, **settings)


def rates_of(module) -> dict[str, float]:
    """The learning rate of every trained tensor by name."""
    optimizer = module.optimizer_for()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(module.trained())
    return {name: rates[id(p)] for name, p in module.trained().items()}


class TestGroups:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("adapter", [None, LoRA(rank=1)])
    def test_everything_that_trains_stands_in_one_group(self, head, adapter):
        sgd = partial(torch.optim.SGD, lr=2e-3)
        rates = rates_of(module_of(HEADS[head], adapter=adapter, targets=["*.q"], optimizer=sgd))
        for name, rate in rates.items():
            own = head.startswith("DePT") and name.removeprefix("classifier.") in CAT
            assert rate == pytest.approx(6.5 * 2e-3 if own else 2e-3), name

    @pytest.mark.parametrize("head", HEADS)
    def test_a_head_rate_concerns_the_classifier_but_for_prompts_in_the_image_tower(self, head):
        sgd = partial(torch.optim.SGD, lr=2e-3)
        rates = rates_of(module_of(HEADS[head], adapter=LoRA(rank=1), targets=["*.q"], optimizer=sgd, head_lr=1e-2))
        for name, rate in rates.items():
            expected = 2e-3 if ".adapters." in name or name.endswith("image_prompts") else 1e-2
            expected *= 6.5 if name.removeprefix("classifier.") in CAT and head.startswith("DePT") else 1
            assert rate == pytest.approx(expected), name

    def test_a_step_moves_tensors_by_their_rates(self):
        dept = partial(DePT, base=HEADS["CoOp"], rate_factor=4.0)
        module = module_of(dept, optimizer=partial(torch.optim.SGD, lr=0.1))
        features = torch.randn(5, module.backbone.feature_dim)
        sum(module.classifier.losses(features, torch.tensor([0, 1, 2, 3, 0])).values()).backward()
        before = {name: p.detach().clone() for name, p in module.trained().items()}
        module.optimizer_for().step()
        for name, p in module.trained().items():
            rate = 0.4 if name.removeprefix("classifier.") in CAT else 0.1
            torch.testing.assert_close(p.detach(), before[name] - rate * p.grad, msg=name)

    @pytest.mark.parametrize(
        ("adapter", "spared"),
        [(LoRA(rank=1), set()), (DoRA(rank=1), {"m"}), (PiSSA(rank=1), {"A", "B"}), (HydraLoRA(rank=1), {"G"})],
    )
    def test_decay_spares_what_does_not_start_from_no_change(self, adapter, spared):
        optimizer = module_of(adapter=adapter, targets=["*.q"]).optimizer_for()
        names = {}
        module = module_of(adapter=adapter, targets=["*.q"])
        decay = {id(p): g["weight_decay"] for g in module.optimizer_for().param_groups for p in g["params"]}
        names = {name.rsplit(".", 1)[-1] for name, p in module.trained().items() if decay[id(p)] == 0}
        assert names == spared
        assert {g["weight_decay"] for g in optimizer.param_groups} <= {0.0, 0.01}

    def test_fused_forms_are_taken_where_torch_has_them(self):
        parameter = torch.nn.Parameter(torch.ones(2))
        for factory, fused in (
            (torch.optim.AdamW, True),
            (partial(torch.optim.SGD, lr=0.1), True),
            (partial(torch.optim.AdamW, foreach=True), None),
            (partial(torch.optim.AdamW, fused=False), True),
            (partial(torch.optim.RMSprop, lr=0.1), "none"),
        ):
            optimizer = make_optimizer(factory, [{"params": [parameter]}])
            assert optimizer.defaults.get("fused", "none") == fused
        assert make_optimizer(torch.optim.AdamW, [{"params": [parameter]}], fused=False).defaults["fused"] is None


class TestOrder:
    def test_the_classifier_sees_the_untouched_backbone(self):
        seen = []

        def head(backbone, task):
            seen.append((len(backbone.layers()), any(p.requires_grad for p in backbone.parameters())))
            return TextPrompt(backbone, task)

        module = module_of(head, adapter=LoRA(rank=1), targets=["*"])
        assert seen == [(0, False)]
        assert len(module.layers) == len(module.backbone.slots())

    def test_a_closed_form_leaves_no_step_to_an_adapter(self):
        with pytest.raises(UserError, match="would leave LoRA untrained"):
            module_of(NearestClassMean, adapter=LoRA(rank=1))

    def test_nothing_is_hidden(self):
        """Every module that a module holds is registered: none in a tuple, a list, a dict or an object beside it."""
        for head in HEADS.values():
            module = module_of(head, adapter=LoRA(rank=1), targets=["*.q"])
            for part in module.modules():
                for name, value in vars(part).items():
                    if name in ("_modules", "_parameters", "_buffers") or name.startswith("__"):
                        continue
                    held = list(value.values()) if isinstance(value, dict) else value
                    held = held if isinstance(held, list | tuple) else [held]
                    assert not any(isinstance(v, torch.nn.Module) for v in held), f"{type(part).__name__}.{name}"


def logits(module) -> torch.Tensor:
    with torch.no_grad():
        return module(towers.images(module.backbone))


CASES = {
    "LoRA": {"adapter": LoRA(rank=2), "targets": ["*.[qv]"]},
    "full": {"adapter": FullTuning(), "targets": ["*"]},
    "CoOp": {"head": HEADS["CoOp"]},
    "PromptSRC": {"head": HEADS["PromptSRC"]},
}


def batch_of(module) -> Batch:
    label = torch.tensor([0, 3, 1])
    return Batch(towers.images(module.backbone, 3), label, torch.arange(3))


def test_the_penalty_of_the_adapter_is_a_term_of_the_loss():
    """AdaLoRA's, γ/(2L) Σ ‖A Aᵀ − I‖ + ‖Bᵀ B − I‖, beside the classifier's cross-entropy."""
    module = module_of(adapter=AdaLoRA(initial_rank=3, target_rank=2, orthogonality=0.3), targets=["image.0.[qk]"])
    with torch.no_grad():
        for parameter in module.trained().values():
            parameter.add_(0.1)
    batch, eye = batch_of(module), torch.eye(3)
    factors = [rows for layer in module.layers.values() for rows in (layer.A, layer.B.T)]
    penalty = 0.3 / 4 * sum((rows @ rows.T - eye).norm() for rows in factors)
    entropy = F.cross_entropy(module(batch.image), batch.label)
    terms = module.losses(batch)
    assert len(terms) == 2
    torch.testing.assert_close(terms["penalty"], penalty)
    torch.testing.assert_close(module.loss_of(batch), entropy + penalty)


@pytest.mark.parametrize(
    ("precision", "clip", "fused"), [("16-mixed", 1.0, None), ("16-mixed", None, True), ("32-true", 1.0, True)]
)
def test_gradients_that_are_clipped_are_unscaled_before_the_step(precision, clip, fused):
    """Which a fused optimizer does in the step: too late for clipping."""
    module = module_of(adapter=LoRA(rank=1), targets=["*.q"])
    module.trainer = SimpleNamespace(gradient_clip_val=clip, precision=precision)
    assert module.configure_optimizers().defaults["fused"] is fused


def test_features_of_the_untouched_backbone_are_constants():
    """Also where what trains are its own tensors: a teacher takes no gradient."""
    module = module_of(adapter=FullTuning(), targets=["image.*"])
    batch = batch_of(module)
    before = towers.backbone().encode_image(batch.image).detach()
    with torch.no_grad():
        for parameter in module.trained().values():
            parameter.add_(0.1)
    given = module.frozen_features_of(batch)
    assert torch.equal(given, before)
    assert not given.requires_grad
    assert not torch.equal(module.features_of(batch), before)


class TestExplicitState:
    @pytest.mark.parametrize("case", CASES)
    def test_the_next_forward_pass_sees_every_write(self, case):
        module = module_of(**CASES[case]).eval()
        plain = logits(module)
        vector = parameters_to_vector(module.trained().values()).detach()
        moved = vector + 0.1 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))
        vector_to_parameters(moved, module.trained().values())
        written = logits(module)
        assert not torch.equal(written, plain)
        state = {name: tensor.clone() for name, tensor in module.tuned_state().items()}
        for parameter in module.trained().values():
            parameter.data = parameter.data - 0.1
        assert not torch.equal(logits(module), written)
        module.load_state_dict(state, strict=False)
        assert torch.equal(logits(module), written)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(logits(twin), written)
            for parameter in twin.trained().values():
                parameter.data.zero_()
            assert torch.equal(logits(module), written)
        with module.backbone.unadapted():
            assert case in ("CoOp", "PromptSRC") or torch.equal(logits(module), plain)
        with torch.inference_mode():
            assert torch.equal(module(towers.images(module.backbone)), written)

    def test_a_module_built_under_inference_mode_trains(self):
        def head(backbone, task):
            probe = LinearProbe(backbone, task)
            probe.scale = torch.nn.Parameter(torch.ones(()))  # by a class of the user's, which knows of no mode
            probe.register_forward_hook(lambda own, given, logits: own.scale * logits)
            return probe

        with torch.inference_mode():
            module = FewShotModule(towers.build("clip"), head, NAMES, adapter=LoRA(rank=1), targets=["image.*.q"])
        module.train()
        module(towers.images(module.backbone)).sum().backward()
        assert all(p.grad is not None for p in module.trained().values())

    def test_detach_gives_the_backbone_back(self):
        backbone = towers.backbone()
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        for case in CASES.values():
            settings = {"classifier": TextPrompt} | {"classifier" if k == "head" else k: v for k, v in case.items()}
            module = FewShotModule(backbone, class_names=NAMES, **settings)
            for parameter in module.trained().values():
                parameter.data.add_(0.1)
            assert module.detach() is backbone
            after = backbone.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert not any(p.requires_grad for p in backbone.parameters())
            assert not any(m.training for m in backbone.modules())


class TestStates:
    def test_the_small_state_is_what_trains_alone(self):
        module = module_of(HEADS["DePT-PromptSRC"], adapter=LoRA(rank=1), targets=["image.0.q"])
        assert set(module.tuned_state()) == set(module.trained())
        assert not any(tensor.requires_grad for tensor in module.tuned_state().values())
        assert sum(".adapters." in name for name in module.trained()) == 2

    def test_what_is_packed_comes_back(self):
        module = module_of(LinearProbe, adapter=LoRA(rank=1), targets=["*.q"])
        for parameter in module.trained().values():
            parameter.data.normal_()
        state = {name: tensor.clone() for name, tensor in module.tuned_state().items()}
        back = unpacked(packed(module), module)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert round_trip(module) is False

    def test_a_header_describes_the_module(self):
        module = module_of(adapter=LoRA(rank=2), targets=["*.q"], optimizer=partial(torch.optim.SGD, lr=0.5))
        header = header_of(module)
        assert (header["format"], header["method"], header["split"]) == (3, "TextPrompt + LoRA", None)
        assert header["class_names"] == list(NAMES)
        model, training = header["model"], header["training"]
        assert (model["adapter"]["rank"], model["targets"], model["classifier"]["class"]) == (2, ["*.q"], "TextPrompt")
        assert (training["model"]["optimizer"]["lr"], training["model"]["schedule"]) == (0.5, None)
        assert model["backbone"] == module.backbone.settings()
        assert model["backbone"]["preprocessing"]["resize"] == "shortest"
        assert training["seed_everything"] == module.run_seed
        assert header_of(module_of())["model"]["targets"] is None, "without an adapter they mean nothing"


def test_a_stored_module_runs_no_code(tmp_path):
    """Settings in a file to resume from are held to the kinds that the module takes, before anything is called."""
    command = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/harm"}}
    settings = {"backbone": {"class_path": "kshot.backbones.OpenClip", "init_args": {"model": "kshot:glyph_clip"}}}
    torch.save(
        {
            "state_dict": {},
            "hyper_parameters": settings
            | {"schedule": command, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
            "pytorch-lightning_version": "2.6.4",
        },
        tmp_path / "last.ckpt",
    )
    with pytest.raises(UserError, match="schedule"):
        FewShotModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "harm").exists()
