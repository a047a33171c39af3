"""Workbench that measures how far reinforcement learning carries a self-correcting text-to-SQL agent.

Importing the package is cheap (well under a second): heavy libraries are imported where they are used.
"""

__version__ = "0.2.0"
