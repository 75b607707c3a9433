"""What a run looks like to the person who started it: texts, progress and a summary."""

from collections.abc import Callable, Sequence
import sys

from kvcache import terminal
from kvcache.generation import Completion, Slice
from kvcache.prompts import Prompt
from kvcache.terminal import PoolSample, ProgressLine, Style

_GRAPH_WIDTH = 16


class Report:
  """Prints texts as they finish, and remembers how the pool was used.

  Attributes:
    samples: How the pool was used after each slice.
  """

  def __init__(
    self,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    *,
    num_blocks: int,
    progress: ProgressLine,
    quiet: bool = False,
  ):
    """Starts a report.

    Args:
      prompts: What is served.
      decode: Token ids to text.
      num_blocks: Usable blocks of the pool.
      progress: Where to show how far the run is.
      quiet: Whether to print the texts and nothing else.
    """
    self.prompts, self.decode, self.num_blocks = prompts, decode, num_blocks
    self.progress, self.quiet = progress, quiet
    self.style = Style.of(sys.stdout)
    self.samples: list[PoolSample] = []
    self._times: list[tuple[int, float]] = []  # tokens and seconds after each slice

  def add(self, part: Slice) -> None:
    """Takes a slice of work; this is an `on_slice` of `kvcache.generate`."""
    used, cached = int(part.stats.num_in_use), int(part.stats.num_evictable)
    self.samples.append(PoolSample(step=part.num_steps, used=used, cached=cached))
    self._times.append((part.num_tokens, part.seconds))
    self.progress.clear()
    for completion in part.finished:
      self._show(completion)
    recent = [sample.used for sample in self.samples[-_GRAPH_WIDTH:]]
    graph = terminal.sparkline(recent, top=self.num_blocks, style=self.progress.style)
    self.progress.show(
      f"{part.num_finished}/{part.num_requests} finished, {part.num_tokens} tokens,"
      f" {self.tokens_per_second:.0f} tokens/s,"
      f" blocks {graph} {used}/{self.num_blocks}"
    )

  @property
  def tokens_per_second(self) -> float:
    """Without the first slice, which waits for the compiler."""
    (tokens, seconds), (first_tokens, first_seconds) = self._times[-1], self._times[0]
    if seconds > first_seconds:
      return (tokens - first_tokens) / (seconds - first_seconds)
    return tokens / seconds if seconds else 0.0

  def picture(self) -> str:
    """Returns the chart of the pool's blocks over the steps."""
    chart = terminal.pool_chart(
      self.samples, num_blocks=self.num_blocks, style=self.style
    )
    return f"blocks of the pool ({self.num_blocks}) over the steps\n{chart}"

  def summary(self, completions: Sequence[Completion]) -> str:
    """Returns what the run was like, in a few lines."""
    tokens, seconds = self._times[-1]
    asked = sum(len(completion.prompt_tokens) for completion in completions)
    cached = sum(completion.num_cached for completion in completions)
    preempted = sum(completion.num_preemptions for completion in completions)
    peak = max(sample.used for sample in self.samples)
    return (
      f"{len(completions)} prompts, {tokens} tokens in {seconds:.1f} s:"
      f" {self.tokens_per_second:.1f} tokens/s after the first"
      f" {self._times[0][1]:.1f} s, which compile\n"
      f"prefix hit rate: {cached / asked:.1%} ({cached} of {asked} prompt tokens)\n"
      f"blocks: at most {peak} of {self.num_blocks} in use; {preempted} preemptions"
    )

  def _show(self, completion: Completion) -> None:
    """Prints a text, and around it what was asked and how it went."""
    text = self.decode(completion.tokens)
    if self.quiet:
      print(text, flush=True)
      return
    asked = " ".join(self.prompts[completion.request_id].text.split())
    room = max(20, self.style.width - 8)
    asked = asked if len(asked) <= room else asked[: room - 3] + "..."
    how = (
      f"({len(completion.tokens)} tokens, {completion.finish_reason};"
      f" {completion.num_cached} of {len(completion.prompt_tokens)}"
      " prompt tokens from the cache)"
    )
    print(self.style.paint(f"[{completion.request_id + 1}] {asked}", "used"))
    print(text.strip())
    print(self.style.paint(how, "free") + "\n", flush=True)
