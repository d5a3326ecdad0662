"""The `ccf-llm` command: what it can do, by what a reader wants to do."""
