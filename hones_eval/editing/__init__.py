"""Visual semantic editing (V-SEAM 1): pairs of a clean and an edited picture for one yes/no question.

A record names a thing, its box and a question (`records`); `counterfactual` chooses what to change and what
is then true; `masks` says where; an editor of `editors` does it, or a diffusers checkpoint (`inpaint`);
`checks` measures whether it worked; `run` does all that for many records, and `sheet` shows them.
"""
