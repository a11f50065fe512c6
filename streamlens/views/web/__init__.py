"""The live page over run stores: `streamlens ui`. Needs `pip install "streamlens[ui]"`."""
