"""Hashes of token prefixes, computed for all blocks of a prompt at once.

The hash of a block stands for all tokens up to its end: `H_i = a * H_{i-1} + d_i`
modulo 2^32, where `d_i` digests the block's own tokens and `a` is odd. Since `a` has an
inverse, `H_i = a^i * (sum_{j <= i} d_j * a^-j)`: one cumulative sum with constant
powers instead of a serial chain. Two lanes with different `a` give 64 bits: one picks
the bucket, the other is the tag. Hashes only find candidates; a hit is decided by
comparing tokens (`prefix.match`).
"""

from jax import Array, lax
import jax.numpy as jnp
import numpy as np

LANES = 2
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)


def mix(x: Array) -> Array:
  """Scrambles uint32 values bijectively (Wellons' low-bias `lowbias32`)."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))


def digest(tokens: Array) -> Array:
  """Digests blocks of tokens on their own.

  Args:
    tokens: `[..., block_size]` int32.

  Returns:
    `[..., 2]` uint32.
  """
  place = np.arange(tokens.shape[-1], dtype=np.uint32)
  words = lax.bitcast_convert_type(tokens, jnp.uint32) * np.uint32(0x2545F491)
  salt = (place * np.uint32(_MULTIPLIERS[0]) + np.uint32(1)).reshape(
    (1,) * (tokens.ndim - 1) + (-1,)
  )
  weights = (place * np.uint32(2) + np.uint32(1)).reshape(salt.shape)
  mixed = mix(words + salt)
  first = jnp.sum(mixed, axis=-1, dtype=jnp.uint32)
  second = jnp.sum(mixed * weights, axis=-1, dtype=jnp.uint32)
  return jnp.stack([mix(first), mix(second + np.uint32(77))], axis=-1)


def root(salt: Array, namespaces: Array) -> Array:
  """`[..., 2]` uint32 hashes before the first block, from `[2]` salt and `[...]`."""
  words = lax.bitcast_convert_type(namespaces, jnp.uint32) * np.uint32(0x9E3779B9)
  salt = salt.reshape((1,) * namespaces.ndim + (LANES,))
  return mix(mix(words)[..., None] + salt)


def chain(
  digests: Array, base: Array, *, segment_starts: Array, offsets: Array
) -> Array:
  """Hashes of many chains that lie end to end in one list.

  Args:
    digests: `[..., E, 2]` uint32.
    base: `[..., E, 2]` uint32. For each entry the hash its chain continues from.
    segment_starts: `[..., E]` int32. For each entry the index of its chain's first
      entry.
    offsets: `[..., E]` int32. Place of each entry in its chain.

  Returns:
    `[..., E, 2]` uint32.
  """
  powers, inverses = _powers(digests.shape[-2] + 1)
  num = digests.shape[-2]
  lead = (1,) * (digests.ndim - 2)
  sums = jnp.cumsum(digests * inverses[:num].reshape(*lead, num, LANES), axis=-2)
  before = jnp.take_along_axis(
    sums, jnp.maximum(segment_starts - 1, 0)[..., None], axis=-2
  )
  before = jnp.where((segment_starts > 0)[..., None], before, np.uint32(0))
  own = powers[:num].reshape(*lead, num, LANES) * (sums - before)
  return own + powers[offsets + 1] * base


def chain_from_root(digests: Array, roots: Array) -> Array:
  """`[A, E, 2]` hashes of `A` chains from `[A, E, 2]` digests and `[A, 2]` roots."""
  powers, inverses = _powers(digests.shape[-2] + 1)
  own = powers[:-1][None] * jnp.cumsum(digests * inverses[:-1][None], axis=-2)
  return own + powers[1:][None] * roots[:, None]


def _powers(num: int) -> tuple[Array, Array]:
  """`[num, 2]` uint32 powers of the multipliers, and of their inverses."""

  def table(multiplier: int) -> list[int]:
    power, out = 1, []
    for _ in range(num):
      out.append(power)
      power = power * multiplier % 2**32
    return out

  powers = [table(a) for a in _MULTIPLIERS]
  inverses = [table(pow(a, -1, 2**32)) for a in _MULTIPLIERS]
  return (
    jnp.asarray(np.array(powers, np.uint32).T),
    jnp.asarray(np.array(inverses, np.uint32).T),
  )
