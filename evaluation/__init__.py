"""Evaluation: generated images, feature networks, scores, tables, figures, the report. May import
`common`, `targets` and `teacher`; knows no router and no gates, and is handed what it shows.
"""
