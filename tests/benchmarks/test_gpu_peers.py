"""What the benchmark hands to peers, as far as it shows without a GPU."""

import sys
import types

import jax
import numpy as np
import pytest

from benchmarks.gpu import peers
from benchmarks.gpu import torch as gpu_torch
from benchmarks.gpu.batch import make_batch, run_attention
from pallas_kernels.paged_attention.arg_specs import named
from tests.aot import deviceless

LENGTHS = (200, 64, 5)


@pytest.fixture(scope="module")
def batch():
  rows = [(length, 1) for length in LENGTHS]
  return make_batch(named("llama-3-8b"), rows, is_decode=True, num_copies=2)


def test_peers_serve_plain_decode_steps_alone():
  def names(name, **settings):
    batch = make_batch(named(name), [(5, 1)], **settings)
    return [peer for peer, _ in peers.serving(batch)]

  assert names("llama-3-8b", is_decode=True) == ["jax paged_attention", "cuDNN"]
  assert names("llama-3-8b", is_decode=False) == []
  for name in ("llama-3-8b fp8", "gpt-oss-120b full", "deepseek-v3 tp8"):
    assert names(name, is_decode=True) == []


@pytest.mark.filterwarnings("ignore:The Pallas Triton:DeprecationWarning")
def test_the_kernel_of_jax_is_lowered(batch):
  arrays, run = dict(peers.serving(batch))["jax paged_attention"]()
  assert "triton" in deviceless.lower(run, arrays).as_text()


def test_the_kernel_of_cudnn_is_lowered(batch, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as module

  for name in ("check_cudnn_version", "check_is_flash_attention"):
    monkeypatch.setattr(module, name, lambda *_, **__: 91_500)
  monkeypatch.setattr(module, "check_compute_capability", lambda *_: True)
  arrays, run = dict(peers.serving(batch))["cuDNN"]()
  assert "__cudnn$fmhaSoftmax" in deviceless.lower(run, arrays).as_text()


def test_pools_of_their_own_hold_the_same_rows(batch):
  """What cuDNN is handed gives, in XLA, the result of the batch."""
  turns = peers.turns(batch, "cuDNN", 3)
  assert peers.turns(batch, "jax paged_attention", 3) is None
  assert turns[0] is turns[2]
  run = jax.jit(run_attention(batch, "xla"))
  tables = batch.arrays["block_tables"]
  for copy, turn in enumerate(turns[:2]):
    shift = copy * batch.blocks_per_copy
    want, _ = run(batch.arrays | {"block_tables": tables + shift})
    assert turn["k"].shape[0] == tables.size
    got, _ = jax.jit(run_attention(batch, "xla"))(batch.arrays | turn)
    assert np.array_equal(got, want)


class Tensor(np.ndarray):
  """As much of a PyTorch tensor as is needed."""

  is_cuda = True

  def transpose(self, first, second):
    return np.swapaxes(self, first, second)

  def contiguous(self):
    return np.ascontiguousarray(self).view(Tensor)


class Tensors(gpu_torch.Tensors):
  def made(self, values, dtype="int32"):
    return np.asarray(values, dtype)


@pytest.fixture
def tensors(batch):
  torch = types.SimpleNamespace(
    zeros=lambda size, dtype, device: (size, dtype, device), uint8="uint8"
  )
  Tensor.device = "cuda"
  arrays = {x: np.asarray(batch.arrays[x]).view(Tensor) for x in ("q", "k", "v")}
  return Tensors(
    torch=torch,
    batch=batch,
    block_tables=None,
    lens=np.asarray(batch.arrays["seq_lens"]),
    **arrays,
  )


def rows_of(tables, pool, lens):
  """`[tokens, K, D]` of each row."""
  for row, length in zip(tables, lens, strict=True):
    yield np.concatenate(list(np.swapaxes(pool[row], 1, 2)))[:length]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_flashinfer_is_told_where_tokens_are(tensors, batch, monkeypatch, layout):
  seen = {}

  class Wrapper:
    def __init__(self, space, kv_layout, use_tensor_cores):
      assert (space[0], kv_layout) == (128 << 20, layout)

    def plan(self, indptr, indices, last_page_len, *sizes, **options):
      seen.update(indptr=indptr, ids=indices, last=last_page_len, sizes=sizes)
      assert options["pos_encoding_mode"] == "NONE"

    def run(self, q, pools):
      return q, pools

  module = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
  monkeypatch.setitem(sys.modules, "flashinfer", module)
  _, (k, _) = gpu_torch.flash_infer(tensors, layout=layout)()
  assert seen["sizes"] == (32, 8, 128, 64)
  pool = np.asarray(batch.arrays["k"])
  if layout == "NHD":
    assert np.array_equal(np.swapaxes(k, 1, 2), pool)
  want = rows_of(np.asarray(batch.arrays["block_tables"]), pool, LENGTHS)
  for row, tokens in enumerate(want):
    ids = seen["ids"][seen["indptr"][row] : seen["indptr"][row + 1]]
    length = (ids.size - 1) * 64 + seen["last"][row]
    (got,) = rows_of([ids], pool, [length])
    assert np.array_equal(got, tokens)


def test_flex_attention_sees_the_tokens_of_a_row(tensors, batch, monkeypatch):
  seen = {}

  class BlockMask:
    @staticmethod
    def from_kv_blocks(num, ids, full_num, full_ids, *, mask_mod, **sizes):
      seen.update(num=num, ids=ids, full_num=full_num, full_ids=full_ids)
      seen.update(mask=mask_mod, sizes=sizes)

  def attend(q, k, v, **options):
    assert q.shape == (3, 32, 1, 128) and options["enable_gqa"]
    seen["k"] = k
    return q

  module = types.SimpleNamespace(BlockMask=BlockMask, flex_attention=attend)
  name = "torch.nn.attention.flex_attention"
  monkeypatch.setitem(sys.modules, name, module)
  out = gpu_torch.flex(tensors, is_compiled=False)()
  assert out.shape == (3, 32, 128)
  pool = np.asarray(batch.arrays["k"])
  num_tokens = pool.shape[0] * 64
  assert seen["sizes"] == {"BLOCK_SIZE": (128, 64), "seq_lengths": (1, num_tokens)}
  k = np.swapaxes(seen["k"][0], 0, 1)
  assert k.shape == (num_tokens, 8, 128)
  tokens = np.arange(num_tokens)
  tables = np.asarray(batch.arrays["block_tables"])
  for row, want in enumerate(rows_of(tables, pool, LENGTHS)):
    mask = seen["mask"](row, 0, 0, tokens)
    blocks = set(seen["ids"][row, 0, 0, : seen["num"][row, 0, 0]])
    full = set(seen["full_ids"][row, 0, 0, : seen["full_num"][row, 0, 0]])
    assert not blocks & full
    assert set(tokens[mask] // 64) == blocks | full
    assert all(mask[block * 64 : block * 64 + 64].all() for block in full)
    got = {x.tobytes() for x in np.asarray(k[mask])}
    assert got == {x.tobytes() for x in want}
    assert mask.sum() == want.shape[0]
