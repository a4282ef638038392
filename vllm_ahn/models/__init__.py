"""The base models that AHN serves: ``ahn.py`` and one thin module a family. `vllm_ahn.bases` is their table."""
