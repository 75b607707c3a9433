"""Which array is split how; `on_eight_devices.py` runs it, in a process of its own."""

import dataclasses
import os
import subprocess
import sys

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, RecurrentLayer
from kvcache.verbs import sharding
from tests.fixtures import small
from tests.fixtures.places import ROOT
from tests.fixtures.thorough import more

FLAG = "--xla_force_host_platform_device_count=8"


def mesh_of(**axes):
  types = (AxisType.Auto,) * len(axes)
  return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)


def config_of(*layers, head_axes=("kv", "group"), **sizes):
  sizes = {"num_blocks": 8, "max_seqs": 2, "max_seq_len": 64} | sizes
  return CacheConfig(layers=layers, head_axes=head_axes, **sizes)


FULL = AttentionLayer(num_kv_heads=8, head_dim=4)
FEW = AttentionLayer(num_kv_heads=2, head_dim=4, dtype="int8", sliding_window=8)
LATENT = AttentionLayer(num_kv_heads=1, head_dim=8, v_head_dim=4, is_latent=True)
MAMBA = RecurrentLayer.mamba2(num_heads=8, head_dim=2, state_size=3)


def test_heads_are_split_and_the_rest_is_whole():
  config = config_of(FULL, FEW, LATENT, MAMBA)
  specs = sharding.partition_specs(config, mesh=mesh_of(kv=2, group=4))
  assert jax.tree.structure(specs) == jax.tree.structure(kvcache.init(config))
  full, few, latent = specs.kv
  assert full.k == full.v == P(None, None, ("kv", "group"))
  assert few.k == few.v == few.k_scale == few.v_scale == P(None, None, ("kv",))
  assert latent.k == P()
  # 22 channels: 16 features of heads, and twice 3 that all of them share.
  assert specs.states.arrays == {
    "conv": P(None, None, ("kv",)),
    "ssm": P(None, None, ("kv", "group")),
  }
  assert set(jax.tree.leaves((specs.tables, specs.counters))) == {P()}


def test_a_device_holds_its_heads_only():
  config = config_of(FULL, FEW, LATENT, MAMBA)
  local = sharding.local_config(config, mesh=mesh_of(kv=2, group=4))
  assert [layer.num_kv_heads for layer in local.attention_layers] == [1, 1, 1]
  assert local.recurrent_layer.arrays["conv"].shape == (11, 3)
  assert local.recurrent_layer.arrays["ssm"].shape == (1, 2, 3)
  assert local.head_axes == ()
  alone = sharding.local_config(config, mesh=mesh_of(kv=1, group=1))
  assert alone == dataclasses.replace(config, head_axes=())
  one = config_of(FULL, head_axes="tensor")
  on_eight = sharding.local_config(one, mesh=mesh_of(tensor=8))
  assert 8 * on_eight.num_bytes == one.num_bytes


@pytest.mark.parametrize(
  ("num_kv_heads", "axes", "message"),
  [
    (2, {"tensor": 8}, "2 kv heads .* two axes, of 2 and 4, would do"),
    (6, {"tensor": 4}, "6 kv heads cannot be split over head_axes {'tensor': 4}"),
    (6, {"kv": 2, "group": 2}, "each device needs equally many"),
  ],
)
def test_heads_that_do_not_fit_are_refused(num_kv_heads, axes, message):
  layer = AttentionLayer(num_kv_heads=num_kv_heads, head_dim=4)
  config = config_of(layer, head_axes=tuple(axes))
  with pytest.raises(ValueError, match=message):
    sharding.partition_specs(config, mesh=mesh_of(**axes))
  with pytest.raises(ValueError, match=message):
    sharding.local_config(config, mesh=mesh_of(**axes))


def test_a_step_needs_its_mesh():
  config = dataclasses.replace(small.CONFIG, head_axes="tensor")
  ctx = jax.eval_shape(lambda: kvcache.init(config))
  tokens = jax.ShapeDtypeStruct((16,), "int32")
  lens = jax.ShapeDtypeStruct((4,), "int32")

  def step(ctx, tokens, lens):
    metadata = kvcache.step_metadata(ctx, lens, num_tokens=16)
    k, v = small.contents(tokens)
    ctx = kvcache.write_kv(ctx, 0, k, v, metadata)
    return kvcache.attend(ctx, 0, k[:, [0] * 3], metadata)

  def trace():
    return jax.eval_shape(step, ctx, tokens, lens)

  with pytest.raises(ValueError, match=r"no axis 'tensor'.* under jax.set_mesh"):
    trace()
  typed = AbstractMesh((1,), ("tensor",), axis_types=(AxisType.Explicit,))
  with (
    jax.sharding.use_abstract_mesh(typed),
    pytest.raises(ValueError, match="all be Auto"),
  ):
    trace()
  with jax.sharding.use_abstract_mesh(mesh_of(tensor=1)):
    assert trace().shape == (16, 3, 2)
  with (
    jax.sharding.use_abstract_mesh(mesh_of(tensor=2)),
    pytest.raises(
      ValueError, match="3 query heads must be a multiple of the 2 devices"
    ),
  ):
    trace()


@pytest.mark.parametrize("which", ["not thorough", *more("thorough")])
def test_on_eight_devices(which):
  command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", which]
  run = subprocess.run(
    [*command, "tests/verbs/on_eight_devices.py"],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAG}"},
    capture_output=True,
    text=True,
    check=False,
    timeout=1100,
  )
  assert run.returncode == 0, run.stdout + run.stderr
