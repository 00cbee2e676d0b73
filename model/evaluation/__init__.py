"""Scores of generated videos: distances between sets, agreement with texts, consistency and motion, each with its whole protocol.

Importing this package is light; the command is `python -m videofactory.model.evaluate`.
"""
