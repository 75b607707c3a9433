"""Wrong requests, models and searches: the loop refuses them, and serves the others."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

import kvcache
from kvcache import PromptLookup, SamplingParams, SchedulerConfig, Status
from kvcache.models import Llama, LlamaConfig
from kvcache.serving import generation
from kvcache.serving.sampling import greedy
from tests.fixtures import toy_model as toy
from tests.hostile.table import area, hybrid, WrongUse, zeros

SIZES = toy.config(num_blocks=9, block_size=4, max_seqs=2, max_seq_len=16)
SCHEDULER = SchedulerConfig(token_budget=8, max_admissions=2)
GOOD = [[1, 2, 3], [4, 5, 6, 7, 8]]
NEVER = 2**40


@functools.cache
def fresh():
  return kvcache.init(SIZES)


def make(prompts=GOOD, **kwargs):
  return kvcache.make_requests(prompts, **{"max_new_tokens": 2} | kwargs)


def serve(*strange, news=3, **kwargs):
  """Serves strange prompts before and between good ones, which must not notice.

  Returns:
    How each of the strange ones ended, and why.
  """
  prompts = [*strange, *GOOD][:3]
  wanted = [*[news] * len(strange), NEVER, NEVER][:3]  # so that all arrays are alike
  ctx, done = kvcache.generate(
    toy.model,
    jax.tree.map(jnp.copy, fresh()),
    prompts,
    max_new_tokens=wanted,
    scheduler=SCHEDULER,
    **kwargs,
  )
  kvcache.check_invariants(ctx)
  assert not ctx.sequences.is_active.any()
  want = toy.expected(
    prompts[len(strange) :], NEVER, max_tokens_per_seq=SIZES.max_tokens_per_seq
  )
  assert [c.tokens for c in done[len(strange) :]] == [w.tokens for w in want]
  return [(c.finish_reason, c.status) for c in done[: len(strange)]]


def among_others():
  ctx = jax.tree.map(jnp.copy, fresh())
  ctx, _ = kvcache.admit(ctx, zeros(2, 3), [3, 3])
  ctx, done = kvcache.generate(  # as in `serve`, so that nothing is compiled anew
    toy.model, ctx, [*GOOD, [6]], max_new_tokens=NEVER, scheduler=SCHEDULER
  )
  kvcache.check_invariants(ctx)
  assert ctx.sequences.is_active.all()
  return [(c.finish_reason, c.status) for c in done[:2]]


def equal_seeds():
  params = SamplingParams(temperature=1.0, seed=3)
  return serve([1, 2, 3], sampling_params=[params, SamplingParams(), SamplingParams()])


def trace(model, **kwargs):
  return jax.eval_shape(
    functools.partial(kvcache.serve, model, scheduler=SCHEDULER, **kwargs),
    fresh(),
    make(),
  )


def model_of(shape, dtype=jnp.float32):
  return lambda tokens, metadata, ctx: (jnp.zeros(shape, dtype), ctx)


def stateless(tokens, metadata, ctx):
  x = jnp.zeros((tokens.size, 1, 2))
  for layer in range(2):
    ctx = kvcache.write_kv(ctx, layer, x, x, metadata)
  return jnp.zeros((metadata.logits_indices.size, 8)), ctx


def three_layers():
  shape = LlamaConfig(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=4,
    num_layers=3,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
  )
  return nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0)))


def no_steps():
  requests = make([[9], *GOOD], max_new_tokens=NEVER, capacity=17)
  model = jax.tree_util.Partial(toy.model)
  ctx, after, *_ = generation._serve_slice(
    model,
    jax.tree.map(jnp.copy, fresh()),
    requests,
    None,
    None,
    None,
    jnp.int32(-1),
    scheduler=SCHEDULER,
    sampler=greedy,
  )
  kvcache.check_invariants(ctx)
  return after.lengths.tolist(), int(after.num_steps)


def search(prompt=(1, 2, 3), length=3, **kwargs):
  kwargs = {"num_beams": 2, "max_new_tokens": 2, "chunk_size": 4} | kwargs
  prompt = jnp.asarray(prompt, jnp.int32)
  return kvcache.beam_search(toy.model, fresh(), prompt, length, **kwargs)


row, refused = area("Requests")

USES: list[WrongUse] = [
  refused("no prompts", lambda: make([]), "prompts must not be empty"),
  refused(
    "a text instead of its tokens",
    lambda: make(["h\u00e9llo \U0001f680", [1]]),
    "prompts\\[0\\] must be a list of token ids, got 'h\u00e9llo \U0001f680'",
  ),
  refused(
    "one prompt, not a list of prompts",
    lambda: make([1, 2, 3]),
    "prompts\\[0\\] must be a list of token ids, got '1'",
  ),
  refused(
    "a prompt in a prompt",
    lambda: make([[[1, 2]]]),
    "prompts\\[0\\] must be a list of token ids",
  ),
  refused(
    "tokens that are no integers",
    lambda: make([[1], [1.5, 2]]),
    r"prompts\[1\] must be a list of token ids, got '\[1.5, 2\]'",
  ),
  refused(
    "a token beyond int32",
    lambda: make([[1, 2**40]]),
    "prompts\\[0\\] must fit into int32, got 1099511627776",
  ),
  refused(
    "no new token", lambda: make(max_new_tokens=0), "max_new_tokens must be at least 1"
  ),
  refused(
    "one and a half new tokens",
    lambda: make(max_new_tokens=1.5),
    "max_new_tokens must be integers, got 1.5",
  ),
  refused(
    "three wishes for two prompts",
    lambda: make(max_new_tokens=[1, 2, 3]),
    "max_new_tokens has 3 entries for 2 prompts",
  ),
  refused(
    "one setting too few",
    lambda: make(sampling_params=[SamplingParams()]),
    "sampling_params has 1 entries for 2 prompts",
  ),
  refused(
    "a temperature instead of settings",
    lambda: make(sampling_params=0.7),
    "sampling_params must be SamplingParams, got 0.7",
  ),
  refused(
    "a priority that is too high",
    lambda: make(priority=[0, 2000]),
    "priority must be within",
  ),
  refused(
    "a namespace beyond int32",
    lambda: make(namespace=[0, 2**31]),
    "namespace must fit into int32, got 2147483648",
  ),
  refused(
    "a stop token beyond int32",
    lambda: make(stop_tokens=[2**31]),
    "stop_tokens must fit into int32, got 2147483648",
  ),
  refused(
    "no stop tokens, as None",
    lambda: make(stop_tokens=None),
    "stop_tokens must be a list of token ids, got None",
  ),
  refused(
    "a stop text",
    lambda: make(stop_tokens=["a", "b"]),
    "stop_tokens must be a list of token ids",
  ),
  refused(
    "generate: slices of no step",
    lambda: kvcache.generate(toy.model, fresh(), GOOD, slice_steps=0),
    "slice_steps must be at least 1, got 0",
  ),
  row(
    "generate: an empty prompt among others",
    lambda: serve([]),
    gives=[("refused", Status.EMPTY)],
    note="the others get their tokens",
  ),
  row(
    "generate: a prompt of a million tokens among others",
    lambda: serve([1] * 10**6),
    gives=[("refused", Status.TOO_LONG)],
    note="the others get their tokens",
  ),
  row(
    "generate: more new tokens than int32 can count",
    lambda: serve([9, 9], news=2**70),
    gives=[("capacity", Status.OK)],
    note="the sequence ends where its row does",
  ),
  row(
    "generate: the largest and the smallest namespace",
    lambda: (
      serve([1, 2, 3], namespace=[2**31 - 1, 0, 0])
      + serve([1, 2, 3], namespace=[-(2**31), 0, 0])
    ),
    gives=[("length", Status.OK)] * 2,
  ),
  refused(
    "a stop token, not a list of them",
    lambda: make(stop_tokens=5),
    "stop_tokens must be a list of token ids, got 5",
  ),
  refused(
    "serve: prompts instead of requests",
    lambda: kvcache.serve(toy.model, fresh(), GOOD, scheduler=SCHEDULER),
    "requests must be Requests, from make_requests, got list",
  ),
  refused(
    "serve, generate: a configuration instead of a context",
    lambda: kvcache.generate(toy.model, SIZES, GOOD),
    "ctx must be a Context, as kvcache.init makes it, got CacheConfig",
  ),
  row(
    "generate: a context whose every row holds a sequence of somebody else",
    among_others,
    gives=[("refused", Status.NO_ROW)] * 2,
    note="those sequences stay as they are",
  ),
  refused(
    "serve: a model that returns the context it was given",
    lambda: trace(model_of((2, toy.VOCAB))),
    "a context in which keys and values of layers 0, 1 are unwritten: return the one",
  ),
  refused(
    "serve: a hybrid that forgets its states",
    lambda: jax.eval_shape(
      functools.partial(kvcache.serve, stateless, scheduler=SCHEDULER), hybrid(), make()
    ),
    "a context in which states 'sum' are unwritten",
  ),
  refused(
    "serve: a model that returns a context of other sizes",
    lambda: trace(lambda *args: (toy.model(*args)[0], hybrid())),
    "the model returned a context of other shapes, dtypes or sizes",
  ),
  refused(
    "serve: a model that returns the context first",
    lambda: trace(lambda *args: toy.model(*args)[::-1]),
    r"the model must return \(logits, ctx\), got \(Context, \w+Tracer\)",
  ),
  refused(
    "serve: a model that returns logits alone",
    lambda: trace(lambda *args: toy.model(*args)[0]),
    r"the model must return \(logits, ctx\), got \(\w+Tracer\)",
  ),
  refused(
    "serve: a sampler that returns probabilities",
    lambda: trace(toy.model, sampler=lambda logits, *_: jax.nn.softmax(logits)),
    r"the sampler's result must be integers, got float32\[2, 32\]",
  ),
  refused(
    "serve: a policy that says who comes first",
    lambda: kvcache.serve(
      toy.model,
      fresh(),
      make(),
      scheduler=SchedulerConfig(token_budget=8, admission=lambda *_: jnp.int32(0)),
    ),
    r"the policy's order must have shape \(2,\), got \(\)",
  ),
  refused(
    "serve: a number of samples instead of a history",
    lambda: trace(toy.model, history=10),
    "history must be a History, from make_history, got int",
  ),
  refused(
    "serve: a model of three layers, a context for two",
    lambda: trace(three_layers()),
    "the model has 3 attention layers and 0 recurrent ones, but ctx was made for 2",
  ),
  refused(
    "serve: a model whose logits are those of all tokens",
    lambda: trace(model_of((8, toy.VOCAB))),
    r"the model must return floating logits \[2, vocab\].* got float32\[8, 32\]",
  ),
  refused(
    "serve: a model that returns tokens",
    lambda: trace(model_of((2,), jnp.int32)),
    r"the model must return floating logits \[2, vocab\].* got int32\[2\]",
  ),
  refused(
    "serve: a budget below the number of rows",
    lambda: kvcache.serve(
      toy.model, fresh(), make(), scheduler=SchedulerConfig(token_budget=1)
    ),
    "token_budget=1 must be at least max_seqs=2",
  ),
  refused(
    "serve: drafts where no states are kept for them",
    lambda: kvcache.serve(
      toy.model, hybrid(), make(), scheduler=SCHEDULER, drafter=PromptLookup()
    ),
    "drafter guesses 4 tokens, but recurrent layers keep states for max_drafts=0",
  ),
  row(
    "serve: a negative number of steps",
    no_steps,
    gives=([1, 3, 5], 0),
    note="nothing is computed",
  ),
  refused(
    "search: more beams than rows",
    lambda: search(num_beams=3),
    "3 branches need more than the context's rows",
  ),
  refused(
    "search: no beams", lambda: search(num_beams=0), "num_beams must be at least 1"
  ),
  refused(
    "search: two stop tokens",
    lambda: search(stop_token=[1, 2]),
    r"stop_token must have shape \(\), got \(2,\)",
  ),
  refused(
    "search: parameters instead of settings",
    lambda: kvcache.best_of(
      toy.model, fresh(), zeros(4), 3, [SamplingParams()] * 2, max_new_tokens=2
    ),
    "settings must be SamplingSettings, as sampling.make_settings makes them",
  ),
  refused(
    "search: two prompts",
    lambda: search(prompt=[[1, 2], [3, 4]]),
    "prompt must have 1 dimensions",
  ),
]
