"""Key-value caches of transformers with room: new tokens are written into it, where its growing cache copies all before them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 128  # tokens that a layer makes room for at once: so many times rarer is what it holds copied


class RoomyLayer(DynamicLayer):
    """keys, values: views [n, heads, length, dim] of the first places of larger tensors."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._rooms = (self.keys, self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Add keys and values [n, heads, new, dim]; returns all that are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        before = self.keys.shape[2]
        after = before + key_states.shape[2]
        # rows that were repeated or chosen lie elsewhere than in the room that they had
        if after > self._rooms[0].shape[2] or self.keys.data_ptr() != self._rooms[0].data_ptr():
            self._rooms = (_with_room(self.keys, after), _with_room(self.values, after))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self._rooms)
        return self.keys, self.values


def _with_room(held: Tensor, length: int) -> Tensor:
    """A copy of what is held, with place for `length` tokens and ROOM more."""
    n, heads, before, dim = held.shape
    room = held.new_empty(n, heads, length + ROOM, dim)
    room[:, :, :before] = held
    return room


def roomy_cache(config: PretrainedConfig, whole: bool = False) -> DynamicCache:
    """What a model of this config would make for itself, but layers that keep everything have room. Others stay as they are.

    whole: layers keep everything where they would keep a window of it.
    """
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if whole else (DynamicLayer,)
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) in kinds else layer for layer in cache.layers]
    return cache


class FixedLayer(DynamicLayer):
    """All of its room is read at every step, for a mask to leave out what is not written yet; a tensor says where the next token
    goes. So a step works on tensors that are there already, and makes no others that stay.

    As transformers' StaticLayer, but room can be added, answers be dropped, and one number serves all layers.

    keys, values: [n, heads, room, dim]. place: int64 [1].
    """

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        cast(Any, super()).__init__()
        self.keys, self.values, self.place = keys, values, place
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write the keys and values [n, heads, 1, dim] of a token; returns all that there is room for."""
        assert self.keys is not None and self.values is not None
        return self.keys.index_copy_(2, self.place, key_states), self.values.index_copy_(2, self.place, value_states)

    def add_room(self, tokens: int) -> None:
        """Of zeros: what a mask leaves out is multiplied by 0 all the same."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (pad(x, (0, 0, 0, tokens)) for x in (self.keys, self.values))


def fixed_layer(layer: Any, place: Tensor) -> Any:
    """With what a layer holds; one that holds nothing, as it shares another's keys, is left as it is."""
    if isinstance(layer, RoomyLayer) and layer.keys is not None and layer.values is not None:
        return FixedLayer(layer.keys, layer.values, place)
    return layer
