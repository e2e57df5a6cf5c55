"""Scoring of text continuation: manifest -> generate -> score -> compare -> report."""
