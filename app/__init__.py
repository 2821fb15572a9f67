"""The demo of vishub: a Gradio page with one tab a task."""
