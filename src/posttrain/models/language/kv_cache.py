"""A key-value cache of transformers with room to grow: new tokens are written into it, where theirs copies all before them."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

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


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """What a model of this config would make for itself, but layers that keep everything have room. Others stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
