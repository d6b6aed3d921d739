"""Targets: captioned images to prune on. The embedded `emoji`, COCO, CC3M, or your own folder;
their layouts on disk, and how to fetch them (`python -m targets coco --download --data-dir D`). May
import `common`.
"""
