"""Text, token by token: the public name of decoding/generate.py."""

from sandcat.decoding.decoder import Decoder
from sandcat.decoding.generate import encode, generate, sample

__all__ = ["Decoder", "encode", "generate", "sample"]
