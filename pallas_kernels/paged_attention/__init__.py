"""Paged attention for decode, chunked prefill and mixed ragged batches."""

from pallas_kernels.paged_attention.api import paged_attention as paged_attention
