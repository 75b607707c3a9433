"""How large a run on a GPU is: in full, or so small that any machine bears it."""

import dataclasses

from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, ArgSpec, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How large a run is.

  Attributes:
    first: What is compared before anything is timed.
    rest: What is compared if time is left.
    checked: `(tokens stored, of these queries)` of the rows of a comparison.
    decode: `(name of a shape, lengths of the rows)` that are timed.
    layout: The same, of what is timed in two layouts of the pool.
    torch: The same, of what PyTorch's kernels are timed on.
    prefill: Tokens of prompts that are timed.
    serve: `(rows, tokens of each)` of decode steps of a whole model.
    model: `(hidden size, layers, rows of the vocabulary)` of that model.
    scans: Whether its layers are scanned; each is timed.
    rows: Rows of a decode step without a model.
    copy_elements: Of the array that is copied.
    matmul: Rows of the matrices that are multiplied.
    seconds: That a chain of calls should take.
    steps: Steps of a timed call of the loop.
  """

  first: tuple[ArgSpec, ...]
  rest: tuple[ArgSpec, ...]
  checked: tuple[tuple[int, int], ...]
  decode: tuple[tuple[str, tuple[int, ...]], ...]
  layout: tuple[tuple[str, tuple[int, ...]], ...]
  torch: tuple[tuple[str, tuple[int, ...]], ...]
  prefill: tuple[int, ...]
  serve: tuple[tuple[int, int], ...]
  model: tuple[int, int, int]
  scans: tuple[bool, ...]
  rows: int
  copy_elements: int
  matmul: int
  seconds: float
  steps: int


def ragged(num: int, mean: int) -> tuple[int, ...]:
  """Lengths from a sixteenth of the mean to about twice as much, of the same sum."""
  low, high = mean // 16, 2 * mean - mean // 16
  return tuple(low + (high - low) * i // (num - 1) for i in range(num))


_FIRST = tuple(
  named(name)
  for name in (
    *("llama-3-8b", "llama-3-8b block 16", "llama-3-8b fp8", "llama-3-8b int8"),
    *("gpt-oss-120b window", "gemma-2-9b", "deepseek-v3 tp8"),
  )
)
_LARGE = ((16, 8192), (64, 8192), (256, 1024))
FULL = Sizes(
  first=_FIRST,
  rest=tuple(spec for spec in ARG_SPECS if spec not in _FIRST),
  checked=((1, 1), (17, 17), (300, 40), (1000, 5), (0, 0), (2049, 200), (4000, 1)),
  decode=(
    *(
      (name, (length,) * num)
      for name, shapes in (
        ("llama-3-8b", (*_LARGE, (1, 1024), (1, 8192), (1, 32_768), (1, 131_072))),
        ("llama-3-8b block 16", (*_LARGE, (1, 1024), (1, 32_768))),
        ("llama-3-8b", ((16, 1024), (16, 32_768), (64, 1024))),
      )
      for num, length in shapes
    ),
    ("llama-3-8b", ragged(64, 4096)),
    ("llama-3-8b", (4096,) * 64),
    ("llama-3-8b fp8", (8192,) * 64),
    ("llama-3-8b int8", (8192,) * 64),
    ("llama-3-70b tp8", (8192,) * 64),
    ("gpt-oss-120b full", (8192,) * 64),
    ("gpt-oss-120b window", (8192,) * 64),
    ("gemma-3-27b", (8192,) * 64),
    ("deepseek-v3 tp8", (8192,) * 64),
  ),
  layout=tuple(
    (name, (length,) * num)
    for name in ("llama-3-8b", "llama-3-8b block 16")
    for num, length in _LARGE[1:]
  ),
  torch=tuple(
    (name, (length,) * num)
    for name in ("llama-3-8b", "llama-3-8b block 16")
    for num, length in _LARGE
  ),
  prefill=(4096, 16_384),
  serve=((64, 2048), (256, 512)),
  model=(4096, 32, 128_256),
  scans=(False, True),
  rows=256,
  copy_elements=1 << 29,
  matmul=8192,
  seconds=0.015,
  steps=20,
)
_QWEN = "qwen-2.5-0.5b"
TINY = Sizes(
  first=(named(_QWEN),),
  rest=(),
  checked=((1, 1), (70, 20), (0, 0), (130, 1)),
  decode=((_QWEN, (70, 5)),),
  layout=((_QWEN, (70, 5)),),
  torch=((_QWEN, (70, 5)),),
  prefill=(32,),
  serve=((2, 1),),
  model=(32, 2, 8),  # as many logits as the filler's: one program less
  scans=(True,),
  rows=2,
  copy_elements=1 << 10,
  matmul=16,
  seconds=0.0,
  steps=2,
)
