"""Causal convolution and the Mamba-2 recurrence over packed, ragged rows."""

from pallas_kernels.ssm.api import causal_conv1d as causal_conv1d
from pallas_kernels.ssm.api import ssd as ssd
from pallas_kernels.ssm.api import step_conv1d as step_conv1d
from pallas_kernels.ssm.api import step_ssd as step_ssd
