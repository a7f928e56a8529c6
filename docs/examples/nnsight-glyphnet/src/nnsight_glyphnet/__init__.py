"""The image classifiers of glyphnet, for nnsight: `nnsight.GlyphClassifier`."""
