"""Prompts in, text out, for every system."""

from megatext.generation.likelihood import Likelihood, LikelihoodConfig
from megatext.generation.sampling import SamplingConfig
from megatext.generation.text_generator import TextGenerator

__all__ = ["Likelihood", "LikelihoodConfig", "SamplingConfig", "TextGenerator"]
