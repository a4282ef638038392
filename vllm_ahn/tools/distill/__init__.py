"""Training an AHN for a base model by self-distillation, as in section 3.3 of the AHN paper (arXiv 2510.07318).

The base is frozen and is its own teacher: its answers with full attention are the targets for the same weights with
window, sinks and memory. Only the memory's parameters are learnt. The model is the project's reference
(`vllm_ahn.reference`), the loop is Hugging Face's ``Trainer``, and the result is a checkpoint to serve.
"""
