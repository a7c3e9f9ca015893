"""PRILoRA's pruning of A: which entries, when, by whose inputs, and that they may come back."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.base import adapters, trainable
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.prilora import PRILoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import only
from fedlora_mini.regularizers.base import Context
from fedlora_mini.regularizers.mask import InputMask, least


def oracle(A, average, ratio):
    """The row's formula in a loop: sort a row's |A_ij| x_j, zero the lowest."""
    out = A.clone()
    for i in range(len(A)):
        importance = [abs(float(A[i, j])) * float(average[j]) for j in range(A.shape[1])]
        for j in sorted(range(A.shape[1]), key=importance.__getitem__)[: int(ratio * A.shape[1])]:
            out[i, j] = 0
    return out


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_the_least_important_share_of_every_row(n, ratio):
    g = torch.Generator().manual_seed(n)
    A, norms = torch.randn(3, n, generator=g), torch.rand(n, generator=g)
    assert torch.equal(A.masked_fill(least(A.abs() * norms, ratio), 0), oracle(A, norms, ratio))


def test_of_equal_entries_the_first_go():
    assert least(torch.ones(1, 4), 0.5).tolist() == [[True, True, False, False]]


def test_the_average_of_input_norms_decides_at_every_nth_step_of_all_rounds():
    """Round 3 of rounds of 4 steps: steps 9 to 12 of the training. The norms are those of the steps so far."""
    g = torch.Generator().manual_seed(0)
    layer = PRILoRA(torch.nn.Linear(6, 2), rank=2, generator=g)
    term, memory, average = InputMask(every=11, ratio=0.5, beta=0.6), {}, None
    for step in (1, 2, 3, 4):
        A = torch.randn(2, 6, generator=g)
        layer.seen = torch.rand(6, generator=g)
        average = layer.seen if average is None else 0.6 * average + 0.4 * layer.seen
        expected = oracle(A, average, 0.5) if step == 3 else A.clone()
        moves = frozenset({"P.A"})
        context = Context(3, step, {}, {}, 0.1, 4, layers={"P": layer}, memory=memory, moves=moves)
        term.gradient_({"P.A": torch.zeros(2, 6)}, {"P.A": A}, context)
        term.prox_({"P.A": A}, context)
        assert torch.equal(A, expected)


def test_inputs_that_are_silent_are_cut_first(adapted, fit):
    """The third channel of an image is made zero: its columns are pruned whatever A is there."""
    model = adapted(PRILoRA, rank=2)
    stem = dict(adapters(model))["encoder.stem"]  # 3 channels, kernel 3 by 3
    with torch.no_grad():
        stem.A[:, 18:] *= 1000
    stem.register_forward_pre_hook(lambda module, args: (args[0] * torch.tensor([1.0, 1.0, 0.0])[:, None, None],))
    [end] = fit(model, InputMask(every=6, ratio=9 / 27), steps=6)
    assert torch.equal(end["encoder.stem.A"] == 0, torch.arange(27).expand(2, 27) >= 18)


def test_half_of_A_is_zero_after_a_pruning_and_grows_back_later(adapted, fit):
    model = adapted(PRILoRA, rank=2)
    shares = []
    for steps in (4, 5, 8):
        [end] = fit(model, InputMask(every=4), steps=steps)
        rows = [(row == 0).float().mean() for name, value in end.items() if name.endswith(".A") for row in value]
        shares.append(float(torch.stack(rows).mean()))
    assert shares[0] == shares[2] == pytest.approx(0.5, abs=0.02)  # floor(n / 2) of n
    assert shares[1] < 0.1


def test_only_A_changes_and_only_at_a_pruning(adapted, fit):
    model = adapted(PRILoRA, rank=2)
    [plain], [pruned], [waiting] = (fit(model, *t, steps=4) for t in ((), (InputMask(4),), (InputMask(5),)))
    assert S.digest(plain) == S.digest(waiting)
    for name, value in pruned.items():
        assert torch.equal(value, plain[name]) == name.endswith(".B")
        assert torch.equal(value[value != 0], plain[name][value != 0])


def test_an_A_that_stands_still_keeps_its_bits(adapted, fit):
    model = adapted(PRILoRA, rank=2)
    start = trainable(model)
    [end] = fit(model, InputMask(every=2), schedule=only("B"), steps=4)
    assert all(torch.equal(start[name], end[name]) == name.endswith(".A") for name in start)


def test_grouped_clients_end_like_sequential_ones_and_always_alike(adapted, fit):
    """Each client prunes by its own inputs."""
    model = adapted(PRILoRA, torch.float64, rank=2)
    ends = [fit(model, InputMask(every=3), clients=3, grouped=g) for g in (False, True, True)]
    assert S.digest(ends[1]) == S.digest(ends[2])
    for one, other in zip(ends[0], ends[1], strict=True):
        assert all(torch.equal(one[name] == 0, other[name] == 0) for name in one)
        assert S.norm(S.sub(one, other)) < 1e-7 * S.norm(one)


def test_errors(adapted, fit):
    with pytest.raises(FedloraError, match="every must be at least 1"):
        InputMask(0)
    with pytest.raises(FedloraError, match=r"ratio must be in \[0, 1\)"):
        InputMask(ratio=1.0)
    with pytest.raises(FedloraError, match="needs layers adapted by PRILoRA; adapters here: LoRA"):
        fit(adapted(LoRA, rank=2), InputMask())
