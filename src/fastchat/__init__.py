"""Chat with, compare and serve open language models through the OpenAI API."""

__version__ = "0.1.0"
__all__ = ["__version__"]
