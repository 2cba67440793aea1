"""Text in, text out: `GeneratorTransformer` writes with a trained model of any kind."""

from generation.text import GeneratorTransformer

__all__ = ["GeneratorTransformer"]
