"""An AHN layer's core: what a step asks of it, and how it is computed."""
