"""The demo of vishub: a Gradio page with one module a tab.

In a checkout it is the folder `app/`; in the wheel it is `vishub/_app`. Imports inside it are therefore relative.
"""
