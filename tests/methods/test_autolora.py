"""AutoLoRA: PEFT's LoRA in both of its phases, an exact hypergradient, and LoRA from fresh values in the end."""

import copy
import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from reference_tower import trained_numbers
from torch import nn

from kshot.adapters import AutoLoRA, LoRA, SearchProblem, autolora
from kshot.adapters.autolora import hypergradient, rank_of
from kshot.errors import UserError

PATHS = ["auto", "factorised", "materialised"]
RANKS = dict(zip(oracle.SHAPES, (1, 3, 4, 2), strict=True))


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def settled(ranks, **settings):
    """The block after a search that found these ranks."""
    mine = oracle.ours(AutoLoRA(**settings))
    for name, rank in ranks.items():
        layer = oracle.layer(mine, name)
        layer.settle(layer.A[:rank], layer.B[:, :rank])
    return mine


@pytest.mark.parametrize("path", PATHS)
def test_search_equals_peft_with_weighted_columns(path):
    mine = oracle.ours(AutoLoRA(max_rank=4, alpha=9.0, path=path), double=True)
    model = oracle.theirs(LoraConfig(r=4, lora_alpha=9, target_modules=list(oracle.SHAPES)))
    oracle.randomise(trained(mine))
    pairs = []
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        pairs.append((ours, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight))
        with torch.no_grad():
            pairs[-1][1].copy_(ours.A)
            pairs[-1][2].copy_(ours.B * F.softmax(ours.a, 0))
    oracle.agree(mine, model)
    for ours, a, b in pairs:
        weighted = ours.B * F.softmax(ours.a, 0)
        for given, expected in zip(
            (ours.A.grad, ours.B.grad, ours.a.grad),
            (a.grad, *torch.autograd.grad(weighted, [ours.B, ours.a], b.grad)),
            strict=True,
        ):
            assert oracle.relative(given, expected) <= 1e-7
    oracle.merged_agree(mine, model)


@pytest.mark.parametrize("path", PATHS)
def test_final_phase_equals_peft_with_a_rank_pattern(path):
    mine = settled(RANKS, max_rank=4, alpha=9.0, path=path).double()
    model = oracle.theirs(LoraConfig(r=8, lora_alpha=9, rank_pattern=RANKS, target_modules=list(oracle.SHAPES)))
    oracle.randomise(trained(mine))
    pairs = []
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        pairs += [(ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    oracle.agree(mine, model)
    for a, b in pairs:
        assert oracle.relative(a.grad, b.grad) <= 1e-7
    oracle.merged_agree(mine, model)


def test_start():
    mine, lora = oracle.ours(AutoLoRA(max_rank=4)), oracle.ours(LoRA(rank=4))
    for name in oracle.SHAPES:
        ours, single = oracle.layer(mine, name), oracle.layer(lora, name)
        assert torch.equal(ours.A, single.A)
        assert torch.equal(ours.B, single.B)
        assert torch.equal(ours.a, torch.ones(4))
        assert ours.undecayed == {"a"}


def test_number_of_parameters():
    assert trained_numbers(AutoLoRA(max_rank=8)) == 1_180_032
    assert sum(p.numel() for p in trained(settled(dict.fromkeys(oracle.SHAPES, 4)))) == sum(
        p.numel() for p in trained(oracle.ours(LoRA(rank=4)))
    )


class TestRanks:
    @pytest.mark.parametrize("rule", ["softmax", "raw"])
    def test_equal_entries_all_count(self, rule):
        for k in range(1, 33):
            for value in (1.0, 0.3, 7.7):
                assert rank_of(torch.full((k,), value), rule) == k

    @pytest.mark.parametrize(
        ("a", "softmax", "raw"),
        [
            ([3.0, 1.5, 0.0, 0.0], 1, 2),  # mean 1.125; shares 0.76, 0.17, 0.04, 0.04
            ([1.0, 1.0, 1.0, 0.9], 3, 3),
            ([2.0, 1.9, 1.0, 1.8, 1.7], 3, 4),
            ([1.01, 1.0, 1.0, 1.0], 1, 1),
            ([1.0, 1.0, 1.0, 0.0], 3, 3),
            ([9.0, 9.0, 0.0, 0.0], 2, 2),
            ([5.0, 3.0, 3.0, 0.0], 1, 3),
        ],
    )
    def test_the_two_rules(self, a, softmax, raw):
        assert (rank_of(torch.tensor(a), "softmax"), rank_of(torch.tensor(a), "raw")) == (softmax, raw)

    @pytest.mark.parametrize("rule", ["softmax", "raw"])
    def test_is_never_0(self, rule):
        generator = torch.Generator().manual_seed(0)
        seen = {rank_of(1 + 3 * torch.randn(8, generator=generator), rule) for _ in range(300)}
        assert 1 <= min(seen) < max(seen) < 8
        assert rank_of(torch.zeros(8), rule) >= 1


class TestHypergradient:
    """On one layer in float64, against differentiation through the step."""

    def setup_method(self):
        mine = oracle.ours(AutoLoRA(max_rank=3), ["image.0.fc1"], double=True)
        oracle.randomise(trained(mine), 0.5)
        self.linear, layer = mine.fc1, oracle.layer(mine, "fc1")
        self.weights, self.a = [layer.A, layer.B], layer.a
        generator = torch.Generator().manual_seed(6)
        self.data = [
            (torch.randn(40, 24, generator=generator).double(), torch.randn(40, 96, generator=generator).double())
            for _ in range(2)
        ]

    def losses(self):
        return [lambda x=x, wanted=y: (torch.tanh(self.linear(x)) - wanted).square().mean() for x, y in self.data]

    def dense(self, split, down, up):
        x, wanted = self.data[split]
        weight = self.linear.weight + 16 / 3 * (up * F.softmax(self.a, 0)) @ down
        return (torch.tanh(F.linear(x, weight, self.linear.bias)) - wanted).square().mean()

    @pytest.mark.parametrize("eta", [[1.0, 1.0], [0.2, 2.0]])
    def test_equals_differentiation_through_a_step(self, eta):
        before = [w.detach().clone() for w in self.weights]
        (given,) = hypergradient(*self.losses(), self.weights, [self.a], eta)
        assert all(torch.equal(w, b) for w, b in zip(self.weights, before, strict=True))
        gradient = torch.autograd.grad(self.dense(0, *self.weights), self.weights, create_graph=True)
        ahead = [w - e * g for w, e, g in zip(self.weights, eta, gradient, strict=True)]
        (exact,) = torch.autograd.grad(self.dense(1, *ahead), self.a)
        (direct,) = torch.autograd.grad(self.dense(1, *(w.detach() for w in ahead)), self.a)
        assert oracle.relative(direct, exact) > 0.02, "the second term does not matter here"
        assert oracle.relative(given, exact) <= 1e-4

    def test_first_order(self):
        before = [w.detach().clone() for w in self.weights]
        (given,) = hypergradient(*self.losses(), self.weights, [self.a], None)
        (exact,) = torch.autograd.grad(self.dense(1, *self.weights), self.a)
        assert oracle.relative(given, exact) <= 1e-10
        assert all(torch.equal(w, b) for w, b in zip(self.weights, before, strict=True))

    def test_what_a_loss_does_not_depend_on_counts_as_zero(self):
        other, nothing = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(3).double())
        given = hypergradient(*self.losses(), [*self.weights, other], [self.a, nothing], [0.3] * 3)
        expected = hypergradient(*self.losses(), self.weights, [self.a], [0.3] * 2)
        assert torch.equal(given[0], expected[0])
        assert given[1].abs().max() == 0
        flat = hypergradient(other.sum, self.a.sum, [other], [self.a], [0.3])
        assert torch.equal(flat[0], torch.ones_like(self.a))


class Task:
    """A block with a head, and batches of two disjoint halves; ``only`` is what the loss sees."""

    def __init__(self, only=None, rate=0.05, autocast=False, **settings):
        self.mine = oracle.ours(AutoLoRA(**{"max_rank": 4, "search_lr": 0.05} | settings))
        self.head = nn.Linear(24, 24)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(24))
            self.head.bias.zero_()
        self.only, self.rate, self.autocast, self.drawn = only, rate, autocast, [0, 0]

    def batches(self, half):
        generator = torch.Generator().manual_seed(half)
        pool = [(torch.randn(20, 24, generator=generator), torch.randn(20, 24, generator=generator)) for _ in range(3)]
        for batch in itertools.cycle(pool):
            self.drawn[half] += 1
            yield batch

    def loss(self, batch):
        x, wanted = batch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            features = self.mine.qkv(x)[:, :24] if self.only == "qkv" else self.mine.run(x)
            return (self.head(features) - wanted).square().mean()

    def problem(self, steps=20):
        return SearchProblem(
            self.mine.layers(),
            self.batches(0),
            self.batches(1),
            self.loss,
            lambda parameters: torch.optim.AdamW(parameters, lr=self.rate),
            trained(self.mine) + list(self.head.parameters()),
            steps,
        )

    def search(self, steps=20):
        self.mine.shared[0].search(self.problem(steps))
        return self

    def ranks(self):
        return self.mine.shared[0].ranks(self.mine.layers())

    def found(self):
        return torch.stack([oracle.layer(self.mine, name).searched for name in oracle.SHAPES])


class TestSearch:
    def test_ends_in_fresh_lora_of_the_ranks_it_found(self):
        task = Task(alpha=8.0)
        head = copy.deepcopy(task.head)
        task.search(40)
        (search,) = task.mine.shared
        assert task.drawn == [20, 20]
        assert set(task.ranks()) == set(oracle.TARGETS)
        assert all(1 <= rank <= 4 for rank in task.ranks().values())
        assert len(set(task.ranks().values())) > 1
        assert all(torch.equal(a, b) for a, b in zip(task.head.parameters(), head.parameters(), strict=True))
        assert all(p.grad is None for p in [*trained(task.mine), *task.head.parameters()])
        for name, slot in oracle.SLOT_OF.items():
            ours, rank = oracle.layer(task.mine, name), task.ranks()[slot]
            assert rank == rank_of(ours.searched, "softmax")
            assert (ours.searched - 1).abs().max() > 0.1
            assert {n for n, _ in ours.named_parameters()} == {"A", "B"}
            single = oracle.layer(oracle.ours(LoRA(rank=rank, alpha=8.0), [slot]), name)
            assert torch.equal(ours.A, single.A)
            assert torch.equal(ours.B, single.B)
            for layer in (ours, single):
                oracle.randomise([layer.A, layer.B])
            assert oracle.relative(ours.effective_weight(), single.effective_weight()) <= 1e-6
        before = trained(task.mine)
        search.search(task.problem())
        assert all(a is b for a, b in zip(before, trained(task.mine), strict=True)), "searched twice"

    def test_what_the_loss_does_not_see_keeps_every_rank(self):
        task = Task(only="qkv").search()
        ranks = task.ranks()
        assert ranks.pop("image.0.qkv") < 4
        assert set(ranks.values()) == {4}
        assert torch.equal(task.found()[1:], torch.ones(3, 4))

    def test_follows_algorithm_1(self):
        """Against a loop in which the step looked ahead to is differentiated as it is."""
        task = Task(search_steps=6, rate=0.01)
        other = Task(rate=0.01)
        layers = [oracle.layer(other.mine, name) for name in oracle.SHAPES]
        a = [layer.a for layer in layers]
        weights = [w for layer in layers for w in (layer.A, layer.B)] + list(other.head.parameters())
        inner = torch.optim.AdamW(weights, lr=0.01)
        outer = torch.optim.Adam(a, lr=0.05, betas=(0.5, 0.999))

        def loss(batch, values):
            x, wanted = batch
            runs = {}
            for i, (name, letter) in enumerate(zip(oracle.SHAPES, a, strict=True)):
                linear = other.mine.get_submodule(name)
                up = values[2 * i + 1] * F.softmax(letter, 0)
                weight = linear.weight + 4 * up @ values[2 * i]
                runs[name] = lambda x, weight=weight, linear=linear: F.linear(x, weight, linear.bias)
            return (F.linear(oracle.block(x, runs), *values[-2:]) - wanted).square().mean()

        for train, val in zip(*(itertools.islice(other.batches(half), 6) for half in (0, 1)), strict=True):
            gradient = torch.autograd.grad(loss(train, weights), weights, create_graph=True)
            ahead = [w - 0.01 * g for w, g in zip(weights, gradient, strict=True)]
            for parameter, found in zip(a, torch.autograd.grad(loss(val, ahead), a), strict=True):
                parameter.grad = found
            outer.step()
            for parameter, found in zip(weights, torch.autograd.grad(loss(train, weights), weights), strict=True):
                parameter.grad = found
            inner.step()
        expected = torch.stack(a).detach()
        assert (expected - 1).abs().max() > 0.1
        assert float((task.search().found() - expected).abs().max()) <= 0.02

    @pytest.mark.parametrize("other", [{"path": "materialised"}, {"dropout": 0.5}])
    def test_neither_the_path_nor_dropout_matters(self, other):
        """Weights that are looked ahead to and put back are noticed, and losses are compared without masks."""
        task = Task(search_steps=5, **other).search()
        assert oracle.relative(task.found(), Task(search_steps=5, path="factorised").search().found()) <= 1e-3
        assert {v.dropout for v in task.mine.layers().values()} == {other.get("dropout", 0.0)}

    def test_autocast(self):
        task = Task(search_steps=5, autocast=True).search()
        assert torch.isfinite(task.found()).all()
        assert (task.found() - 1).abs().max() > 0.1

    @pytest.mark.parametrize(("settings", "steps", "batches"), [({}, 9, 4), ({}, 1, 1), ({"search_steps": 3}, 50, 3)])
    def test_number_of_steps(self, settings, steps, batches):
        assert Task(first_order=True, **settings).search(steps).drawn == [batches, batches]

    @pytest.mark.parametrize("first_order", [False, True])
    def test_looks_ahead_by_each_weights_own_rate(self, first_order, monkeypatch):
        task, seen = Task(first_order=first_order, search_steps=1), []
        monkeypatch.setattr(autolora, "hypergradient", lambda *given: seen.append(given) or hypergradient(*given))
        head = {id(p) for p in task.head.parameters()}

        def optimizer(parameters):
            inside, outside = [[p for p in parameters if (id(p) in head) == own] for own in (False, True)]
            return torch.optim.SGD([{"params": inside}, {"params": outside, "lr": 0.7}], lr=0.1)

        problem = task.problem()
        task.mine.shared[0].search(SearchProblem(**vars(problem) | {"optimizer": optimizer}))
        ((_, _, weights, a, eta),) = seen
        assert len(a) == 4
        assert len(weights) == 4 * 2 + 2
        assert eta == (None if first_order else [0.1] * 8 + [0.7] * 2)


def test_saved_and_loaded(tmp_path):
    task = Task().search()
    oracle.randomise(trained(task.mine))
    torch.save({n: t for n, t in task.mine.state_dict().items() if ".adapters." in n}, tmp_path / "small.pt")
    saved, other = torch.load(tmp_path / "small.pt"), oracle.ours(AutoLoRA(max_rank=4))
    for name in oracle.SHAPES:
        layer = oracle.layer(other, name)
        (prefix,) = (n for n, m in other.named_modules() if m is layer)
        own = {n.removeprefix(f"{prefix}."): t for n, t in saved.items() if n.startswith(f"{prefix}.")}
        assert set(own) == {"A", "B", "searched"}
        assert layer.from_stored(own).keys() == own.keys()
    assert other.load_state_dict(saved, strict=False).unexpected_keys == []
    x = torch.randn(5, 24)
    assert torch.equal(task.mine.run(x), other.run(x))
    assert [p.shape for p in trained(task.mine)] == [p.shape for p in trained(other)]
    assert other.shared[0].ranks(other.layers()) == task.ranks()
    assert torch.equal(oracle.layer(other, "fc1").searched, oracle.layer(task.mine, "fc1").searched)


@pytest.mark.parametrize("saved", [{}, {"A": torch.ones(2, 24), "a": torch.ones(2)}, {"A": torch.ones(5, 24)}])
def test_other_checkpoints_leave_the_search_open(saved):
    layer = oracle.layer(oracle.ours(AutoLoRA(max_rank=4)), "fc1")
    assert layer.from_stored(saved) == saved
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {"A": (4, 24), "B": (96, 4), "a": (4,)}


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"AutoLoRA: rank 25 .* 24.* image\.0\.fc1"):
        oracle.ours(AutoLoRA(max_rank=25), ["image.0.fc1"])
