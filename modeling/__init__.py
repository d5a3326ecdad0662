"""The code that a Hub repo carries, verbatim: config, layout, processor and model."""
