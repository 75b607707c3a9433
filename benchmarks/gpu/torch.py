"""What PyTorch has to offer for the same decode step, where it is installed.

FlashInfer's decode kernel and PyTorch's flex attention work on the very arrays of the
batch, handed over without a copy. Their calls are recorded into a CUDA graph, as those
of this project are, and timed by CUDA events. What they prepare on the host, once for
all layers of a step (FlashInfer's plan, flex attention's mask), is not timed.
"""

from collections.abc import Callable, Iterator
import dataclasses
import importlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.attention import decode_batch, decode_label, seen_bytes
from benchmarks.gpu.batch import Batch, run_attention
from benchmarks.gpu.rows import failed, Row, Run
from pallas_kernels.choice import NotServedError
from pallas_kernels.paged_attention.arg_specs import named

_CALLS = 8
"""Recorded into a graph."""
_PAIRS = 5
_WORKSPACE = 128 << 20
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
  """A batch as PyTorch sees it.

  Attributes:
    torch: The module.
    batch: The batch.
    q: `[S, H, D]`.
    k, v: `[N, K, block_size, D]`.
    block_tables: `[S, P]` int32.
    lens: Tokens of each row, on the host.
  """

  torch: Any
  batch: Batch
  q: Any
  k: Any
  v: Any
  block_tables: Any
  lens: np.ndarray

  @property
  def counts(self) -> np.ndarray:
    """Blocks of each row."""
    return -(-self.lens // self.batch.spec.block_size)

  def made(self, values: Any, dtype: str = "int32") -> Any:
    """Integers on the device of the pools."""
    values = self.torch.as_tensor(np.asarray(values))
    return values.to(device=self.k.device, dtype=getattr(self.torch, dtype))


def tensors(batch: Batch) -> Tensors:
  """Hands a batch to PyTorch; raises ImportError where there is none."""
  torch = importlib.import_module("torch")
  arrays = jax.block_until_ready(batch.arrays)
  names = ("q", "k", "v", "block_tables")
  return Tensors(
    torch=torch,
    batch=batch,
    lens=np.asarray(arrays["seq_lens"]),
    **{name: torch.from_dlpack(arrays[name]) for name in names},
  )


def flash_infer(x: Tensors, *, layout: str = "HND") -> Call:
  """FlashInfer's batched decode, on pools of either layout."""
  flashinfer = importlib.import_module("flashinfer")
  spec, counts = x.batch.spec, x.counts
  tables = np.asarray(x.batch.arrays["block_tables"])
  ids = np.concatenate([row[:n] for row, n in zip(tables, counts, strict=True)])
  pools = (x.k, x.v)
  if layout == "NHD":
    pools = tuple(pool.transpose(1, 2).contiguous() for pool in pools)
  space = x.torch.zeros(_WORKSPACE, dtype=x.torch.uint8, device=x.k.device)
  wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
    space, layout, use_tensor_cores=True
  )
  wrapper.plan(
    x.made(np.append(0, counts.cumsum())),
    x.made(ids),
    x.made((x.lens - 1) % spec.block_size + 1),
    spec.num_heads,
    spec.num_kv_heads,
    spec.head_dim,
    spec.block_size,
    pos_encoding_mode="NONE",
    q_data_type=x.q.dtype,
    kv_data_type=x.k.dtype,
    sm_scale=spec.sm_scale or spec.head_dim**-0.5,
  )
  return lambda: wrapper.run(x.q, pools)


def flex(x: Tensors, *, is_compiled: bool = True) -> Call:
  """PyTorch's flex attention over pages, by a mask of blocks of the pool."""
  module = importlib.import_module("torch.nn.attention.flex_attention")
  torch, spec = x.torch, x.batch.spec
  size, num_seqs = spec.block_size, len(x.lens)
  num_blocks = x.k.shape[0]
  # Where a block stands in its row, and the blocks of a row that are full and not.
  place = np.full((num_seqs, num_blocks), -1)
  full = np.zeros((num_seqs, 1, 1, num_blocks), np.int32)
  last = np.zeros_like(full)
  num_full = x.lens // size
  tables = np.asarray(x.batch.arrays["block_tables"])
  for row, count in enumerate(x.counts):
    place[row, tables[row, :count]] = np.arange(count)
    full[row, 0, 0, : num_full[row]] = tables[row, : num_full[row]]
    last[row, 0, 0, : count - num_full[row]] = tables[row, num_full[row] : count]
  place, lens = x.made(place), x.made(x.lens)

  def is_seen(row: Any, head: Any, query: Any, token: Any) -> Any:
    del head, query
    at = place[row, token // size]
    return (at >= 0) & (at * size + token % size < lens[row])

  mask = module.BlockMask.from_kv_blocks(
    x.made((x.counts - num_full).reshape(-1, 1, 1)),
    x.made(last),
    x.made(num_full.reshape(-1, 1, 1)),
    x.made(full),
    BLOCK_SIZE=(128, size),
    mask_mod=is_seen,
    seq_lengths=(1, num_blocks * size),
  )

  def pages(pool: Any) -> Any:
    pool = pool.transpose(0, 1).contiguous()  # heads outermost
    return pool.reshape(1, spec.num_kv_heads, num_blocks * size, spec.head_dim)

  k, v = pages(x.k), pages(x.v)
  attend = module.flex_attention
  if is_compiled:
    attend = torch.compile(attend, dynamic=False)
  scale = spec.sm_scale or spec.head_dim**-0.5

  def call() -> Any:
    out = attend(
      x.q[:, :, None], k, v, block_mask=mask, scale=scale, enable_gqa=spec.group > 1
    )
    return out[:, :, 0]

  return call


PEERS: dict[str, Callable[[Tensors], Call]] = {
  "FlashInfer": flash_infer,
  "FlashInfer, NHD pool": lambda x: flash_infer(x, layout="NHD"),
  "flex attention": flex,
}


def graph_seconds(x: Tensors, call: Call, seconds: float) -> float:
  """Median time of a call on the device, by CUDA events around graphs of calls."""
  cuda = x.torch.cuda
  side = cuda.Stream()
  side.wait_stream(cuda.current_stream())
  with cuda.stream(side):  # compiles whatever is compiled late
    for _ in range(3):
      call()
  cuda.current_stream().wait_stream(side)
  cuda.synchronize()
  graph = cuda.CUDAGraph()
  with cuda.graph(graph):
    for _ in range(_CALLS):
      call()

  def timed(num: int) -> float:
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num):
      graph.replay()
    end.record()
    cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / (num * _CALLS)

  timed(2)
  num = max(1, round(seconds / (_CALLS * max(timed(2), 1e-6))))
  return statistics.median(timed(num) for _ in range(_PAIRS))


def time_decode(run: Run) -> Iterator[Row]:
  """Times decode steps: shapes so large that no cache holds what a call reads."""
  peers = dict(PEERS)
  for name, lengths in run.sizes.torch:
    spec, what = named(name), decode_label(name, lengths)
    num_bytes = seen_bytes(spec, lengths)
    try:
      batch = decode_batch(spec, lengths, num_bytes, run)
      x = tensors(batch)
      ours = run_attention(batch, "triton", interpret=run.interpret)
      want = jax.jit(ours)(batch.arrays)[0].astype(jnp.float32)
      if not x.k.is_cuda:
        raise NotServedError("PyTorch sees no GPU")
    except Exception as problem:
      yield failed("decode", what, "PyTorch", problem, is_bad=False)
      if isinstance(problem, ImportError | NotServedError):
        return
      continue
    for by, make in tuple(peers.items()):
      if not run.wants("decode", what, by):
        continue
      try:
        run.begin("decode", what, by, seconds=120.0)
        call = make(x)
        out = np.asarray(call().float().cpu())
        seconds = graph_seconds(x, call, run.sizes.seconds)
        rate = num_bytes / seconds / 1e9
        yield Row(
          section="decode",
          what=what,
          by=by,
          error=float(np.abs(out - np.asarray(want)).max()),
          microseconds=seconds * 1e6,
          rate=rate,
          share=run.share_of("copy", rate),
          num_bytes=num_bytes,
        )
      except Exception as problem:
        yield failed("decode", what, by, problem, is_bad=False)
        if isinstance(problem, ImportError):
          del peers[by]
