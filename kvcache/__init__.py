"""kvcache: the memory of a JAX inference program.

One immutable pytree, the `Context`, holds the paged K/V cache, the lists of free memory
and the prefix index of many concurrent sequences. Pure functions change it, so a whole
continuous-batching loop runs inside one `jax.jit`.

Dimensions, in code and documentation alike:

    S  sequences (rows)          N  blocks, the null block included
    P  blocks per sequence       L  attention layers
    T  packed tokens of a step   K  key/value heads
    Q  requests                  H  query heads
    A  admissions in one call    D  head dimension
    M  recurrent states          Dv  value head dimension
    R  recurrent layers          V  vocabulary

and where a docstring says nothing else

    E  entries of a flat list    F  sequences of one call, such as forks
    C  columns of an array       W  width: of a window, of a bucket, of a state

Ids, lengths and counts are int32, hashes uint32. State comes first and is returned
first; configuration is keyword-only. Users own `jax.jit`:

    step = jax.jit(step, donate_argnums=0)

Examples in docstrings go on from here, with a step that has no model:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import kvcache as kv
    >>> layer = kv.AttentionLayer(num_kv_heads=1, head_dim=4)
    >>> config = kv.CacheConfig(
    ...   layers=(layer,) * 2, num_blocks=9, block_size=4, max_seqs=2, max_seq_len=16
    ... )
    >>> ctx = jax.jit(kv.init, static_argnums=0)(config)
    >>> @jax.jit
    ... def store(ctx, tokens, query_lens):
    ...   ctx, status = kv.extend(ctx, query_lens, num_tokens=16)
    ...   metadata = kv.step_metadata(ctx, query_lens, num_tokens=16)
    ...   return kv.commit(ctx, tokens, metadata)
    >>> admit = jax.jit(kv.admit)
    >>> prompt, length = jnp.arange(16)[None], jnp.array([10])
    >>> started, admission = admit(ctx, prompt, length)  # row 0
    >>> started = store(started, prompt[0], jnp.array([10, 0]))
"""

from kvcache.config import (
  AttentionLayer,
  CacheConfig,
  LayerGroup,
  NULL_BLOCK,
  NULL_STATE,
  RecurrentLayer,
)
from kvcache.context import (
  bookkeeping_bytes,
  Context,
  Counters,
  evict,
  evict_snapshots,
  evict_window_blocks,
  init,
  publish,
)
from kvcache.errors import (
  BlockOverflowError,
  CacheError,
  CheckpointError,
  EmptySequenceError,
  InactiveSequenceError,
  InvalidRequestError,
  InvariantError,
  raise_for_status,
  SequenceOverflowError,
  SequenceTooLongError,
  StateError,
  Status,
  TokenBudgetError,
  WindowOverflowError,
)
from kvcache.observe import (
  BlockMap,
  diff,
  Difference,
  Events,
  events,
  History,
  make_history,
  map_blocks,
  plot_blocks,
  plot_history,
  Stats,
  stats,
)
from kvcache.parts.blocks import BlockPool
from kvcache.parts.kv import KVStore
from kvcache.parts.prefix import PrefixIndex
from kvcache.parts.sequences import SequenceTable
from kvcache.parts.state_rows import StateRows
from kvcache.parts.states import StateStore
from kvcache.parts.windows import WindowBlocks
from kvcache.serving import sampling, scheduler
from kvcache.serving.draft_model import DraftModel
from kvcache.serving.generation import Completion, generate, Slice
from kvcache.serving.requests import (
  FinishReason,
  make_requests,
  Requests,
  RequestStatus,
  WaitReason,
)
from kvcache.serving.sampling import SamplingParams, SamplingSettings
from kvcache.serving.scheduler import SchedulerConfig
from kvcache.serving.search import beam_search, best_of, SearchResult
from kvcache.serving.serve import serve, step
from kvcache.serving.speculation import Drafter, PromptLookup
from kvcache.verbs import recurrent, sharding
from kvcache.verbs.attention import attend
from kvcache.verbs.checkpoint import has_checkpoint, restore_checkpoint, save_checkpoint
from kvcache.verbs.checks import check_invariants, checked
from kvcache.verbs.handoff import (
  export_sequences,
  import_sequences,
  offload,
  SequenceState,
)
from kvcache.verbs.lifecycle import Admission, admit, find, finish, fork, reset, rewind
from kvcache.verbs.metadata import SharedPrefix, StepMetadata, WindowView
from kvcache.verbs.stepping import (
  commit,
  extend,
  read_state,
  step_metadata,
  tokens_to_snapshot,
  write_kv,
  write_state,
)

__version__ = "0.1.0"

__all__ = [
  "NULL_BLOCK",
  "NULL_STATE",
  "Admission",
  "AttentionLayer",
  "BlockMap",
  "BlockOverflowError",
  "BlockPool",
  "CacheConfig",
  "CacheError",
  "CheckpointError",
  "Completion",
  "Context",
  "Counters",
  "Difference",
  "DraftModel",
  "Drafter",
  "EmptySequenceError",
  "Events",
  "FinishReason",
  "History",
  "InactiveSequenceError",
  "InvalidRequestError",
  "InvariantError",
  "KVStore",
  "LayerGroup",
  "PrefixIndex",
  "PromptLookup",
  "RecurrentLayer",
  "RequestStatus",
  "Requests",
  "SamplingParams",
  "SamplingSettings",
  "SchedulerConfig",
  "SearchResult",
  "SequenceOverflowError",
  "SequenceState",
  "SequenceTable",
  "SequenceTooLongError",
  "SharedPrefix",
  "Slice",
  "StateError",
  "StateRows",
  "StateStore",
  "Stats",
  "Status",
  "StepMetadata",
  "TokenBudgetError",
  "WaitReason",
  "WindowBlocks",
  "WindowOverflowError",
  "WindowView",
  "admit",
  "attend",
  "beam_search",
  "best_of",
  "bookkeeping_bytes",
  "check_invariants",
  "checked",
  "commit",
  "diff",
  "events",
  "evict",
  "evict_snapshots",
  "evict_window_blocks",
  "export_sequences",
  "extend",
  "find",
  "finish",
  "fork",
  "generate",
  "has_checkpoint",
  "import_sequences",
  "init",
  "make_history",
  "make_requests",
  "map_blocks",
  "offload",
  "plot_blocks",
  "plot_history",
  "publish",
  "raise_for_status",
  "read_state",
  "recurrent",
  "reset",
  "restore_checkpoint",
  "rewind",
  "sampling",
  "save_checkpoint",
  "scheduler",
  "serve",
  "sharding",
  "stats",
  "step",
  "step_metadata",
  "tokens_to_snapshot",
  "write_kv",
  "write_state",
]
