"""Which of vLLM's CPU attention kernels can share pages with a compressed memory."""


def attention_isa(block_size: int, head_size: int) -> str:
    """The instruction set to ask of vLLM's CPU attention.

    Of those it has, ``vec`` and ``vec16`` store a block's keys transposed and its values as rows, which is what
    :class:`~vllm_ahn.kernels.pages.WindowPages` reads. Others pack them in ways of their own.
    """
    return "vec" if block_size % 32 == 0 and head_size % 32 == 0 else "vec16"
