"""Statistics and gallery: the numbers of a hand-made split, a row a site, a figure that can be saved."""

import io

import pytest
import torch

from fedlora_mini.data import IGNORE, Split, describe, gallery, load, shift_table


def test_the_statistics_of_a_split_drawn_by_hand() -> None:
    images = torch.full((2, 3, 10, 10), 0.25)
    images[1] = 0.75
    masks = torch.zeros(2, 10, 10, dtype=torch.uint8)
    masks[0, :2, :3], masks[0, 5:7, 5:7], masks[0, 9] = 1, 2, IGNORE
    stats = describe(Split(images, masks))
    assert stats["images"] == 2 and stats["intensity_mean"] == pytest.approx(0.5)
    assert stats["intensity_std"] == pytest.approx(0.25, abs=1e-3)
    assert stats["foreground_share"] == pytest.approx(10 / 190)
    assert stats["empty_share"] == 0.5 and stats["objects_per_image"] == 1.0 and stats["object_area_mean"] == 5.0


def test_the_shift_table_shows_both_shifts() -> None:
    data = load("phantom", supervision=1.0, per_site=6, val=2, test=2)
    table = shift_table(data)
    assert list(table.index) == ["site1", "site2", "site3", "site4", "unseen1"]
    assert table.loc["unseen1", "role"] == "unseen" and table.loc["site1", "train"] == 6
    assert table["intensity_mean"].max() > 2 * table["intensity_mean"].min()
    assert table["foreground_share"].max() > 1.5 * table["foreground_share"].min()
    assert data.sites[0].statistics()["foreground_share"] == pytest.approx(table.loc["site1", "foreground_share"])


@pytest.mark.slow
def test_a_gallery_has_a_row_a_site_and_can_be_saved() -> None:
    import matplotlib

    matplotlib.use("Agg")
    data = load("phantom", size=32, per_site=3, val=1, test=1)
    figure = gallery(data, per_site=4)
    assert len(figure.axes) == 5 * 4
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(data.classes[1:])
    assert "site1\n3/1/1" in figure.axes[0].texts[0].get_text()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue()[:4] == b"\x89PNG"
