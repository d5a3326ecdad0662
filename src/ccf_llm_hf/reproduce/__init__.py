"""The tables, figures and analyses of a results section."""
