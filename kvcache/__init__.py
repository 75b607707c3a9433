"""kvcache: the memory of a JAX inference program."""

from kvcache.attention import attend
from kvcache.blocks import BlockPool
from kvcache.checks import check_invariants, checked
from kvcache.config import AttentionLayer, CacheConfig, NULL_BLOCK
from kvcache.context import (
  Admission,
  admit,
  bookkeeping_bytes,
  commit,
  Context,
  evict,
  extend,
  find,
  finish,
  fork,
  init,
  publish,
  reset,
  rewind,
  step_metadata,
  write_kv,
)
from kvcache.errors import CacheError, raise_for_status, Status
from kvcache.kv import KVStore
from kvcache.metadata import StepMetadata
from kvcache.observe import events, Events, stats, Stats
from kvcache.prefix import PrefixIndex
from kvcache.requests import FinishReason, make_requests, Requests, RequestStatus
from kvcache.sampling import SamplingParams
from kvcache.scheduler import SchedulerConfig
from kvcache.sequences import SequenceTable
from kvcache.serve import Completion, generate, serve, Slice, step

__version__ = "0.1.0"
