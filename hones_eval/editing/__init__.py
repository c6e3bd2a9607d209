"""Visual semantic editing (V-SEAM 1): pairs of a clean and an edited image for one yes/no question.

A record names a thing, its box and a question (`records`). `counterfactual` chooses the change and the new
answer, `masks` the region. An editor (`editors`) or a diffusers checkpoint (`inpaint`) makes the edit.
`checks` measures whether it worked, `run` processes many records, and `sheet` shows them.
"""
