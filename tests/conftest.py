"""Settings that must be in place before vLLM is imported, for engines that run inside the test process."""

import os

os.environ.update(
    # The engine in this process, with this process's threads: it starts in about a second.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # the models are tiny; threads would only wait for each other
)
