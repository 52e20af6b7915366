"""All C and its bindings: the products and the exchanges of `linear` and `net`, compiled where pip can.

Begin with `products.py` and `products.c`; docs/block-types.md says how a type of weights is added.
May import: `linear` and `net`, whose protocols it fulfils, and what they stand on.
Must never know: models, files of weights, engines. `engine/compiled.py` alone decides whether it is used;
what it gives is handed in everywhere else, the exchanges by `cluster/sums.py`.
"""
