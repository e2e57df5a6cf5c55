"""megatext: pretraining of language models that write by diffusion in a continuous latent space."""

__version__ = "0.1.0"
