"""`vlmcap spectrum`: measures the effective rank and the locality of encoders' patch features."""

from __future__ import annotations

from argparse import Namespace

from vlmcap.spectrum.measure_encoder import SpectrumSettings, show_spectra


def run(options: Namespace) -> None:
    """Prints the figures of each encoder, and writes them with pictures to a folder.

    Raises:
        UserError: An override is invalid, or an encoder or a clip cannot be read.
    """
    settings = SpectrumSettings(options.clips, options.tokens, options.layers, tuple(options.images or ()))
    show_spectra(options.overrides, settings, options.output, as_json=options.json)
