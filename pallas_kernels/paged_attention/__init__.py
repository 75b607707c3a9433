"""Paged attention for decode, chunked prefill and mixed ragged batches."""

from pallas_kernels.paged_attention.api import paged_attention as paged_attention
from pallas_kernels.paged_attention.api import plan as plan
from pallas_kernels.paged_attention.cascade import (
  cascade_attention as cascade_attention,
)
from pallas_kernels.paged_attention.cascade import merge as merge
from pallas_kernels.paged_attention.work_queue import Plan as Plan
