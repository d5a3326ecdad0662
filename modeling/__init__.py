"""The code that a Hub repo carries, verbatim: config, model, processor and pipeline."""
