"""AHN layers on devices that run Triton."""
