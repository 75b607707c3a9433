"""What a run looks like to the person who started it: texts, progress and a summary."""

from collections.abc import Callable, Sequence
import sys

from kvcache.command.prompts import Prompt
from kvcache.observe import BlockMap, map_blocks, terminal
from kvcache.observe.terminal import ProgressLine, RunProgress, Style
from kvcache.serving.generation import Completion, Slice


class Report:
  """Prints texts as they finish, and remembers how the pool was used."""

  def __init__(
    self,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    *,
    num_blocks: int,
    progress: ProgressLine,
    quiet: bool = False,
    keeps_map: bool = False,
  ):
    """Starts a report.

    Args:
      prompts: What is served.
      decode: Token ids to text.
      num_blocks: Usable blocks of the pool.
      progress: Where to show how far the run is.
      quiet: Whether to print the texts and nothing else.
      keeps_map: Whether `picture` shows the blocks when most of them were in use.
    """
    self.prompts, self.decode, self.num_blocks = prompts, decode, num_blocks
    self.progress, self.quiet = progress, quiet
    self.style = Style.of(sys.stdout)
    self._run = RunProgress(progress, num_blocks=num_blocks)
    self._keeps_map = keeps_map
    self._fullest: BlockMap | None = None

  def add(self, part: Slice) -> None:
    """Takes a slice of work; this is an `on_slice` of `kvcache.generate`."""
    sample = part.sample
    peak = max((before.used for before in self._run.samples), default=-1)
    if self._keeps_map and part.ctx is not None and sample.used > peak:
      self._fullest = map_blocks(part.ctx)
    self._run.add(sample, num_tokens=part.num_tokens, seconds=part.seconds)
    self.progress.clear()
    for completion in part.finished:
      self._show(completion)
    self._run.show(num_finished=part.num_finished, num_requests=part.num_requests)

  def picture(self) -> str:
    """Returns the pool's blocks over the steps, and all blocks when it was fullest."""
    chart = terminal.pool_chart(
      self._run.samples, num_blocks=self.num_blocks, style=self.style
    )
    text = f"blocks of the pool ({self.num_blocks}) over the steps\n{chart}"
    if self._fullest is not None:
      blocks = terminal.block_chart(self._fullest, style=self.style)
      text += f"\n\nthe memory when it was fullest\n{blocks}"
    return text

  def summary(self, completions: Sequence[Completion]) -> str:
    """Returns what the run was like, in a few lines."""
    tokens, seconds = self._run.times[-1]
    asked = sum(len(completion.prompt_tokens) for completion in completions)
    cached = sum(completion.num_cached for completion in completions)
    preempted = sum(completion.num_preemptions for completion in completions)
    peak = max(sample.used for sample in self._run.samples)
    return (
      f"{len(completions)} prompts, {tokens} tokens in {seconds:.1f} s:"
      f" {self._run.tokens_per_second:.1f} tokens/s after the first"
      f" {self._run.times[0][1]:.1f} s, which compile\n"
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
