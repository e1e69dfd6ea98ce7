"""AdaLoRA equals PEFT's, step by step over its whole schedule, and its files hold what is left of it."""

from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model
from reference_tower import trained_numbers

from kshot.adapters import AdaLoRA, LoRA
from kshot.adapters.adalora import parameters_of
from kshot.errors import UserError
from kshot.slots import merge, unmerge

LETTERS = ("A", "E", "B")


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def config(adapter, steps=100, **given):
    return AdaLoraConfig(
        init_r=adapter.initial_rank,
        target_r=adapter.target_rank,
        lora_alpha=adapter.initial_rank if adapter.alpha is None else adapter.alpha,
        beta1=adapter.beta1,
        beta2=adapter.beta2,
        orth_reg_weight=adapter.orthogonality,
        total_step=steps,
        target_modules=list(oracle.SHAPES),
        **given,
    )


def pairs_of(mine, model):
    """Our tensors and PEFT's, by matrix and letter, with the same values."""
    pairs = {}
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        for letter in LETTERS:
            pairs[name, letter] = getattr(ours, letter), getattr(theirs, f"lora_{letter}")["default"]
            with torch.no_grad():
                pairs[name, letter][1].copy_(pairs[name, letter][0])
    return pairs


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("settings", [{"initial_rank": 4}, {"initial_rank": 6, "alpha": 9}])
def test_equals_peft(settings, path):
    adapter = AdaLoRA(**settings, target_rank=2, path=path)
    mine, model = oracle.ours(adapter, double=True), oracle.theirs(config(adapter))
    oracle.randomise(trained(mine))
    pairs = pairs_of(mine, model)
    oracle.agree(mine, model)
    for a, b in pairs.values():
        assert oracle.relative(a.grad, b.grad) <= 1e-7
    oracle.merged_agree(mine, model)


def test_initial_distribution():
    mine = oracle.ours(AdaLoRA(initial_rank=24))
    for name, (out, into) in oracle.SHAPES.items():
        layer = oracle.layer(mine, name)
        assert [tuple(getattr(layer, letter).shape) for letter in LETTERS] == [(24, into), (24, 1), (out, 24)]
        assert layer.E.abs().max() == 0
        for drawn in (layer.A.detach(), layer.B.detach()):
            assert float(drawn.std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(drawn.mean())) <= 0.002


def test_scale():
    assert AdaLoRA().scale == pytest.approx(1, rel=1e-6)
    assert AdaLoRA(initial_rank=6, target_rank=2, alpha=9).scale == 9 / (6 + 1e-5)


@pytest.mark.parametrize(("rank", "count"), [(12, 1_770_048), (8, 1_180_032)])
def test_number_of_parameters(rank, count):
    assert trained_numbers(AdaLoRA(initial_rank=rank, target_rank=8)) == count


def ranks(mine):
    """By slot, in the order of the block."""
    found = mine.shared[0].ranks(mine.layers())
    return {slot: found[slot] for slot in mine.layers()}


def own(mine):
    """The layers, in the order of the block."""
    return list(mine.layers().values())


class TestSchedule:
    @pytest.mark.parametrize(
        ("settings", "initial", "final", "every", "steps"),
        [
            ({"initial_rank": 6, "target_rank": 3}, 5, 12, 3, 40),
            ({"initial_rank": 5, "target_rank": 1, "beta1": 0.6, "beta2": 0.95}, 0, 0, 1, 25),
            ({"initial_rank": 4, "target_rank": 3}, 7, 10, 100, 30),
        ],
    )
    def test_equals_peft_at_every_step(self, settings, initial, final, every, steps):
        adapter = AdaLoRA(**settings, initial_steps=initial, final_steps=final, every=every)
        mine = oracle.ours(adapter, double=True)
        model = oracle.theirs(config(adapter, steps, tinit=initial, tfinal=final, deltaT=every))
        pairs, allocator = pairs_of(mine, model), model.base_model.rankallocator
        (budget,) = mine.shared
        budget.plan(steps)
        generator, pruned = torch.Generator().manual_seed(4), 0
        for step in range(1, steps + 1):
            if step <= steps - final:
                assert budget.budget(step) == allocator.budget_schedule(step)[0]
            for a, b in pairs.values():
                a.grad = b.grad = torch.randn(b.shape, generator=generator).double()
                for p in (a, b):
                    p.data.sub_(p.grad, alpha=0.05)
            model.base_model.update_and_allocate(step)
            budget.after_step(step, mine.layers())
            assert all(torch.equal(a, b) for a, b in pairs.values()), step
            left = sum(int(pairs[name, "E"][1].count_nonzero()) for name in oracle.SHAPES)
            assert left <= budget.budget(step) or step % every != 0
            pruned += left < 4 * adapter.initial_rank
            assert (
                (sum(ranks(mine).values()) == left)
                if step >= steps - final
                else set(ranks(mine).values()) == {adapter.initial_rank}
            )
        assert pruned >= 5 or every == 100
        assert sum(ranks(mine).values()) == 4 * adapter.target_rank
        assert len(set(ranks(mine).values())) > 1
        assert budget.importance.abs().max() == budget.uncertainty.abs().max() == 0

    @pytest.mark.parametrize(
        ("initial", "final", "every", "gamma", "optimizer"),
        [(3, 10, 2, 0.5, "AdamW"), (0, 1, 1, 2.0, "AdamW"), (5, 15, 4, 0.1, "SGD"), (2, 28, 1, 0.5, "AdamW")],
    )
    def test_a_whole_run_equals_peft(self, initial, final, every, gamma, optimizer):
        """Trained side by side in float64, with a penalty that goes on seeing what was pruned."""

        class WithLoss(oracle.Plain):
            def forward(self, x, wanted):
                return SimpleNamespace(loss=F.mse_loss(super().forward(x), wanted))

        steps = 31
        adapter = AdaLoRA(5, 2, None, initial, final, every, orthogonality=gamma)
        mine = oracle.ours(adapter, double=True)
        settings = config(adapter, steps, tinit=initial, tfinal=final, deltaT=every)
        model = get_peft_model(WithLoss(), settings).double()
        pairs, made = pairs_of(mine, model), []
        for parameters in (trained(mine), trained(model)):
            kind = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[optimizer]
            made.append(kind(parameters, lr=0.02 if optimizer == "AdamW" else 0.5, weight_decay=0.01))
        (budget,) = mine.shared
        budget.plan(steps)
        for step in range(1, steps + 1):
            x, wanted = (t.double() for t in data(step))
            for each in made:
                each.zero_grad()
            (F.mse_loss(mine.run(x), wanted) + budget.penalty(mine.layers())).backward()
            model.base_model(x, wanted).loss.backward()  # which adds the penalty
            for each in made:
                each.step()
            budget.after_step(step, mine.layers())
            model.base_model.update_and_allocate(step)
        assert sum(ranks(mine).values()) == 8
        for name in oracle.SHAPES:
            theirs = model.base_model.model.get_submodule(name)
            assert ranks(mine)[oracle.SLOT_OF[name]] == theirs.lora_E["default"].count_nonzero()
            delta = oracle.layer(mine, name).delta()
            assert delta.abs().max() > 0 or ranks(mine)[oracle.SLOT_OF[name]] == 0
            # PEFT keeps 1 / (r + 1e-5) in float32
            assert oracle.relative(delta, theirs.get_delta_weight("default")) <= 1e-6
        for a, b in pairs.values():
            assert oracle.relative(a, b) <= 1e-6

    def test_parts_of_the_run(self):
        (budget,) = oracle.ours(AdaLoRA()).shared
        for steps, expected in ((200, (20, 80, 2)), (99, (9, 39, 1)), (2, (0, 0, 1))):
            budget.plan(steps)
            assert (budget.initial_steps, budget.final_steps, budget.every) == expected

    @pytest.mark.parametrize(
        ("initial", "final", "steps"),
        [(30, None, 50), (10, 40, 50), (None, 50, 50), (None, 9, 5), (0, 49, 50), (None, None, 1)],
    )
    def test_what_does_not_fit(self, initial, final, steps):
        """At least one step scores what the next ones prune."""
        (budget,) = oracle.ours(AdaLoRA(initial_steps=initial, final_steps=final)).shared
        with pytest.raises(UserError, match=rf"AdaLoRA: .*budget phases.* the run has {steps} steps") as error:
            budget.plan(steps)
        assert "\n" not in str(error.value)

    def test_equal_ranks_prune_nothing(self):
        for steps in (1, 20):
            mine, _ = run(AdaLoRA(initial_rank=3, target_rank=3), steps)
            assert set(ranks(mine).values()) == {3}
            assert all(oracle.layer(mine, name).E.count_nonzero() == 3 for name in oracle.SHAPES)

    def test_a_run_without_a_plan(self):
        mine = oracle.ours(AdaLoRA(initial_rank=3, target_rank=2))
        oracle.step(mine.run)
        mine.shared[0].after_step(1, mine.layers())
        assert set(ranks(mine).values()) == {3}

    @pytest.mark.parametrize("nothing", [None, float("inf"), float("nan")])
    def test_a_step_without_gradients_counts_as_zero(self, nothing):
        """Tensors that the loss does not reach, and steps that gradient scaling left out."""
        found = []
        for missing in (nothing, 0.0):
            mine = oracle.ours(AdaLoRA(initial_rank=3, target_rank=2))
            (budget,) = mine.shared
            budget.plan(10)
            oracle.randomise(trained(mine))
            for step in (1, 2, 3):
                mine.zero_grad()
                oracle.step(mine.run)
                if step == 2:
                    for p in parameters_of(own(mine))[:4]:
                        p.grad = None if missing is None else torch.full_like(p, missing)
                budget.after_step(step, mine.layers())
            found.append((budget.importance, budget.uncertainty))
        for a, b in zip(*found, strict=True):
            assert b.max() > 0
            assert torch.equal(a, b)

    def test_two_budgets_on_one_backbone_mind_their_own_layers(self):
        mine = oracle.ours(AdaLoRA(3, 2), ["image.0.qkv"])
        AdaLoRA(5, 1).attach(mine, ["image.0.fc?"])
        LoRA(rank=2).attach(mine, ["image.0.o"])
        first, second = mine.shared
        assert set(first.ranks(mine.layers())) == {"image.0.qkv"}
        assert set(second.ranks(mine.layers())) == {"image.0.fc1", "image.0.fc2"}
        for budget in mine.shared:
            budget.plan(4)
        oracle.randomise(trained(mine))
        for step in range(1, 5):
            mine.zero_grad()
            oracle.step(mine.run)
            for budget in mine.shared:
                budget.after_step(step, mine.layers())
        assert sum(first.ranks(mine.layers()).values()) == 2
        assert sum(second.ranks(mine.layers()).values()) == 2

    def test_scores_keep_their_range_in_half_precision(self):
        """Products of sensitivities lie below what float16 can tell from zero."""
        mine = oracle.ours(AdaLoRA(3, 2)).half()
        (budget,) = mine.shared
        budget.plan(4)
        generator = torch.Generator().manual_seed(3)
        for step in range(1, 5):
            for p in trained(mine):
                p.grad = (1e-4 * torch.randn(p.shape, generator=generator)).half()
            budget.after_step(step, mine.layers())
        assert sum(ranks(mine).values()) == 8


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(30, 24, generator=generator), torch.randn(30, 24, generator=generator)


def advance(mine, optimizer, first, last):
    """Trains from one step to another, as a run does."""
    (budget,) = mine.shared
    for step in range(first, last + 1):
        x, wanted = data(step)
        penalty = budget.penalty(mine.layers())
        loss = (mine.run(x) - wanted).square().mean() + (0 if penalty is None else penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.after_step(step, mine.layers())
    return mine, budget


def run(adapter, steps):
    mine = oracle.ours(adapter)
    mine.shared[0].plan(steps)
    return advance(mine, torch.optim.AdamW(trained(mine), lr=0.02, amsgrad=True), 1, steps)


SETTINGS = {"initial_rank": 5, "target_rank": 2, "initial_steps": 3, "final_steps": 10, "every": 2}


def prune_to(mine, found):
    """Prunes each layer for good to so many of its first triplets."""
    for layer, rank in zip(own(mine), found, strict=True):
        layer.kept.copy_(torch.arange(layer.rank) < rank)
        with torch.no_grad():
            layer.E.masked_fill_(~layer.kept[:, None], 0)


def stored(mine):
    """What a small file holds of the layers, by layer."""
    return {slot: layer.stored() for slot, layer in mine.layers().items()}


def load(mine, files):
    """Loads that."""
    for slot, layer in mine.layers().items():
        layer.load_state_dict(layer.from_stored(files[slot]))


class TestFiles:
    @pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
    def test_rank_0(self, path):
        """Every product, with autocast, merging, and all that follows a step."""
        mine, plain = oracle.ours(AdaLoRA(initial_rank=3, target_rank=1, path=path)), oracle.Plain()
        (budget,) = mine.shared
        budget.plan(10)
        oracle.randomise(trained(mine))
        prune_to(mine, [0, 0, 0, 3])
        assert list(ranks(mine).values()) == [0, 0, 0, 3]
        assert [v["E"].numel() for v in stored(mine).values()] == [0, 0, 0, 3]
        with torch.no_grad():
            own(mine)[3].E.zero_()
        x = data(0)[0]
        assert oracle.relative(mine.run(x), plain(x)) <= 1e-6
        optimizer = torch.optim.AdamW(trained(mine), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (mine.run(x).square().mean() + budget.penalty(mine.layers())).backward()
            optimizer.step()
            budget.after_step(11, mine.layers())
        assert [int(v.E.count_nonzero()) for v in own(mine)] == [0, 0, 0, 3]
        assert all(torch.isfinite(p).all() for p in trained(mine))
        given = mine.run(x)
        assert oracle.relative(given, plain(x)) > 1e-3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert oracle.relative(mine.train().run(x).float(), given) <= 0.05
        merge(mine)
        assert oracle.relative(mine.run(x), given) <= 1e-5
        unmerge(mine)
        files, again = stored(mine), oracle.ours(AdaLoRA(initial_rank=3, target_rank=1, path=path))
        load(again, files)
        assert oracle.relative(again.run(x), given) <= 1e-6

    @pytest.mark.parametrize("found", [[0, 1, 2, 3], [3, 3, 3, 3]])
    @pytest.mark.parametrize("named", [True, False])
    def test_saved_and_loaded(self, found, named, tmp_path):
        """What is left alone, and at its places where the file names them; files of version 1 do not."""
        mine, other = (oracle.ours(AdaLoRA(initial_rank=3, target_rank=2)) for _ in range(2))
        oracle.randomise(trained(mine))
        prune_to(mine, found)
        with torch.no_grad():
            for layer in own(mine):  # places that are not the first ones
                for tensor, dim in ((layer.A, 0), (layer.E, 0), (layer.B, 1)):
                    tensor.copy_(tensor.flip(dim))
                layer.kept.copy_(layer.kept.flip(0))
        torch.save(stored(mine), tmp_path / "small.pt")
        saved = torch.load(tmp_path / "small.pt")
        assert [v["E"].shape for v in saved.values()] == [(rank, 1) for rank in found]
        assert [v["A"].shape[0] for v in saved.values()] == [v["B"].shape[1] for v in saved.values()] == found
        if named:
            saved = {slot: tensors | {"kept": mine.layers()[slot].kept} for slot, tensors in saved.items()}
        load(other, saved)
        x = data(0)[0]
        assert oracle.relative(other.run(x), mine.run(x)) <= 1e-6
        assert ranks(other) == ranks(mine) == dict(zip(oracle.TARGETS, found, strict=True))
        assert all(torch.equal(a.kept, b.kept) for a, b in zip(own(mine), own(other), strict=True)) or not named
        oracle.step(other.run)
        assert all(p.grad.shape == p.shape for p in trained(other))

    def test_what_does_not_fit_is_left_to_be_refused(self):
        small, large = (oracle.layer(oracle.ours(AdaLoRA(initial_rank=r, target_rank=2)), "fc1") for r in (3, 4))
        assert small.from_stored(large.stored())["A"].shape == (4, 24)
        assert small.from_stored({}).keys() == {"kept"}
        odd = large.stored() | {"kept": torch.arange(4) < 1}
        assert large.from_stored({n: t[:2] if n != "B" else t[:, :2] for n, t in odd.items()})["A"].shape == (2, 24)


def test_a_resumed_run_is_the_same(tmp_path):
    """Before, amid and after pruning: tensors, moments and scores are those of a run without a break."""
    adapter, stops = AdaLoRA(**SETTINGS), (1, 11, 19, 20, 21, 25)

    def start():
        mine = oracle.ours(adapter)
        mine.shared[0].plan(30)
        return mine, torch.optim.AdamW(trained(mine), lr=0.02)

    mine, optimizer = start()
    frozen = oracle.Ours(oracle.Plain()).state_dict()
    for stop, before in zip(stops, (0, *stops), strict=False):
        advance(mine, optimizer, before + 1, stop)
        tensors = {n: t for n, t in mine.state_dict().items() if n not in frozen}
        assert {n.split(".")[-1] for n in tensors} == {"A", "E", "B", "kept", "importance", "uncertainty"}
        torch.save({"tensors": tensors, "optimizer": optimizer.state_dict()}, tmp_path / f"{stop}.ckpt")
    advance(mine, optimizer, stops[-1] + 1, 30)
    assert len(set(ranks(mine).values())) > 1
    for stop in stops:
        again, optimizer = start()
        state = torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)
        assert again.load_state_dict(state["tensors"], strict=False).unexpected_keys == []
        optimizer.load_state_dict(state["optimizer"])
        advance(again, optimizer, stop + 1, 30)
        assert ranks(again) == ranks(mine), stop
        assert all(torch.equal(a, b) for a, b in zip(trained(again), trained(mine), strict=True)), stop


class TestPenalty:
    def test_equals_peft(self):
        class WithLoss(oracle.Plain):
            def forward(self, x):
                return SimpleNamespace(loss=torch.zeros(()))

        adapter = AdaLoRA(initial_rank=4, target_rank=2, orthogonality=0.3)
        mine, model = oracle.ours(adapter), get_peft_model(WithLoss(), config(adapter))
        oracle.randomise(trained(mine))
        pairs = pairs_of(mine, model)
        ours, theirs = mine.shared[0].penalty(mine.layers()), model.base_model(torch.zeros(1)).loss
        assert oracle.relative(ours, theirs) <= 1e-6
        ours.backward()
        theirs.backward()
        for (_, letter), (a, b) in pairs.items():
            assert (a.grad is b.grad is None) if letter == "E" else oracle.relative(a.grad, b.grad) <= 1e-5

    @pytest.mark.parametrize("squared", [False, True])
    def test_equals_the_formula(self, squared):
        """Of pruned triplets too; also under autocast, which would round the difference from the identity."""
        adapter = AdaLoRA(initial_rank=4, target_rank=2, squared=squared)
        mine = oracle.ours(adapter)
        (budget,) = mine.shared
        oracle.randomise(trained(mine))
        prune_to(mine, [4, 2, 0, 1])
        norms = []
        for layer in own(mine):
            a, b = layer.A.detach().double(), layer.B.detach().double()
            norms += [torch.linalg.matrix_norm(m - torch.eye(len(m))) for m in (a @ a.T, b.T @ b)]
        expected = 0.1 / 8 * sum(n**2 if squared else n for n in norms)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert oracle.relative(budget.penalty(mine.layers()), expected) <= 1e-5

    def test_orthogonal_rows_cost_nothing(self):
        mine = oracle.ours(AdaLoRA(initial_rank=4, target_rank=2))
        (budget,) = mine.shared
        for layer in own(mine):
            layer.A.data, layer.B.data = torch.eye(*layer.A.shape), torch.eye(*layer.B.shape)
        budget.penalty(mine.layers()).backward()
        assert float(budget.penalty(mine.layers()).detach()) == 0
        assert all(torch.isfinite(p.grad).all() for p in trained(mine) if p.grad is not None)

    def test_can_be_left_out(self):
        mine = oracle.ours(AdaLoRA(orthogonality=0))
        assert mine.shared[0].penalty(mine.layers()) is None


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"AdaLoRA: rank 25 .* 24.* image\.0\.fc1"):
        oracle.ours(AdaLoRA(initial_rank=25), ["image.0.fc1"])
