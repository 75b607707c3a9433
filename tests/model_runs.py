"""Runs a model over a real context, and the same model without any cache in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache.models import Llama, LlamaConfig


def context_for(config: LlamaConfig, *, max_seqs: int = 3, num_blocks: int = 64):
  return kvcache.init(
    kvcache.CacheConfig(
      layers=config.cache_layers(),
      num_blocks=num_blocks,
      block_size=4,
      max_seqs=max_seqs,
      max_seq_len=128,
      dtype=config.dtype,
    )
  )


@functools.partial(jax.jit, static_argnames="num_tokens")
def run_step(model, ctx, tokens, query_lens, *, num_tokens):
  """Room, metadata, model, commit; tokens are packed, or one per row if no number."""
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  logits, ctx = model(tokens, metadata, ctx)
  return logits, kvcache.commit(ctx, tokens, metadata), status


_admit = jax.jit(kvcache.admit)


def admit(ctx, prompt: list[int]):
  # One shape for all prompts, so that admission compiles once.
  tokens = jnp.asarray([prompt + [0] * (128 - len(prompt))], jnp.int32)
  ctx, admission = _admit(ctx, tokens, jnp.asarray([len(prompt)], jnp.int32))
  assert int(admission.status[0]) == kvcache.Status.OK
  return ctx, int(admission.seq_ids[0]), int(admission.num_cached[0])


def feed(model, ctx, row: int, tokens: list[int], *, num_tokens: int = 16):
  """Computes tokens of one row in packed steps; returns the logits after the last."""
  logits = None
  for start in range(0, len(tokens), num_tokens):
    chunk = tokens[start : start + num_tokens]
    query_lens = jnp.zeros(ctx.config.max_seqs, jnp.int32).at[row].set(len(chunk))
    padded = jnp.asarray(chunk + [0] * (num_tokens - len(chunk)), jnp.int32)
    logits, ctx, status = run_step(
      model, ctx, padded, query_lens, num_tokens=num_tokens
    )
    assert int(status[row]) == kvcache.Status.OK
  return np.asarray(logits[row]), ctx


def decode(model, ctx, tokens: dict[int, int]):
  """One decode step for the given rows; returns the logits of all rows."""
  rows = jnp.asarray(list(tokens), jnp.int32)
  values = jnp.asarray(list(tokens.values()), jnp.int32)
  empty = jnp.zeros(ctx.config.max_seqs, jnp.int32)
  logits, ctx, status = run_step(
    model, ctx, empty.at[rows].set(values), empty.at[rows].set(1), num_tokens=None
  )
  assert (np.asarray(status) == kvcache.Status.OK).all()
  return np.asarray(logits), ctx


def greedy(model, ctx, prompt: list[int], num_tokens: int) -> list[int]:
  """Prompt in chunks, then decode steps: the loop without the loop."""
  ctx, row, num_cached = admit(ctx, prompt)
  logits, ctx = feed(model, ctx, row, prompt[num_cached:])
  out = [int(logits.argmax())]
  while len(out) < num_tokens:
    logits, ctx = decode(model, ctx, {row: out[-1]})
    out.append(int(logits[row].argmax()))
  return out


def dense_logits(model: Llama, tokens: list[int]) -> np.ndarray:
  """`[len(tokens), vocab]` in float64 NumPy, from the module's weights alone."""
  config = model.config
  wide = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731
  norm = lambda x, w: w * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)  # noqa: E731
  eps = config.norm_epsilon
  heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
  position = np.arange(len(tokens))
  angles = position[:, None] * np.asarray(config.rotary.frequencies, np.float64)
  turn = np.exp(1j * angles)[:, None, :]

  def rotate(x):
    plane = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
    return np.concatenate([plane.real, plane.imag], axis=-1)

  def weight(layer, *names):
    if config.scan_layers:
      variable = functools.reduce(getattr, names, model.layers)
      return None if variable is None else wide(variable)[layer]
    variable = functools.reduce(getattr, names, model.layers[layer])
    return None if variable is None else wide(variable)

  x = wide(model.embedding)[tokens]
  for layer in range(config.num_layers):
    get = functools.partial(weight, layer)
    qkv = norm(x, get("attention_norm", "scale")) @ get("attention", "qkv", "weight").T
    if config.attention_bias:
      qkv = qkv + get("attention", "qkv", "bias")
    qkv = qkv.reshape(len(tokens), -1, size)
    q, k, v = np.split(qkv, (heads, heads + groups), axis=1)
    if config.qk_norm:
      q = norm(q, get("attention", "q_norm", "scale"))
      k = norm(k, get("attention", "k_norm", "scale"))
    k, v = (np.repeat(part, heads // groups, axis=1) for part in (rotate(k), v))
    scores = np.einsum("qhd,khd->hqk", rotate(q), k) * size**-0.5
    scores = np.where(position[None, :, None] >= position, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", scores, v).reshape(len(tokens), -1)
    x = x + attended @ get("attention", "out", "weight").T
    if config.attention_out_bias:
      x = x + get("attention", "out", "bias")
    hidden = norm(x, get("mlp_norm", "scale")) @ get("mlp", "gate_up", "weight").T
    gate, up = np.split(hidden, 2, axis=-1)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ get("mlp", "down", "weight").T
  head = model.embedding if model.head is None else model.head
  return norm(x, wide(model.norm.scale)) @ wide(head).T
