"""What layers have in memory at most, and how many are recomputed for it: by hand."""

from posttrain.models.language.room import Layers

TEN = Layers(100, 10, 10)  # each leaves 100, of which 10 are inputs


def test_at_most_there_is_one_layer_in_whole_and_what_its_backward_works_with() -> None:
    assert TEN.most(0) == 1000 + 140
    assert TEN.most(10) == 100 + 100 + 140
    assert TEN.most(4) == 600 + 40 + 100 + 140
    assert TEN.most(1) == 1000 + 140  # no more than nothing recomputed: the one in whole is the first of the backward


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
