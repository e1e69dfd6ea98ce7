"""AdaLoRA equals PEFT's, step by step over its whole schedule, and is compacted without a trace."""

from types import SimpleNamespace

import oracle
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from reference_tower import trained_numbers

from kshot.adapters import AdaLoRA
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
    mine, model = oracle.ours(adapter), oracle.theirs(config(adapter))
    oracle.randomise(trained(mine))
    pairs = pairs_of(mine, model)
    oracle.agree(mine, model)
    for a, b in pairs.values():
        assert oracle.relative(a.grad, b.grad) <= 1e-5
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
        mine = oracle.ours(adapter)
        model = oracle.theirs(config(adapter, steps, tinit=initial, tfinal=final, deltaT=every))
        pairs, allocator = pairs_of(mine, model), model.base_model.rankallocator
        (budget,) = mine.shared
        budget.plan(steps)
        generator, pruned, rows = torch.Generator().manual_seed(4), 0, {}
        for step in range(1, steps + 1):
            if step <= steps - final:
                assert budget.budget(step) == allocator.budget_schedule(step)[0]
            for (name, letter), (a, b) in pairs.items():
                b.grad = torch.randn(b.shape, generator=generator)
                kept = rows[name] if step > steps - final else slice(None)
                a.grad = b.grad[:, kept] if letter == "B" else b.grad[kept]
                for p in (a, b):
                    p.data.sub_(p.grad, alpha=0.05)
            model.base_model.update_and_allocate(step)
            budget.after_step(step, [])
            rows = {name: pairs[name, "E"][1].flatten() != 0 for name in oracle.SHAPES}
            for (name, letter), (a, b) in pairs.items():
                kept = rows[name] if step >= steps - final else slice(None)
                assert torch.equal(a, b[:, kept] if letter == "B" else b[kept]), (step, name, letter)
            left = int(sum(kept.sum() for kept in rows.values()))
            assert left <= budget.budget(step) or step % every != 0
            pruned += left < 4 * adapter.initial_rank
        assert pruned >= 5 or every == 100
        assert sum(budget.ranks.values()) == 4 * adapter.target_rank
        assert len(set(budget.ranks.values())) > 1
        assert not len(budget.importance)

    def test_parts_of_the_run(self):
        (budget,) = oracle.ours(AdaLoRA()).shared
        for steps, expected in ((200, (20, 80, 2)), (99, (9, 39, 1)), (1, (0, 0, 1))):
            budget.plan(steps)
            assert (budget.initial_steps, budget.final_steps, budget.every) == expected

    @pytest.mark.parametrize(
        ("initial", "final", "steps"), [(30, None, 50), (10, 40, 50), (None, 50, 50), (None, 9, 5)]
    )
    def test_what_does_not_fit(self, initial, final, steps):
        (budget,) = oracle.ours(AdaLoRA(initial_steps=initial, final_steps=final)).shared
        with pytest.raises(UserError, match=rf"AdaLoRA: .*budget phases.* the run has {steps} steps") as error:
            budget.plan(steps)
        assert "\n" not in str(error.value)

    def test_equal_ranks_prune_nothing(self):
        mine, budget = run(AdaLoRA(initial_rank=3, target_rank=3), 20)
        assert set(budget.ranks.values()) == {3}
        assert all(oracle.layer(mine, name).E.count_nonzero() == 3 for name in oracle.SHAPES)

    def test_a_run_of_one_step(self):
        _, budget = run(AdaLoRA(initial_rank=3, target_rank=2), 1)
        assert set(budget.ranks.values()) == {3}

    def test_a_run_without_a_plan(self):
        mine = oracle.ours(AdaLoRA(initial_rank=3, target_rank=2))
        (budget,) = mine.shared
        oracle.step(mine.run)
        budget.after_step(1, [])
        assert set(budget.ranks.values()) == {3}

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
                    for p in budget.parameters_of_layers()[:4]:
                        p.grad = None if missing is None else torch.full_like(p, missing)
                budget.after_step(step, [])
            found.append((budget.importance, budget.uncertainty))
        for a, b in zip(*found, strict=True):
            assert b.max() > 0
            assert torch.equal(a, b)


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(30, 24, generator=generator), torch.randn(30, 24, generator=generator)


def advance(mine, optimizer, first, last):
    """Trains from one step to another, as a run does."""
    (budget,) = mine.shared
    for step in range(first, last + 1):
        x, wanted = data(step)
        penalty = budget.penalty()
        loss = (mine.run(x) - wanted).square().mean() + (0 if penalty is None else penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.after_step(step, [optimizer])
    return mine, budget


def run(adapter, steps):
    mine = oracle.ours(adapter)
    mine.shared[0].plan(steps)
    return advance(mine, torch.optim.AdamW(trained(mine), lr=0.02, amsgrad=True), 1, steps)


SETTINGS = {"initial_rank": 5, "target_rank": 2, "initial_steps": 3, "final_steps": 10, "every": 2}


class TestCompaction:
    @pytest.mark.parametrize("optimizer", ["AdamW", "AdamW, amsgrad", "SGD"])
    def test_trains_on_as_masked_triplets_would(self, optimizer, monkeypatch):
        """Without the penalty, which sees pruned rows as long as there are any."""
        found, kept = [], {}
        for compacts in (True, False):
            mine = oracle.ours(AdaLoRA(**SETTINGS, orthogonality=0))
            (budget,) = mine.shared
            budget.plan(30)
            made = {
                "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
                "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
                "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
            }[optimizer](trained(mine))
            if not compacts:
                monkeypatch.setattr(budget, "compact", lambda chosen, _: kept.update(enumerate(chosen)))
            advance(mine, made, 1, 20)
            for step in range(21, 31):
                advance(mine, made, step, step)
                for layer, chosen in zip(budget.layers.values(), kept.values(), strict=False):
                    layer.E.data.masked_fill_(~chosen[:, None], 0)
            with torch.no_grad():
                found.append(mine.run(data(0)[0]))
            values = [state for p in trained(mine) for state in made.state[p].values() if state.ndim > 0]
            assert all(state.shape in {p.shape for p in trained(mine)} for state in values)
        assert sum(budget.ranks.values()) == 20
        assert sum(int(k.sum()) for k in kept.values()) == 8
        assert oracle.relative(*found) <= 1e-5

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    def test_leaves_outputs_gradients_and_moments_alone(self, path):
        mine = oracle.ours(AdaLoRA(**SETTINGS, path=path))
        (budget,) = mine.shared
        budget.plan(30)
        optimizer = torch.optim.AdamW(trained(mine), lr=0.02)
        advance(mine, optimizer, 1, 19)
        with torch.no_grad():
            kept = budget.prune(8)
        mine.zero_grad()
        before = [*oracle.step(mine.run), *merged(mine)]
        known = [(p, p.grad.clone(), optimizer.state[p]["exp_avg_sq"].clone()) for p in budget.parameters_of_layers()]
        budget.compact(kept, [optimizer])
        for (p, gradient, moment), letter, mask in zip(
            known, 4 * LETTERS, (m for m in kept for _ in LETTERS), strict=True
        ):
            rows = (slice(None), mask) if letter == "B" else mask
            assert torch.equal(p.grad, gradient[rows])
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], moment[rows])
        assert list(budget.ranks.values()) == [int(mask.sum()) for mask in kept]
        assert sum(budget.ranks.values()) == 8
        for a, b in zip([*oracle.step(mine.run), *merged(mine)], before, strict=True):
            assert oracle.relative(a, b) <= 1e-5

    @pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
    def test_rank_0(self, path):
        """Every product, with autocast, merging, and all that follows a step."""
        mine, plain = oracle.ours(AdaLoRA(initial_rank=3, target_rank=1, path=path)), oracle.Plain()
        (budget,) = mine.shared
        budget.plan(10)
        oracle.randomise(trained(mine))
        nothing, something = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
        for layer in budget.layers.values():
            layer.E.data.zero_()
        budget.compact([nothing, nothing, nothing, something], [])
        assert list(budget.ranks.values()) == [0, 0, 0, 3]
        x = data(0)[0]
        assert oracle.relative(mine.run(x), plain(x)) <= 1e-6
        optimizer = torch.optim.AdamW(trained(mine), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (mine.run(x).square().mean() + budget.penalty()).backward()
            optimizer.step()
        with torch.no_grad():
            budget.observe()
            budget.prune(2)
        assert [int(v.E.count_nonzero()) for v in budget.layers.values()] == [0, 0, 0, 2]
        assert all(torch.isfinite(p).all() for p in trained(mine))
        given = mine.run(x)
        assert oracle.relative(given, plain(x)) > 1e-3
        with torch.no_grad():
            assert oracle.relative(mine.eval().run(x), given) <= 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert oracle.relative(mine.train().run(x).float(), given) <= 0.05
        merge(mine)
        assert oracle.relative(mine.run(x), given) <= 1e-5
        unmerge(mine)

    @pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [3, 3, 3, 3]])
    def test_saved_and_loaded(self, ranks, tmp_path):
        mine, other = (oracle.ours(AdaLoRA(initial_rank=3, target_rank=2)) for _ in range(2))
        oracle.randomise(trained(mine))
        mine.shared[0].compact([torch.arange(3) < rank for rank in ranks], [])
        torch.save({n: p for n, p in mine.state_dict().items() if ".adapters." in n}, tmp_path / "small.pt")
        saved = torch.load(tmp_path / "small.pt")
        assert not any("importance" in n for n in mine.state_dict())
        for name in oracle.SHAPES:
            layer = oracle.layer(other, name)
            (prefix,) = (n for n, m in other.named_modules() if m is layer)
            layer.fit_shapes({n.removeprefix(f"{prefix}."): v for n, v in saved.items() if n.startswith(f"{prefix}.")})
        assert other.load_state_dict(saved, strict=False).unexpected_keys == []
        assert torch.equal(mine.run(data(0)[0]), other.run(data(0)[0]))
        oracle.step(other.run)
        assert all(p.grad.shape == p.shape for p in trained(other))

    def test_takes_on_no_larger_rank_than_its_own(self):
        small, large = (oracle.layer(oracle.ours(AdaLoRA(initial_rank=r, target_rank=2)), "fc1") for r in (3, 4))
        small.fit_shapes(large.state_dict())
        assert len(small.E) == 3
        small.fit_shapes({})
        assert len(small.E) == 3


@pytest.mark.parametrize("stop", [1, 11, 19, 20, 25])
def test_a_resumed_run_is_the_same(stop, tmp_path):
    """Before, amid and after pruning: tensors, moments and scores are those of a run without a break."""
    adapter = AdaLoRA(**SETTINGS)

    def start():
        mine = oracle.ours(adapter)
        mine.shared[0].plan(30)
        return mine, torch.optim.AdamW(trained(mine), lr=0.02)

    mine, optimizer = start()
    advance(mine, optimizer, 1, stop)
    tensors = {f"{i}.{n}": p for i, v in enumerate(mine.shared[0].layers.values()) for n, p in v.state_dict().items()}
    state = {"tensors": tensors, "optimizer": optimizer.state_dict(), "shared": mine.shared[0].training_state()}
    torch.save(state, tmp_path / "last.ckpt")
    advance(mine, optimizer, stop + 1, 30)
    again, optimizer = start()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for i, layer in enumerate(again.shared[0].layers.values()):
        own = {n.removeprefix(f"{i}."): v for n, v in state["tensors"].items() if n.startswith(f"{i}.")}
        layer.fit_shapes(own)
        layer.load_state_dict(own)
    optimizer.load_state_dict(state["optimizer"])
    again.shared[0].load_training_state(state["shared"])
    advance(again, optimizer, stop + 1, 30)
    assert again.shared[0].ranks == mine.shared[0].ranks
    assert len(set(again.shared[0].ranks.values())) > 1
    assert all(torch.equal(a, b) for a, b in zip(trained(again), trained(mine), strict=True))


class TestPenalty:
    def test_equals_peft(self):
        class WithLoss(oracle.Plain):
            def forward(self, x):
                return SimpleNamespace(loss=torch.zeros(()))

        adapter = AdaLoRA(initial_rank=4, target_rank=2, orthogonality=0.3)
        mine, model = oracle.ours(adapter), get_peft_model(WithLoss(), config(adapter))
        oracle.randomise(trained(mine))
        pairs = pairs_of(mine, model)
        ours, theirs = mine.shared[0].penalty(), model.base_model(torch.zeros(1)).loss
        assert oracle.relative(ours, theirs) <= 1e-6
        ours.backward()
        theirs.backward()
        for (_, letter), (a, b) in pairs.items():
            assert (a.grad is b.grad is None) if letter == "E" else oracle.relative(a.grad, b.grad) <= 1e-5

    @pytest.mark.parametrize("squared", [False, True])
    def test_equals_the_formula_whatever_the_ranks(self, squared):
        """Also under autocast, which would round the difference from the identity."""
        adapter = AdaLoRA(initial_rank=4, target_rank=2, squared=squared)
        mine = oracle.ours(adapter)
        (budget,) = mine.shared
        oracle.randomise(trained(mine))
        budget.compact([torch.arange(4) < rank for rank in (4, 2, 0, 1)], [])
        norms = []
        for layer in budget.layers.values():
            a, b = layer.A.detach().double(), layer.B.detach().double()
            norms += [torch.linalg.matrix_norm(m - torch.eye(len(m))) for m in (a @ a.T, b.T @ b)]
        expected = 0.1 / 8 * sum(n**2 if squared else n for n in norms)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert oracle.relative(budget.penalty(), expected) <= 1e-5

    def test_orthogonal_rows_cost_nothing(self):
        mine = oracle.ours(AdaLoRA(initial_rank=4, target_rank=2))
        (budget,) = mine.shared
        for layer in budget.layers.values():
            layer.A.data, layer.B.data = torch.eye(*layer.A.shape), torch.eye(*layer.B.shape)
        budget.penalty().backward()
        assert float(budget.penalty().detach()) == 0
        assert all(torch.isfinite(p.grad).all() for p in trained(mine) if p.grad is not None)

    def test_can_be_left_out(self):
        assert oracle.ours(AdaLoRA(orthogonality=0)).shared[0].penalty() is None


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"AdaLoRA: rank 25 .* 24.* image\.0\.fc1"):
        oracle.ours(AdaLoRA(initial_rank=25), ["image.0.fc1"])


def merged(mine):
    """The merged weights."""
    with torch.no_grad():
        return [mine.get_submodule(name).effective_weight() for name in oracle.SHAPES]
