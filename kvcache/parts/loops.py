"""Loops of the bookkeeping, compiled once.

Outside `jax.jit` a bare `while_loop` is traced and compiled anew by every call, which
takes seconds: its body is a new function each time. Within `jax.jit` the functions
decorated here are part of the program around them, as if they were not decorated.
"""

from collections.abc import Callable

import jax


def compiled[F: Callable[..., object]](*static_argnames: str) -> Callable[[F], F]:
  """Returns a decorator that compiles a function, for callers outside `jax.jit`.

  Args:
    *static_argnames: Its arguments that shapes or branches depend on.
  """
  return lambda function: jax.jit(  # pyright: ignore[reportReturnType]
    function, static_argnames=static_argnames, inline=True
  )
