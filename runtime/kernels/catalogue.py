"""Every implementation there is, fastest first and the reference last."""

from pressd.runtime.kernels.attention import cpu as attention_cpu
from pressd.runtime.kernels.attention import reference as attention_reference
from pressd.runtime.kernels.dense import cpu as dense_cpu
from pressd.runtime.kernels.dense import reference as dense_reference
from pressd.runtime.kernels.int8 import cpu as int8_cpu
from pressd.runtime.kernels.int8 import reference as int8_reference
from pressd.runtime.kernels.mask import reference as mask_reference
from pressd.runtime.kernels.packed_int import cpu as packed_int_cpu
from pressd.runtime.kernels.packed_int import cpu_bytes as packed_int_cpu_bytes
from pressd.runtime.kernels.packed_int import reference as packed_int_reference
from pressd.runtime.kernels.registry import AttentionKernel, LinearKernel

LINEAR: tuple[LinearKernel, ...] = (
    dense_cpu.KERNEL,
    dense_reference.KERNEL,
    int8_cpu.PREPACKED,
    int8_cpu.BYTES,
    int8_reference.KERNEL,
    mask_reference.KERNEL,
    packed_int_cpu_bytes.KERNEL,
    packed_int_cpu.KERNEL,
    packed_int_reference.KERNEL,
)
ATTENTION: tuple[AttentionKernel, ...] = (attention_cpu.KERNEL, attention_reference.KERNEL)
