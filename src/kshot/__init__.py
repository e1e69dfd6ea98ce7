"""Few-shot adaptation of vision-language and vision backbones."""

__version__ = "0.1.0"
