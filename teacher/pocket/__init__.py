"""How the shipped pocket teacher was trained, and its model card; pruning does not need it:
`python -m teacher.pocket.pretrain`, `python -m teacher.pocket.model_card`. May import `common`,
`targets`, `teacher` and, for the card, `evaluation`.
"""
