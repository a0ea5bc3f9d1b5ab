"""What layers have in memory at most, and how many are recomputed for it: by hand."""

import pytest

from posttrain.models.kernels.tiles import TILE
from posttrain.models.language.room import Layers

TEN = Layers(100, 10, 10, 100)  # each leaves 100, of which 10 are inputs
TILED = TEN._replace(inside=40)


def test_at_most_there_is_one_layer_in_whole_and_what_its_backward_works_with() -> None:
    assert TEN.most(0) == 1000 + 140
    assert TEN.most(10) == 100 + 100 + 140
    assert TEN.most(4) == 600 + 40 + 100 + 140
    assert TEN.most(1) == 1000 + 140  # no more than nothing recomputed: the one in whole is the first of the backward


def test_one_that_goes_in_tiles_is_not_there_in_whole() -> None:
    assert TILED.most(10) == 100 + 40 + 56
    assert TILED.most(4) == 600 + 40 + 40 + 140  # the last ones do not go in tiles
    assert TILED.to_recompute(690) == 6  # 490 / 90
    found = [Layers.of(100, 40, 10, 10, tokens).inside for tokens in (2 * TILE - 1, 0, 2 * TILE, 6 * TILE)]
    assert found == pytest.approx([100, 100, 70, 50])


def test_layers_to_recompute() -> None:
    assert TEN.to_recompute(1140) == 0
    assert TEN.to_recompute(1139) == 2  # 101 too much with the one that is there in whole: two spare 180
    assert TEN.to_recompute(690) == 7  # 550 / 90
    assert TEN.to_recompute(0) == 10


def test_dense_layers() -> None:
    """Half of what is left is not touched: of 200, and with 7 layers recomputed of 1340 - 300 - 70 - 100 - 140."""
    assert TEN.to_keep_dense(1340, 0, 30) == 3
    assert TEN.to_keep_dense(1340, 7, 60) == 6
    assert TEN.to_keep_dense(1340, 7, 1) == 10
    assert TEN.to_keep_dense(1000, 0, 30) == 0
