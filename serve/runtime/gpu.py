"""Options of ONNX Runtime's CUDA provider. The standard library and pydantic only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from ensembler.record import Record

__all__ = ["GpuOptions"]


class GpuOptions(Record):
    """Options of ONNX Runtime's CUDA provider, under its names; they have no effect on a CPU.

    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
    """

    device_id: NonNegativeInt | None = Field(
        default=None, description="number of the GPU, which must exist; by default the first, or the CPU without one"
    )
    gpu_mem_limit: PositiveInt | None = Field(
        default=None, description="bytes of GPU memory of all members' arenas together; by default no limit"
    )
    arena_extend_strategy: Literal["kSameAsRequested", "kNextPowerOfTwo"] = Field(
        default="kSameAsRequested", description="how an arena grows: by what is needed, or by powers of two"
    )
    use_tf32: bool | None = Field(
        default=None,
        description="products in TF32, only for a bundle of precision tf32; by default for each such bundle",
    )

    def provider(self, tf32: bool, sessions: int, *, graphs: bool) -> tuple[str, dict[str, str]]:
        """Return the CUDA provider and its options.

        Args:
            tf32: whether products are computed in TF32.
            sessions: how many share the GPU; each has an arena of its own.
            graphs: whether passes can be captured as CUDA graphs.
        """
        options = {
            "device_id": str(self.device_id or 0),
            "arena_extend_strategy": self.arena_extend_strategy,
            "use_tf32": str(int(tf32)),
            # The default search for a convolution takes half a second or more for every new size of a batch.
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": str(int(graphs)),
        }
        if self.gpu_mem_limit is not None:
            options["gpu_mem_limit"] = str(max(1, self.gpu_mem_limit // sessions))
        return "CUDAExecutionProvider", options
