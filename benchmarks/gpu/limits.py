"""Bounds of the acceptance run, each with its source; none may be loosened to make a run pass."""

from __future__ import annotations

from benchmarks.gpu.rows import Limit

ALLOCATED = Limit(0.90, 1.05, "goal for the memory plan: what tensors take, measured over planned")
RESERVED = Limit(0.95, 1.15, "goal for the memory plan: what PyTorch's allocator holds, measured over planned")
MFU = Limit(0.35, None, "LoRA on one H100 reaches 0.41 to 0.43 (NeMo Automodel), video VLMs 0.25 to 0.35 (lmms-engine)")
WAITS = Limit(None, 10, "tests/devices counts nine blocking calls in a micro-batch on the CPU")
LOSS = Limit(None, 1e-4, "float32 sums in another order differ by some 1e-6; 1e-4 is an error")
GRADIENTS = Limit(None, 1e-3, "the bound of the projectors' test on a GPU (tests/models/projectors)")
HALF_LOSS = Limit(None, 2**-7, "two roundings of bfloat16, which keeps 8 bits")
HALF_GRADIENTS = Limit(None, 2**-4, "bfloat16 rounds every factor of a chain of products to 8 bits")
SAME = Limit(0, 0, "has to be equal")
DETERMINISTIC = Limit(
    None, 1.1, "captions are written outside of deterministic mode (vlmcap.determinism); a tenth is noise"
)
ENGINES = Limit(None, 1.0, "evaluation.engine=native is the default, so it may not be slower than transformers")
CAPTIONS = Limit(
    3.0, None, "goal for an H100: three times the captions per second that were planned before CUDA graphs"
)
HOST = Limit(None, 0.25, "weights go straight to the GPU and stay there: no second copy in host memory")
ON_DEVICE = Limit(0.95, 1.05, "the weights, and nothing else")
ALL = Limit(1, 1, "has to hold for all of them")
