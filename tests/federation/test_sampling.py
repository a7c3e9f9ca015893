import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import dirichlet, repartition
from fedlora_mini.federation.partition import mixtures
from fedlora_mini.federation.sampling import batch_indices, drawn, flips, generator, participants


def test_generators_depend_on_their_key_alone():
    draw = [torch.rand(3, generator=generator(0, 1, 2, "batches")) for _ in range(2)]
    assert torch.equal(*draw)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(draw[0], torch.rand(3, generator=generator(*other, "batches")))


def test_every_image_is_seen_once_before_any_is_seen_twice():
    rows = batch_indices(10, 4, 5, generator(0))
    assert rows.shape == (5, 4)
    assert sorted(rows.flatten().tolist()) == sorted(list(range(10)) * 2)


def test_a_batch_may_be_larger_than_the_site():
    assert batch_indices(3, 8, 2, generator(0)).shape == (2, 8)


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 10), (0.5, 5), (0.01, 1)])
def test_participants_are_distinct_sorted_and_as_many_as_asked(fraction, size):
    chosen = participants(list(range(10)), fraction, 0, 3)
    assert chosen == sorted(set(chosen)) and len(chosen) == size
    assert chosen == participants(list(range(10)), fraction, 0, 3)


def test_other_rounds_choose_others():
    assert len({tuple(participants(list(range(10)), 0.3, 0, round)) for round in range(8)}) > 4


def test_coins_follow_the_seed_and_without_one_nobody_can_tell_who_is_drawn():
    coins = torch.rand(40, generator=generator(3, 7, "participants"), dtype=torch.float64)
    everybody = list(range(40))
    assert drawn(everybody, 0.3, 3, 7) == torch.nonzero(coins < 0.3).flatten().tolist()
    secret = [drawn(everybody, 0.3, None, 7) for _ in range(200)]
    assert len(set(map(tuple, secret))) == 200 and all(own == sorted(own) for own in secret)
    assert sum(map(len, secret)) / 200 == pytest.approx(12, abs=1.5)
    assert drawn(everybody, 1.0, None, 7) == everybody


def test_a_fraction_outside_its_range_is_refused():
    with pytest.raises(FedloraError, match="fraction"):
        participants([0, 1], 0.0, 0, 0)


def test_flips_move_image_and_mask_together():
    images = torch.rand(64, 1, 5, 4)
    masks = (images[:, 0] * 200).to(torch.uint8)
    x, y = flips(images, masks, generator(1))
    assert torch.equal((x[:, 0] * 200).to(torch.uint8), y)
    assert not torch.equal(x, images)


def test_without_a_generator_images_turn_otherwise_every_time():
    images = torch.rand(64, 1, 5, 4)
    masks = (images[:, 0] * 200).to(torch.uint8)
    (x, y), (z, _) = flips(images, masks, None), flips(images, masks, None)
    assert torch.equal((x[:, 0] * 200).to(torch.uint8), y) and not torch.equal(x, z)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_dirichlet_is_a_partition(alpha):
    labels = torch.arange(200) % 4
    parts = dirichlet(labels, 5, alpha, generator(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(200))


def test_small_alpha_gives_few_labels_per_client_and_large_alpha_all():
    labels = torch.arange(2000) % 10
    purity = []
    for alpha in (0.05, 100.0):
        shares = [
            torch.bincount(labels[p], minlength=10).float() / len(p) for p in dirichlet(labels, 8, alpha, generator(0))
        ]
        purity.append(torch.stack(shares).max(1).values.mean().item())
    assert purity[0] > 0.4 and purity[1] < 0.15


def test_impossible_partitions_are_refused():
    with pytest.raises(FedloraError, match="cannot deal"):
        dirichlet(torch.zeros(3), 5, 1.0, generator(0))


def test_repartition_keeps_every_image_in_its_part(tiny):
    dealt = repartition(tiny, 2, 0.5, seed=3)
    for part in ("train", "val", "test"):
        before = torch.cat([getattr(site, part).images for site in tiny.sites]).flatten(1).sum(1).sort().values
        after = torch.cat([getattr(site, part).images for site in dealt.sites]).flatten(1).sum(1).sort().values
        assert torch.equal(before, after)
    assert dealt.sites[0].record["partition"] == "dirichlet"
    repartition(tiny, 2, 0.5, by="foreground")


def test_a_client_is_tested_on_the_mixture_that_it_trains_on():
    sizes = {"train": (200, 40, 120, 80), "val": (100, 20, 60, 40), "test": (50, 90, 30, 60)}
    labels = {part: torch.arange(4).repeat_interleave(torch.tensor(n)) for part, n in sizes.items()}
    least = {"train": 10, "val": 4, "test": 4}
    parts = mixtures(labels, 6, 0.3, generator(5), least)
    counts = {p: torch.stack([labels[p][rows].bincount(minlength=4) for rows in parts[p]]) for p in sizes}
    for part, found in counts.items():
        assert torch.equal(torch.cat(parts[part]).sort().values, torch.arange(sum(sizes[part])))
        assert int(found.sum(1).min()) >= least[part]
        share = found / torch.tensor(sizes[part])  # of each label's images, by client
        assert (share - counts["train"] / torch.tensor(sizes["train"])).abs().max() < 0.05, "up to one image"
    assert counts["train"].float().std(0).min() > 5, "uneven"


def test_unknown_labels_are_refused(tiny):
    with pytest.raises(FedloraError, match="partition label"):
        repartition(tiny, 2, 0.5, by="colour")
