"""How good a model with an AHN is: lm-eval tasks with their data and scores, perplexity, and the paper's figures."""
