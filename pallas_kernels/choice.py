"""Which implementation of an operation runs: the one named, or the best that serves."""

from collections.abc import Callable, Sequence

from jax import Array, lax

from pallas_kernels import device


class NotServedError(NotImplementedError):
  """An implementation that was asked for cannot serve such arguments, or here."""


type Run = Callable[[], tuple[Array, Array]]
"""An implementation with all its arguments."""


def run(
  implementation: str | None,
  names: Sequence[str],
  *,
  fallback: Run,
  kernel: Callable[[str], str | Run],
) -> tuple[Array, Array]:
  """Runs the implementation of that name, or the best that can serve.

  Args:
    implementation: One of `names`. If None Triton on a GPU if it can serve, else XLA.
    names: Of the operation's implementations; `"xla"` runs everywhere.
    fallback: The one in XLA.
    kernel: Returns how to run another one, or says why it cannot serve. Called where
      programs may be for a GPU only: to import a backend takes a moment, and one day
      jax will drop Triton.

  Raises:
    NotServedError: The named implementation cannot serve.
  """
  if implementation not in (None, *names):
    raise NotServedError(
      f"implementation {implementation!r} is not one of {tuple(names)}"
    )
  if implementation == "xla" or (implementation is None and not device.is_gpu()):
    return fallback()
  best = kernel(implementation or "triton")
  if implementation is None:
    if isinstance(best, str):
      return fallback()
    # A program for another platform, such as the host's, is lowered to XLA.
    return lax.platform_dependent(cuda=best, default=fallback)
  if not device.is_gpu():
    best = f"it needs a GPU, and programs are for {device.platform()}"
  if isinstance(best, str):
    raise NotServedError(f"implementation {implementation!r}: {best}")
  return best()
