"""The Space's page: scoring and markup know nothing of Gradio, the page puts them on screen."""
