"""Every static size and dtype of a cache, checked once.

A `CacheConfig` is hashable, so it can be a static argument of a jitted function, and it
is the static field of `Context`. It is made from the model's layers in model order.
"""

import bisect
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache import printing

NULL_BLOCK = 0
"""Block that pads block tables: never allocated, never written, always safe to read."""

NULL_STATE = 0
"""State that is all zeros: never allocated or written, read by new sequences."""

_INDEX_SLOTS_PER_BLOCK = 4
_QUANTISED = (np.dtype(jnp.int8), np.dtype(jnp.float8_e4m3fn))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
  """What one attention layer keeps per token.

  Attributes:
    num_kv_heads: `K`, key/value heads.
    head_dim: `D`, elements of one key head.
    v_head_dim: `Dv`, elements of one value head; `D` if None.
    is_latent: Whether the values are the first `Dv` elements of the keys and are stored
      once, as in multi-head latent attention.
    dtype: Element type, or None for the cache's. `int8` and `float8_e4m3fn` are
      quantised, with one float32 scale per token and head for keys and for values.
    sliding_window: Tokens that a query sees, itself included; all before it if None.
      Such a layer keeps its window only.
    shared_with: Index, among the attention layers, of an earlier one that is alike and
      whose keys and values this layer reads. It keeps nothing itself.
  """

  num_kv_heads: int
  head_dim: int
  v_head_dim: int | None = None
  is_latent: bool = False
  dtype: DTypeLike | None = None
  sliding_window: int | None = None
  shared_with: int | None = None

  def __post_init__(self):
    if self.v_head_dim is None:
      object.__setattr__(self, "v_head_dim", self.head_dim)
    if self.dtype is not None:
      object.__setattr__(self, "dtype", _kv_dtype(self.dtype))
    settle_ints(self, "num_kv_heads", "head_dim", "v_head_dim")
    if self.sliding_window is not None:
      settle_ints(self, "sliding_window")
    if self.shared_with is not None:
      settle_ints(self, "shared_with", least=0)
    _check_bool(self, "is_latent")
    if self.is_latent and self.v_dim > self.head_dim:
      raise ValueError(
        f"v_head_dim must be at most head_dim={self.head_dim} where values are the"
        f" first part of the keys, got {self.v_dim}"
      )

  def __repr__(self) -> str:
    return printing.show_set(self, v_head_dim=self.head_dim)

  @property
  def v_dim(self) -> int:
    """`Dv`, elements of one value head."""
    return self.head_dim if self.v_head_dim is None else self.v_head_dim

  @property
  def kv_dtype(self) -> np.dtype:
    """Element type of the keys and values; the cache has resolved it."""
    return np.dtype(self.dtype)

  @property
  def is_quantised(self) -> bool:
    """Whether keys and values have scales beside them."""
    return self.kv_dtype in _QUANTISED

  @property
  def bytes_per_token(self) -> int:
    """Bytes of keys, values and scales of one token."""
    scale_bytes = 4 if self.is_quantised else 0
    heads = (self.head_dim,) if self.is_latent else (self.head_dim, self.v_dim)
    per_head = sum(dim * self.kv_dtype.itemsize + scale_bytes for dim in heads)
    return self.num_kv_heads * per_head


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentLayer:
  """What one recurrent layer keeps per sequence: arrays of fixed shape.

  Attributes:
    state: Name of each array -> its shape, or a `jax.ShapeDtypeStruct` or array like it
      for another dtype than float32. Kept as a sorted tuple of pairs.

  Example:
    >>> mamba = kv.RecurrentLayer.mamba2(num_heads=2, head_dim=4, state_size=8)
    >>> {name: array.shape for name, array in mamba.state}
    {'conv': (24, 3), 'ssm': (2, 4, 8)}
  """

  state: Mapping[str, Any] | tuple[tuple[str, jax.ShapeDtypeStruct], ...]

  def __post_init__(self):
    if not isinstance(self.state, Mapping | tuple) or not self.state:
      raise ValueError(f"state must name shapes of arrays, got {self.state!r}")
    arrays = {name: _state_array(name, value) for name, value in self.arrays.items()}
    object.__setattr__(self, "state", tuple(sorted(arrays.items())))

  def __repr__(self) -> str:
    arrays = (f"{name!r}: {printing.show(array)}" for name, array in self.state)
    return f"RecurrentLayer(state={{{', '.join(arrays)}}})"

  @property
  def arrays(self) -> dict[str, Any]:
    """Shape and dtype of each array, by name."""
    return dict(self.state)

  @property
  def num_bytes(self) -> int:
    """Bytes of one sequence's state."""
    return sum(a.size * a.dtype.itemsize for a in self.arrays.values())

  @classmethod
  def mamba2(
    cls,
    *,
    num_heads: int,
    head_dim: int,
    state_size: int,
    num_groups: int = 1,
    conv_width: int = 4,
  ) -> "RecurrentLayer":
    """Mamba-2: `conv [channels, width - 1]`, `ssm [heads, head_dim, state_size]`."""
    channels = num_heads * head_dim + 2 * num_groups * state_size
    ssm = (num_heads, head_dim, state_size)
    return cls(state={"conv": (channels, conv_width - 1), "ssm": ssm})

  @classmethod
  def mamba1(
    cls, *, num_channels: int, state_size: int, conv_width: int = 4
  ) -> "RecurrentLayer":
    """Mamba-1: `conv [channels, width - 1]`, `ssm [channels, state_size]`."""
    conv, ssm = (num_channels, conv_width - 1), (num_channels, state_size)
    return cls(state={"conv": conv, "ssm": ssm})

  @classmethod
  def gated_delta_net(
    cls,
    *,
    num_key_heads: int,
    num_value_heads: int,
    key_dim: int,
    value_dim: int,
    conv_width: int = 4,
  ) -> "RecurrentLayer":
    """Gated delta net: `conv`, and `delta [value heads, key_dim, value_dim]`."""
    channels = 2 * num_key_heads * key_dim + num_value_heads * value_dim
    delta = (num_value_heads, key_dim, value_dim)
    return cls(state={"conv": (channels, conv_width - 1), "delta": delta})

  @classmethod
  def short_conv(cls, *, num_channels: int, conv_width: int) -> "RecurrentLayer":
    """A short convolution: `conv [channels, width - 1]`."""
    return cls(state={"conv": (num_channels, conv_width - 1)})


Layer = AttentionLayer | RecurrentLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
  """Attention layers that keep the same things and have one store.

  Attributes:
    layer: What each of them keeps, its dtype resolved.
    members: Their indices among the attention layers, in order.
  """

  layer: AttentionLayer
  members: tuple[int, ...]

  @property
  def num_layers(self) -> int:
    """`L`, layers of the group."""
    return len(self.members)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
  """The static description of a `Context`, also as an argument of `jax.jit`.

  Attributes:
    layers: The model's layers that keep something, in model order. Attention layers
      that are alike form a group with a store of its own; those with a sliding window
      have a pool of their own as well. All recurrent layers must be alike.
    num_blocks: `N`, blocks in the pool, the null block included. They hold the tokens
      of sequences, and the keys and values of layers without a window.
    block_size: Token positions in one block.
    max_seqs: `S`, rows of the sequence table.
    max_seq_len: Longest sequence a row can hold, in tokens. Rounded up to whole blocks.
    dtype: Element type of keys and values of layers that do not name one. Any floating
      type, or `int8`; see `AttentionLayer.dtype` for quantised ones.
    chunk_size: Entries handled by one iteration of the bulk loops (publish, release,
      evict).
    index_ways: Blocks that one bucket of the prefix index can hold.
    num_snapshots: Recurrent states that can be kept beside cached blocks, so that a
      prefix hit can start from them. `max_seqs` if None; 0 without recurrent layers.
    snapshot_interval: A snapshot is taken every so many blocks, besides the one at the
      last block of a prompt that an equal prompt could adopt.
    num_window_blocks: `Nw`, blocks in the pool of each sliding window. If None, twice
      what the windows of `max_seqs` rows can lie in, so that as much can stay cached,
      and never more than `num_blocks`.
    max_drafts: Drafts per step that recurrent layers keep states for: each sequence
      owns `1 + max_drafts` states, one for each length at which a draft step may end.
      Attention layers need none, so without recurrent ones it says nothing.
    head_axes: Mesh axes over which heads are split, a name or several; see
      `kvcache.sharding`. None on one device.
    scrub: Whether blocks and states are zeroed when they are handed out, so that a
      sequence never holds what another one left behind. For those who share a device
      between tenants; what is free keeps its content until then.

  Example:
    >>> config.bytes_per_block, config.max_blocks_per_seq, config.max_tokens_per_seq
    (256, 4, 16)
    >>> kv.CacheConfig(layers=(layer,), num_blocks=1)
    Traceback (most recent call last):
    ValueError: num_blocks must be at least 2 (block 0 is reserved), got 1
  """

  layers: tuple[Layer, ...]
  num_blocks: int
  block_size: int = 16
  max_seqs: int = 16
  max_seq_len: int = 2048
  dtype: DTypeLike = jnp.float32
  chunk_size: int = 256
  index_ways: int = 16
  num_snapshots: int | None = None
  snapshot_interval: int = 16
  num_window_blocks: int | None = None
  max_drafts: int = 0
  head_axes: tuple[str, ...] = ()
  scrub: bool = False

  def __repr__(self) -> str:
    num_snapshots = self.max_seqs if self.num_recurrent_layers else 0
    return printing.show_set(self, num_snapshots=num_snapshots)

  def __post_init__(self):
    if isinstance(self.layers, AttentionLayer | RecurrentLayer | int):
      raise ValueError(f"layers must name all layers of the model, got {self.layers!r}")
    object.__setattr__(self, "layers", tuple(self.layers))
    axes = (self.head_axes,) if isinstance(self.head_axes, str) else self.head_axes
    if not isinstance(axes, Sequence) or not all(isinstance(x, str) for x in axes):
      raise ValueError(f"head_axes must be names of mesh axes, got {axes!r}")
    object.__setattr__(self, "head_axes", tuple(axes))
    object.__setattr__(self, "dtype", _kv_dtype(self.dtype))
    settle_ints(self, "num_blocks", "block_size", "max_seqs", "max_seq_len")
    settle_ints(self, "chunk_size", "index_ways", "snapshot_interval")
    settle_ints(self, "max_drafts", least=0)
    _check_bool(self, "scrub")
    if not self.layers:
      raise ValueError("layers must name at least one layer")
    for layer in self.layers:
      if not isinstance(layer, Layer):
        raise ValueError(
          f"layers holds {layer!r}, which is no AttentionLayer and no RecurrentLayer"
        )
    recurrent = {x for x in self.layers if isinstance(x, RecurrentLayer)}
    if len(recurrent) > 1:
      raise ValueError(
        f"all recurrent layers must be alike, got {sorted(map(str, recurrent))}"
      )
    self._check_shared_layers()
    if self.num_snapshots is None:
      num = self.max_seqs if self.num_recurrent_layers else 0
      object.__setattr__(self, "num_snapshots", num)
    settle_ints(self, "num_snapshots", least=0)
    if self.num_snapshots and not self.num_recurrent_layers:
      raise ValueError("num_snapshots is given, but no layer is recurrent")
    if self.num_blocks < 2:
      raise ValueError(
        f"num_blocks must be at least 2 (block {NULL_BLOCK} is reserved),"
        f" got {self.num_blocks!r}"
      )
    if self.num_blocks * max(self.block_size, 2 * _INDEX_SLOTS_PER_BLOCK) >= 2**31:
      raise ValueError(
        f"num_blocks * block_size must stay below 2**31 to be addressed in int32,"
        f" got {self.num_blocks} * {self.block_size}"
      )

    self._check_window_blocks()

  def _check_shared_layers(self) -> None:
    layers = self.attention_layers
    for index, layer in enumerate(layers):
      if (at := layer.shared_with) is None:
        continue
      if not 0 <= at < index or layers[at].shared_with is not None:
        raise ValueError(
          f"shared_with={at} of attention layer {index} must name an earlier layer that"
          " keeps keys and values of its own"
        )
      if dataclasses.replace(layer, shared_with=None) != layers[at]:
        raise ValueError(
          f"attention layer {index} is shared with {at} and must be like it, got"
          f" {layer}, not {layers[at]}"
        )

  def _check_window_blocks(self) -> None:
    if self.num_window_blocks is None:
      return
    settle_ints(self, "num_window_blocks")
    if not self.windows:
      raise ValueError("num_window_blocks is given, but no layer has a sliding window")
    for window in self.windows:
      least = 1 + self.blocks_per_window(window)
      if self.num_window_blocks < least:
        raise ValueError(
          f"num_window_blocks must be at least {least} for the null block and one"
          f" sliding_window={window}, got {self.num_window_blocks}"
        )

  @classmethod
  def from_memory(
    cls,
    num_bytes: float,
    *,
    layers: Sequence[Layer],
    state_fraction: float | None = None,
    **sizes: Any,
  ) -> "CacheConfig":
    """Returns the largest configuration whose pools fit a budget.

    Args:
      num_bytes: Bytes for keys, values and recurrent states. The tables, lists and
        hashes beside them are not counted: `kvcache.bookkeeping_bytes(config)`,
        commonly below 1 % of the pools.
      layers: As in `CacheConfig`.
      state_fraction: Share of the budget for recurrent states, in (0, 1). It decides
        `num_snapshots` if `max_seqs` is given, else both: as many sequences as
        snapshots. If omitted, `max_seqs` and `num_snapshots` decide.
      **sizes: Any other field of `CacheConfig` except `num_blocks`.

    Raises:
      ValueError: The budget cannot hold the null block and one usable block, and the
        states of one sequence.

    Example:
      >>> big = kv.CacheConfig.from_memory(10_000, layers=(layer,) * 2, block_size=4)
      >>> big.num_blocks, big.num_bytes
      (39, 9984)
    """
    if "num_blocks" in sizes:
      raise ValueError("from_memory computes num_blocks; pass num_bytes only")
    if not isinstance(num_bytes, int | float | np.integer | np.floating):
      raise ValueError(f"num_bytes must be a number, such as 8e9, got {num_bytes!r}")
    if not math.isfinite(num_bytes):
      raise ValueError(f"num_bytes must be finite, got {num_bytes}")
    layers = tuple(layers)
    if state_fraction is not None:
      sizes |= _state_sizes(num_bytes, layers, state_fraction, sizes)
    smallest = cls(layers=layers, num_blocks=2, **sizes)
    if not smallest.bytes_per_block:
      raise ValueError(
        "no layer keeps every token; pass num_blocks yourself, and num_window_blocks"
      )
    most = max(int(num_bytes // smallest.bytes_per_block), 1)

    def exceeds(num_blocks: int) -> bool:
      return dataclasses.replace(smallest, num_blocks=num_blocks).num_bytes > num_bytes

    num_blocks = 1 + bisect.bisect_left(range(2, most + 1), True, key=exceeds)
    if num_blocks < 2:
      beside = smallest.num_bytes - 2 * smallest.bytes_per_block
      raise ValueError(
        f"num_bytes={num_bytes:.0f} cannot hold the null block and one usable block of"
        f" {smallest.bytes_per_block} bytes each"
        + (f" beside {beside} bytes of windows and states" if beside else "")
      )
    return dataclasses.replace(smallest, num_blocks=num_blocks)

  @functools.cached_property
  def attention_layers(self) -> tuple[AttentionLayer, ...]:
    """The attention layers in model order, their dtypes resolved."""
    return tuple(
      dataclasses.replace(x, dtype=self.dtype if x.dtype is None else x.dtype)
      for x in self.layers
      if isinstance(x, AttentionLayer)
    )

  @functools.cached_property
  def groups(self) -> tuple[LayerGroup, ...]:
    """The attention layers that have keys and values of their own, by likeness."""
    members: dict[AttentionLayer, list[int]] = {}
    for index, layer in enumerate(self.attention_layers):
      if layer.shared_with is None:
        members.setdefault(layer, []).append(index)
    return tuple(LayerGroup(layer=x, members=tuple(m)) for x, m in members.items())

  @functools.cached_property
  def windows(self) -> tuple[int, ...]:
    """The sliding windows that layers have, each once."""
    windows = (group.layer.sliding_window for group in self.groups)
    return tuple(dict.fromkeys(w for w in windows if w is not None))

  @functools.cached_property
  def places(self) -> tuple[tuple[int, int], ...]:
    """Of each attention layer: its group, and its place in the group's store."""
    found: dict[int, tuple[int, int]] = {}
    for index, group in enumerate(self.groups):
      found |= {layer: (index, place) for place, layer in enumerate(group.members)}
    for layer, spec in enumerate(self.attention_layers):
      if spec.shared_with is not None:
        found[layer] = found[spec.shared_with]
    return tuple(found[layer] for layer in range(self.num_layers))

  def blocks_per_window(self, window: int) -> int:
    """Most blocks that one row's window and its next token can lie in."""
    columns = (window + self.block_size - 2) // self.block_size + 1
    return min(columns, self.max_blocks_per_seq)

  def window_pool_size(self, window: int) -> int:
    """`Nw`, blocks in the pool of one sliding window, the null block included."""
    if self.num_window_blocks is not None:
      return self.num_window_blocks
    wanted = 1 + 2 * self.max_seqs * self.blocks_per_window(window)
    return max(1 + self.blocks_per_window(window), min(wanted, self.num_blocks))

  @property
  def num_layers(self) -> int:
    """Attention layers."""
    return sum(isinstance(layer, AttentionLayer) for layer in self.layers)

  @property
  def num_recurrent_layers(self) -> int:
    """`R`, recurrent layers."""
    return sum(isinstance(layer, RecurrentLayer) for layer in self.layers)

  @property
  def recurrent_layer(self) -> RecurrentLayer | None:
    """What each of the recurrent layers keeps, or None if there are none."""
    return next((x for x in self.layers if isinstance(x, RecurrentLayer)), None)

  @property
  def num_states(self) -> int:
    """`M`, rows of the state pool: the null row, those of sequences, snapshots."""
    if not self.num_recurrent_layers:
      return 0
    return 1 + self.max_seqs * (1 + self.max_drafts) + (self.num_snapshots or 0)

  @property
  def snapshot_tokens(self) -> int:
    """Tokens from one regular snapshot to the next."""
    return self.snapshot_interval * self.block_size

  @property
  def bytes_per_state(self) -> int:
    """Bytes of one sequence's recurrent state, all layers."""
    return _bytes_per_state(self.layers)

  @property
  def max_blocks_per_seq(self) -> int:
    """`P`, columns of the block tables."""
    return -(-self.max_seq_len // self.block_size)

  @property
  def max_tokens_per_seq(self) -> int:
    """Longest sequence that can live: bounded by a row's table and by the pool."""
    return min(self.max_blocks_per_seq, self.num_blocks - 1) * self.block_size

  @property
  def num_buckets(self) -> int:
    """Buckets of the prefix index, a power of two."""
    wanted = -(-_INDEX_SLOTS_PER_BLOCK * self.num_blocks // self.index_ways)
    return 1 << (wanted - 1).bit_length()

  @property
  def bytes_per_block(self) -> int:
    """Bytes of keys, values and scales in one block, all layers without a window."""
    return self.bytes_per_window_block(None)

  def bytes_per_window_block(self, window: int | None) -> int:
    """Bytes of one block of the layers with one sliding window, or with none."""
    groups = (g for g in self.groups if g.layer.sliding_window == window)
    per_token = sum(g.num_layers * g.layer.bytes_per_token for g in groups)
    return self.block_size * per_token

  @property
  def num_bytes(self) -> int:
    """Bytes of the key, value, scale and state arrays that `init` makes."""
    return (
      self.num_blocks * self.bytes_per_block
      + sum(
        self.window_pool_size(w) * self.bytes_per_window_block(w) for w in self.windows
      )
      + self.num_states * self.bytes_per_state
    )


def _kv_dtype(dtype: DTypeLike | None) -> np.dtype:
  """The dtype, if keys and values can be stored in it."""
  try:
    found = np.dtype("V" if dtype is None else dtype)
  except TypeError as error:
    raise ValueError(f"dtype must be one such as 'bfloat16': {error}") from error
  if found in _QUANTISED:
    return found
  if not jnp.issubdtype(found, jnp.floating) or found.itemsize not in (2, 4):
    raise ValueError(
      "dtype must be a floating type of 16 or 32 bits, int8 or float8_e4m3fn, got"
      f" {dtype if dtype is None else found}"
    )
  return found


def _state_array(name: str, value: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of one array of a recurrent state."""
  shape = getattr(value, "shape", value)
  dtype = np.dtype(getattr(value, "dtype", np.float32))
  is_shape = isinstance(shape, Sequence) and not isinstance(shape, str)
  if not is_shape or not all(isinstance(x, int | np.integer) and x > 0 for x in shape):
    raise ValueError(f"state {name!r} must be a shape of positive sizes, got {shape!r}")
  if dtype.itemsize > 4:
    raise ValueError(f"state {name!r} must be of at most 32 bits, got {dtype}")
  return jax.ShapeDtypeStruct(tuple(map(int, shape)), dtype)


def _bytes_per_state(layers: tuple[Layer, ...]) -> int:
  return sum(layer.num_bytes for layer in layers if isinstance(layer, RecurrentLayer))


def _state_sizes(
  num_bytes: float, layers: tuple[Layer, ...], fraction: float, sizes: dict[str, Any]
) -> dict[str, int]:
  """`max_seqs` and `num_snapshots` that fill a share of the budget with states."""
  if not 0 < fraction < 1:
    raise ValueError(f"state_fraction must be between 0 and 1, got {fraction}")
  if "num_snapshots" in sizes:
    raise ValueError("state_fraction computes num_snapshots; pass one of them")
  per_state = _bytes_per_state(layers)
  if not per_state:
    raise ValueError("state_fraction is given, but no layer is recurrent")
  num_states = int(num_bytes * fraction // per_state)
  per_seq = 1 + sizes.get("max_drafts", 0)
  max_seqs = sizes.get("max_seqs", num_states // (1 + per_seq))
  num_snapshots = num_states - 1 - max_seqs * per_seq
  if num_snapshots < 0 or max_seqs < 1:
    raise ValueError(
      f"{fraction} of num_bytes={num_bytes:.0f} holds {num_states} states of"
      f" {per_state} bytes each: too few for the null state and {max(max_seqs, 1)}"
      " sequences"
    )
  return {"max_seqs": max_seqs, "num_snapshots": num_snapshots}


def settle_ints(config: object, *names: str, least: int = 1) -> None:
  """Makes fields of a frozen dataclass ints, also of numpy's; `ValueError` else."""
  for name in names:
    value = getattr(config, name)
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < least:
      kind = "positive" if least else "non-negative"
      raise ValueError(f"{name} must be a {kind} int, got {value!r}")
    object.__setattr__(config, name, int(value))


def _check_bool(config: object, name: str) -> None:
  value = getattr(config, name)
  if not isinstance(value, bool):
    raise ValueError(f"{name} must be True or False, got {value!r}")
