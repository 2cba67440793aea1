"""Text generation with a trained model: the public functions and classes."""

from generation.text import GeneratorTransformer, generate_text, generate_texts, infill, stream_texts

__all__ = ["GeneratorTransformer", "generate_text", "generate_texts", "infill", "stream_texts"]
