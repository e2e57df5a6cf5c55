"""Prompts in, text out, for every system."""

from megatext.generation.likelihood import Likelihood, LikelihoodConfig
from megatext.generation.text_generator import TextGenerator
from megatext.recipes.sampling import SamplingConfig

__all__ = ["Likelihood", "LikelihoodConfig", "SamplingConfig", "TextGenerator"]
