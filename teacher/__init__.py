"""The teacher: the text-to-image model that is pruned and distilled from. Where it comes from (the
pocket teacher, a folder, the hub, random weights of a published shape), and a target as it reads
it. May import `common` and `targets`.
"""
