"""Contract of classifiers: every one that a config can name, with settings for tiny models."""

import copy
import inspect
import pickle
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import towers
from torch.utils._python_dispatch import TorchDispatchMode

import kshot.classifiers
from kshot.adapters import LoRA
from kshot.classifiers import (
    GDA,
    VPT,
    Classifier,
    CoCoOp,
    CoOp,
    DePT,
    NearestClassMean,
    PromptSRC,
    Shots,
    Task,
    TextClassifier,
)
from kshot.classifiers.base import (
    closed_form,
    own_parameters,
)
from kshot.classifiers.two_stage import stages_of
from kshot.errors import UserError
from kshot.holding import merged

NAMES = ("cat", "dog", "yellow bird", "x", "very small old car", "tree", "sea horse", "house", "pen", "cup")
TASK = Task(NAMES[:4])
SENTENCES = ("a photo of a {}.", "{} in the rain")
FEW = ["*.0.q", "*.1.fc2"]  # of both towers and blocks: where adapters are is not what is asked here
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "Average": [{}, {"members": [partial(GDA, text=False), NearestClassMean]}],
    "CLAP": [{}],
    "CLIPAdapter": [{}, {"ratio": [0.2, 0.6], "reduction": 2, "text_ratio": 0.3}],
    "CoOp": [
        {"context_length": 3},
        {"context_length": 3, "class_specific": True, "position": "middle"},
        {"init_words": "a photo of a", "depth": 2},
    ],
    "DePT": [{}, {"base": partial(PromptSRC, templates=SENTENCES)}, {"base": partial(VPT, head=CoCoOp)}],
    "ClassMeanText": [{}, {"text_weight": None}],
    "GDA": [{}, {"text": False}],
    "KernelRidge": [{}, {"text": False}, {"text": True, "strength": 0.3}],
    "LPPlusPlus": [{"iterations": 20}],
    "NearestClassMean": [{}, {"trainable": True}],
    "ProLIP": [{}, {"strength": 0.5}],
    "PromptSRC": [{"templates": SENTENCES}],
    "Ridge": [{}, {"text": False, "strength": 0.1}],
    "TaskRes": [{}, {"templates": SENTENCES}],
    "TipAdapter": [{"alpha": 1.0, "beta": 5.5}],
    "TipAdapterF": [{"beta": 5.5}],
    "VPT": [{}, {"head": partial(CoOp, context_length=2)}, {"head": partial(NearestClassMean, trainable=True)}],
}
# why a classifier cannot serve other classes
BOUND = {
    "Average": "it has one row of weights for each training class",
    "CLAP": "it has a row of weights for each training class",
    "ClassMeanText": "its means are those of the training classes",
    "CoOp-class-specific": "a class-specific context was learnt for each training class",
    "KernelRidge": "each coefficient of its kernel belongs to a training class",
    "LPPlusPlus": "it has a row of weights, a bias and a blending factor for each training class",
    "LinearProbe": "its layer has one row of weights for each training class",
    "LogisticProbe": "it has one row of weights for each training class",
    "NearestClassMean": "its means are those of the training classes",
    "Ridge": "it has one row of weights for each training class",
    "TaskRes": "its residuals belong to the training classes",
    "TipAdapter": "each key of its cache is a training image with the label of a training class",
}
BOUND["TipAdapterF"] = BOUND["TipAdapter"]


def exported() -> list[type[Classifier]]:
    """Every classifier that a config can name."""
    things = vars(kshot.classifiers).values()
    return [t for t in things if inspect.isclass(t) and issubclass(t, Classifier) and not inspect.isabstract(t)]


def label_of(kind, settings) -> str:
    values = [getattr(v, "func", v) for v in settings.values()]
    return "-".join([kind.__name__, *(getattr(v, "__name__", str(v)) for v in values)])


EVERY = [(kind, settings) for kind in exported() for settings in SETTINGS.get(kind.__name__, [{}])]
every = pytest.mark.parametrize(("kind", "settings"), EVERY, ids=[label_of(k, s) for k, s in EVERY])


def width_of(given) -> int:
    """Width of the image features of a backbone, or of those that a classifier takes from its own."""
    if isinstance(given, Classifier):
        return len(given.backbone.projection) if "unprojected" in given.needs else given.backbone.feature_dim
    return given.feature_dim


def shots_of(given, classes: int, each: int = 3, views: int = 2, seed: int = 3) -> Shots:
    """Random features of a few images a class, in groups by class, for a backbone or a classifier."""
    generator, width = torch.Generator().manual_seed(seed), width_of(given)
    label = torch.arange(classes).repeat(each)
    centre = torch.randn(classes, width, generator=generator)[label]
    return Shots(centre + torch.randn(views, len(label), width, generator=generator), label)


def validation(classifier) -> Shots:
    return shots_of(classifier, len(classifier.task.class_names), each=2, views=1, seed=4)


def prepared(classifier, val: Any = None):
    """Takes a classifier as far as a run does before the first batch."""
    if "shots" in classifier.needs:
        classifier.fit(shots_of(classifier, len(classifier.task.class_names)), val)
    assert sum(stages_of(classifier, 10)) == 10
    return classifier


def made(kind, settings, task=TASK, name="clip", adapter=None):
    """In the order of a run: the classifier on an untouched backbone, then the adapter."""
    torch.manual_seed(0)
    classifier = kind(towers.backbone(name), task, **settings)
    if adapter is not None:
        adapter.attach(classifier.backbone, FEW)
    return prepared(classifier, validation(classifier)).eval()


def disturb(classifier, amount=0.1):
    """Takes what trains away from where it starts."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator).to(parameter))
    return classifier


def own_state(classifier) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a classifier."""
    return {name: t.clone() for name, t in classifier.state_dict().items() if "backbone." not in name}


def features_of(classifier, count=6):
    return torch.randn(count, width_of(classifier), generator=torch.Generator().manual_seed(2))


def encoded(classifier, count=3):
    """Features of images, with what the classifier does in the image tower."""
    image = towers.images(classifier.backbone, count)
    return classifier.backbone.encode_image(image, classifier.image_tokens(), "unprojected" in classifier.needs)


def logits_of(classifier):
    return classifier(encoded(classifier))


def losses_of(classifier, label):
    """The terms of the loss of images."""
    teacher = None
    if "teacher" in classifier.needs:
        with classifier.backbone.unadapted(), torch.no_grad():
            teacher = classifier.backbone.encode_image(towers.images(classifier.backbone, len(label)))
    return classifier.losses(encoded(classifier, len(label)), label, teacher)


def compares_text(classifier) -> bool:
    inner = getattr(classifier, "inner", None)
    return isinstance(classifier, TextClassifier) or (inner is not None and compares_text(inner))


def reason_of(kind, settings) -> str | None:
    """Why it cannot serve other classes, or None."""
    if settings.get("class_specific"):
        return BOUND["CoOp-class-specific"]
    if kind is GDA and settings.get("text") is False:
        return BOUND["Ridge"]
    inner = settings.get("head") or settings.get("base")
    return BOUND.get(getattr(inner, "func", kind).__name__)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def count_encodes(monkeypatch, backbone) -> list[str]:
    """Notes every use of the text tower of a backbone."""
    calls = []
    encode = backbone.encode_embeddings
    monkeypatch.setattr(backbone, "encode_embeddings", lambda *a: calls.append("encode") or encode(*a))
    return calls


class Untouchable:
    """Stands for shots that must not be looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"looked at .{name}")


class TestEvery:
    def test_the_contract_is_eight_names(self):
        names = {"needs", "forward", "losses", "image_tokens", "set_class_names", "param_groups", "fit", "select"}
        assert {name for name in vars(Classifier) if not name.startswith("_")} == names | {"bound"}

    @every
    @pytest.mark.parametrize("classes", [2, 10])
    def test_logits(self, kind, settings, classes):
        classifier = made(kind, settings, Task(NAMES[:classes]))
        features = features_of(classifier, 3)
        logits = classifier.train()(features)
        assert classifier.needs <= {"shots", "val", "teacher", "unprojected"}
        assert classifier.task == Task(NAMES[:classes])
        assert logits.shape == (3, classes)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        with torch.no_grad():
            torch.testing.assert_close(classifier.eval()(features), logits)
            each = torch.cat([classifier(f[None]) for f in features])
        torch.testing.assert_close(each, logits, msg="logits depend on the rest of the batch")

    @every
    def test_losses_are_finite_and_reach_every_parameter(self, kind, settings):
        classifier = made(kind, settings).train()
        terms = losses_of(classifier, torch.tensor([0, 1, 2, 3, 0, 1]))
        assert terms
        loss = sum(terms.values())
        assert loss.shape == ()
        assert torch.isfinite(loss)
        trainable = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
        assert closed_form(classifier) == ("shots" in classifier.needs and not trainable)
        assert not any("backbone." in n for n in trainable)
        assert {p.dtype for p in trainable.values()} <= {torch.float32}
        if trainable:
            loss.backward()
            without = [n for n, p in trainable.items() if p.grad is None or not p.grad.abs().max() > 0]
            assert without == []

    @every
    def test_no_device_is_waited_for_in_a_step(self, kind, settings):
        """No number of features, parameters or labels is read back; lengths of prompts lie on the CPU."""
        classifier, waited = disturb(made(kind, settings)).train(), []
        features, label = features_of(classifier).requires_grad_(), torch.arange(6) % 4
        loss = sum(classifier.losses(features, label, features.detach() + 0.1).values())  # teachers are made

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                    waited.extend(a for a in args if a.is_floating_point() or a is label)
                return func(*args, **(kwargs or {}))

        with Watch():
            loss = sum(classifier.losses(features, label, features.detach() + 0.1).values())
            loss.backward()
            classifier(features)
        assert waited == []

    @every
    def test_groups_hold_every_parameter_once(self, kind, settings):
        classifier = made(kind, settings)
        groups = classifier.param_groups()
        assert {key for group in groups for key in group} <= {"params", "lr_factor", "head", "average"}
        assert Counter(id(p) for group in groups for p in group["params"]) == Counter(
            id(p) for p in own_parameters(classifier)
        )
        no_head = [p for group in groups if not group.get("head") for p in group["params"]]
        names = {id(p): name for name, p in classifier.named_parameters()}
        assert {names[id(p)].split(".")[-1] for p in no_head} <= {"image_prompts"}
        LoRA(rank=2).attach(classifier.backbone, FEW)
        assert len(own_parameters(classifier)) == sum(len(group["params"]) for group in groups)

    @every
    def test_gradient_reaches_image_features_and_adapters(self, kind, settings):
        classifier = made(kind, settings, adapter=LoRA(rank=2))
        if closed_form(classifier):
            return
        disturb(classifier).train()
        sum(losses_of(classifier, torch.arange(4)).values()).backward()
        for tower in ("image", "text") if compares_text(classifier) else ("image",):
            trained = classifier.backbone.trainable(tower)
            assert trained
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained), tower

    @every
    def test_bfloat16_autocast(self, kind, settings):
        classifier = made(kind, settings)
        features = features_of(classifier)
        expected = classifier(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = classifier(features.bfloat16())
            terms = classifier.losses(features.bfloat16(), torch.arange(6) % 4, features.bfloat16())
        assert logits.dtype == torch.float32
        assert {t.dtype for t in terms.values()} == {torch.float32}
        torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.05 * float(expected.detach().abs().max()) + 1e-3)

    @every
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_as_a_module_of_any_precision(self, kind, settings, dtype):
        """Fitted, run forward and backward, and asked to choose, whatever the dtype of features is."""

        def learnt(dtype):
            torch.manual_seed(0)
            classifier = kind(towers.backbone(), TASK, **settings)
            LoRA(rank=2).attach(classifier.backbone, FEW)
            return disturb(prepared(classifier.to(dtype), validation(classifier)).eval())

        exactly, given = learnt(torch.float32), learnt(dtype)
        own = [t for n, t in given.named_parameters() if "backbone." not in n]
        assert {t.dtype for t in own} <= {dtype}
        wide = torch.promote_types(dtype, torch.float32)
        label = torch.arange(3)
        for features in (encoded(given), features_of(given, 3), features_of(given, 3).to(dtype)):
            logits = given(features)
            assert logits.dtype == wide
            terms = given.losses(features, label, features.detach() + 0.1)
            assert {t.dtype for t in terms.values()} == {wide}
            assert all(torch.isfinite(t) for t in terms.values())
        if own and any(p.requires_grad for p in own):
            sum(terms.values()).backward()
            assert all(torch.isfinite(p.grad).all() for p in own if p.requires_grad and p.grad is not None)
        with torch.no_grad():
            expected = exactly(features_of(exactly, 3))
            share = 1e-4 if dtype == torch.float64 else 0.15
            assert (logits - expected).abs().max() <= share * expected.abs().max()
        if "val" in given.needs and not closed_form(given):
            given.select(validation(given))
        if dtype == torch.float64:
            assert given(features_of(given, 3).double()).dtype == torch.float64

    @every
    def test_a_saved_state_gives_the_same_logits(self, kind, settings):
        first, second = disturb(made(kind, settings)), kind(towers.backbone(), TASK, **settings).eval()
        with torch.no_grad():
            expected = logits_of(first)
            logits_of(second)  # so that what is kept must be given up
            saved = own_state(first)
            for name, tensor in own_state(second).items():
                if tensor.ndim and not len(tensor):  # a cache takes as many rows as the file has
                    owner, _, own = name.rpartition(".")
                    getattr(second.get_submodule(owner), own).data = torch.zeros_like(saved[name])
            missing, unexpected = second.load_state_dict(saved, strict=False)
            assert torch.equal(logits_of(second), expected)
        assert unexpected == []
        assert all("backbone." in name for name in missing)

    @every
    def test_copies_are_whole_and_apart(self, kind, settings):
        """A copy or pickle goes on by itself, also one made while something is held."""
        classifier = disturb(made(kind, settings, adapter=LoRA(rank=2)))
        with torch.no_grad(), merged(classifier):
            expected = logits_of(classifier)
            tokenizer = classifier.backbone.tokenizer  # large, and of no interest
            first = copy.deepcopy(classifier, {id(tokenizer): tokenizer})
            classifier.backbone.tokenizer = None
            second = pickle.loads(pickle.dumps(classifier))
            classifier.backbone.tokenizer = tokenizer
            for other in (first, second):
                assert towers.relative(logits_of(other), expected) <= 1e-5
                assert not any(module.__dict__.get("held") is not None for module in other.modules())
                assert other.backbone is getattr(other, "inner", other).backbone
                disturb(other)
                assert towers.relative(logits_of(other), expected) > 1e-5
            assert torch.equal(logits_of(first), logits_of(second))
            assert torch.equal(logits_of(classifier), expected)

    @every
    def test_whatever_is_written_is_seen_by_the_next_pass(self, kind, settings):
        """Through ``.data``, by ``vector_to_parameters``, or by ``load_state_dict``: as a fresh object would say."""
        classifier = made(kind, settings, adapter=LoRA(rank=2))
        trained = [p for p in classifier.parameters() if p.requires_grad]
        vector = torch.nn.utils.parameters_to_vector(trained)
        noise = 0.1 * torch.randn(3, len(vector), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits_of(classifier)
            for way, change in zip(("data", "vector", "state"), noise, strict=True):
                fresh = made(kind, settings, adapter=LoRA(rank=2))
                torch.nn.utils.vector_to_parameters(vector + change, [p for p in fresh.parameters() if p.requires_grad])
                if way == "data":
                    start = 0
                    for p in trained:
                        p.data = (vector + change)[start : start + p.numel()].view(p.shape)
                        start += p.numel()
                elif way == "vector":
                    torch.nn.utils.vector_to_parameters(vector + change, trained)
                else:
                    classifier.load_state_dict(fresh.state_dict())
                expected = logits_of(fresh)
                assert torch.equal(logits_of(classifier), expected)
                with merged(classifier):
                    assert towers.relative(logits_of(classifier), expected) <= 1e-5

    @every
    def test_built_and_served_in_inference_mode_it_trains_afterwards(self, kind, settings):
        backbone = towers.backbone()
        with torch.inference_mode():
            torch.manual_seed(0)
            classifier = kind(backbone, TASK, **settings)
            shots = shots_of(classifier, 4)
            val = Shots(validation(classifier).features.clone(), torch.arange(4).repeat(2))
            if "shots" in classifier.needs:
                classifier.fit(shots, val)
            with merged(classifier):
                classifier.set_class_names(TASK.class_names, TASK.templates)
                if reason_of(kind, settings) is None:
                    classifier.set_class_names(NAMES)
                    logits_of(classifier)
                    classifier.set_class_names(TASK.class_names)
                logits_of(classifier)
            losses_of(classifier, torch.arange(4))
        LoRA(rank=2).attach(backbone, FEW)
        classifier.train()
        sum(losses_of(classifier, torch.arange(4)).values()).backward()
        assert all(p.grad is not None for p in own_parameters(classifier) if p.numel())  # or it has no rows yet
        assert all(p.grad is not None for p in backbone.trainable("image"))
        tensors = [*classifier.parameters(), *classifier.buffers()]
        assert not any(t.is_inference() for t in tensors)

    @every
    def test_training_leaves_the_backbone_as_it_is(self, kind, settings):
        classifier = kind(towers.backbone(), TASK, **settings)
        before = {name: t.clone() for name, t in classifier.backbone.state_dict().items()}
        val = validation(classifier)
        prepared(classifier, val).train()
        trainable = [p for p in classifier.parameters() if p.requires_grad]
        if trainable:
            optimizer = torch.optim.AdamW(trainable, lr=1e-3)
            start = sum(losses_of(classifier, torch.arange(4)).values())
            for _ in range(2):
                optimizer.zero_grad()
                sum(losses_of(classifier, torch.arange(4)).values()).backward()
                optimizer.step()
            assert sum(losses_of(classifier, torch.arange(4)).values()) < start
        if "val" in classifier.needs and not closed_form(classifier):
            classifier.eval().select(val)
        with merged(classifier), torch.no_grad():
            logits_of(classifier)
        after = classifier.backbone.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @every
    @pytest.mark.parametrize("where", ["plain", "merged"])
    def test_other_classes_are_served_or_refused_with_the_reason(self, kind, settings, where):
        classifier = disturb(made(kind, settings))
        reason = reason_of(kind, settings)
        with torch.no_grad(), merged(classifier) if where == "merged" else nullcontext():
            before = logits_of(classifier)
            if reason:
                for names in (NAMES, NAMES[3::-1]):
                    with pytest.raises(UserError) as error:
                        classifier.set_class_names(names)
                    assert reason in str(error.value)
                    assert "cannot serve classes that it was not trained on" in str(error.value)
                    assert "\n" not in str(error.value)
                classifier.set_class_names(NAMES[:4])
                assert torch.equal(logits_of(classifier), before)
                classifier.set_class_names(NAMES[:4], ["{} in the rain"])
                assert classifier.task.templates == ("{} in the rain",)
                classifier.set_class_names(list(NAMES[:4]), TASK.templates)
            else:
                classifier.set_class_names(NAMES[3::-1])
                torch.testing.assert_close(logits_of(classifier), before.flip(1), rtol=1e-4, atol=1e-4)
                classifier.set_class_names(NAMES, ["{} in the rain"])
                assert classifier.task == Task(NAMES, ("{} in the rain",))
                assert logits_of(classifier).shape == (3, 10)
                classifier.set_class_names(NAMES[:4], TASK.templates)
            assert classifier.task == TASK
            assert torch.equal(logits_of(classifier), before)

    @every
    def test_losses_after_a_change_of_classes_are_those_of_a_fresh_object(self, kind, settings):
        """Teachers follow the class names; other tensors of the same training classes stay."""
        given = made(kind, settings, adapter=LoRA(rank=2))
        if reason_of(kind, settings) is not None or closed_form(given):
            return
        losses_of(given, torch.arange(4))
        for names in (NAMES[4:8], NAMES[:4], NAMES):
            if kind is DePT and len(names) != 4:  # its second head belongs to the training classes
                continue
            fresh = kind(towers.backbone(), Task(names), **settings)
            _, unexpected = fresh.load_state_dict(own_state(given), strict=False)
            assert unexpected == []
            given.set_class_names(names)
            label = torch.arange(5) % len(names)
            ours, theirs = (losses_of(c, label) for c in (given, fresh.eval()))
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)

    @every
    def test_validation_shots_are_looked_at_only_to_choose(self, kind, settings):
        classifier = kind(towers.backbone(), TASK, **settings)
        if "shots" not in classifier.needs:
            with pytest.raises(NotImplementedError, match="gradient"):
                classifier.fit(shots_of(classifier, 4), None)
        elif "val" in classifier.needs and closed_form(classifier):
            with pytest.raises(AssertionError, match="looked at"):
                prepared(classifier, Untouchable())
        else:
            prepared(classifier, Untouchable())

    @every
    def test_fitted_to_features_of_any_precision(self, kind, settings):
        logits = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.manual_seed(0)
            classifier = kind(towers.backbone(), TASK, **settings)
            if "shots" not in classifier.needs:
                return
            train, val = shots_of(classifier, 4), validation(classifier)
            classifier.fit(*(Shots(s.features.bfloat16().to(dtype), s.label) for s in (train, val)))
            logits[dtype] = classifier(features_of(classifier))
        torch.testing.assert_close(logits[torch.float64], logits[torch.float32])
        torch.testing.assert_close(logits[torch.bfloat16], logits[torch.float32])

    @every
    def test_image_only_backbones_work_or_are_refused_in_one_line(self, kind, settings):
        try:
            classifier = made(kind, settings, name="vit")
        except UserError as error:
            message = str(error)
        else:
            assert not compares_text(classifier)
            assert logits_of(classifier).shape == (3, 4)
            return
        assert "\n" not in message
        assert kind is VPT or kind.__name__ in message
        assert "text tower" in message
