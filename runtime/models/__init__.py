"""One decoder and a small map per architecture."""

from pressd.runtime.models.decoder import Decoder
from pressd.runtime.models.loading import FAMILIES, decoder_config, load_decoder

__all__ = ["FAMILIES", "Decoder", "decoder_config", "load_decoder"]
