"""Checkpoints: a context and its requests on disk, in the middle of the work.

Written with Orbax (`pip install orbax-checkpoint`; flax brings it along). A checkpoint
appears under its name only when it is complete, so a process that dies while it writes
leaves the one before it in place.
"""

import dataclasses
import logging
import pathlib
from typing import Any, Protocol

import jax
from jax import Array
import numpy as np

from kvcache import printing
from kvcache.context import Context
from kvcache.errors import CheckpointError

_KEPT = 2


class Work(Protocol):
  """What a context is saved with: a pytree that knows what it is about.

  `kvcache.Requests` is such work.
  """

  @property
  def num_steps(self) -> Array:
    """`[]` int32. Names the checkpoint."""
    ...

  def sizes(self) -> dict[str, Any]:
    """Returns facts that must be equal for the arrays to fit, by name."""
    ...

  def asked(self) -> dict[str, Any]:
    """Returns arrays that must be equal for it to be the same work, by name."""
    ...


def save_checkpoint(
  folder: str | pathlib.Path, ctx: Context, requests: Work
) -> pathlib.Path:
  """Writes a context and its requests; the two newest checkpoints are kept.

  Args:
    folder: Made if need be. A checkpoint is a folder in it, named after
      `requests.num_steps`; one of the same name is replaced.
    ctx: The context.
    requests: The requests it serves.

  Returns:
    Where it was written.

  Raises:
    CheckpointError: The path is taken by what is no folder.
  """
  step = int(requests.num_steps)
  state = {"context": ctx, "requests": requests}
  with _manager(folder) as (ocp, manager):
    if step in manager.all_steps():
      manager.delete(step)
    manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        sizes=ocp.args.JsonSave(_sizes(ctx, requests)),
      ),
    )
    manager.wait_until_finished()
  return pathlib.Path(folder) / str(step)


def has_checkpoint(folder: str | pathlib.Path) -> bool:
  """Whether there is a complete checkpoint in a folder."""
  if not pathlib.Path(folder).is_dir():
    return False
  with _manager(folder) as (_, manager):
    return manager.latest_step() is not None


def restore_checkpoint[W: Work](
  folder: str | pathlib.Path, ctx: Context, requests: W
) -> tuple[Context, W]:
  """Reads the newest checkpoint, to the last bit as it was saved.

  Args:
    folder: As given to `save_checkpoint`.
    ctx: A context of the same configuration, commonly a fresh one. Only its shapes and
      its configuration are looked at.
    requests: Requests made of the same prompts with the same settings.

  Raises:
    CheckpointError: There is none, it cannot be read, or it belongs to another
      configuration or to other prompts.
  """
  like = {"context": ctx, "requests": requests}
  if not has_checkpoint(folder):
    raise CheckpointError(f"{folder} holds no complete checkpoint")
  with _manager(folder) as (ocp, manager):
    step = manager.latest_step()
    try:
      saved = manager.restore(
        step, args=ocp.args.Composite(sizes=ocp.args.JsonRestore())
      )
      _compare(saved["sizes"], _sizes(ctx, requests), folder)
      abstract = jax.tree.map(jax.ShapeDtypeStruct.like, like)
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
      state = manager.restore(step, args=args)["state"]
    except CheckpointError:
      raise
    except Exception as error:  # Orbax raises whatever its storage raises.
      reason = str(error).partition("\n")[0]
      raise CheckpointError(
        f"{folder}: checkpoint {step} cannot be read: {reason}"
      ) from error
  _compare_prompts(state["requests"], requests, folder)
  return state["context"], state["requests"]


class _manager:  # noqa: N801
  """Opens Orbax's manager of a folder, quietly, and closes it."""

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder).absolute()

  def __enter__(self) -> tuple[Any, Any]:
    if self.folder.exists() and not self.folder.is_dir():
      raise CheckpointError(f"{self.folder} is no folder")
    try:
      import orbax.checkpoint as ocp
    except ImportError as error:
      raise CheckpointError(
        "checkpoints need Orbax: pip install orbax-checkpoint"
      ) from error
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=_KEPT, enable_async_checkpointing=False, create=True
    )
    self.manager = ocp.CheckpointManager(self.folder, options=options)
    return ocp, self.manager

  def __exit__(self, *_: object) -> None:
    self.manager.close()


def _sizes(ctx: Context, requests: Work) -> dict[str, Any]:
  """What must be equal for the arrays to mean the same."""
  config = ctx.config
  return {
    "configuration": {
      field.name: printing.show_fact(getattr(config, field.name))
      for field in dataclasses.fields(config)
    },
    "set of requests": requests.sizes(),
  }


def _compare(saved: dict[str, Any], wanted: dict[str, Any], folder: object) -> None:
  for what, new in wanted.items():
    old = saved.get(what)
    if not isinstance(old, dict):
      raise CheckpointError(f"{folder} was saved by another version of kvcache")
    differing = [
      f"{key}: {old.get(key)}, not {new.get(key)}"
      for key in dict.fromkeys([*old, *new])
      if old.get(key) != new.get(key)
    ]
    if differing:
      told = "; ".join(differing)
      raise CheckpointError(f"{folder} was saved with another {what}: {told}")


def _compare_prompts(saved: Work, wanted: Work, folder: object) -> None:
  old, new = saved.asked(), wanted.asked()
  differing = [
    name
    for name in new
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, old[name], new[name])))
  ]
  if differing:
    raise CheckpointError(f"{folder} was saved with other {', '.join(differing)}")
