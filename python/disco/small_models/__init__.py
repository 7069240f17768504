"""Small models for small images, made here: the source "disco" of the zoo."""

from disco.small_models.names import SMALL_MODELS, base_name, small_model

__all__ = ["SMALL_MODELS", "base_name", "small_model"]
