"""Interactive views; each can also be shown as static HTML."""
