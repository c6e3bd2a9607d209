"""`hones-eval anatomy`."""

from hones_eval.commands.answer import Answer


def anatomy(pretrained: str, dtype: str | None = None, trust_remote_code: bool = False) -> Answer:
    """Show a model's layers, heads, neurons, experts and memory before it is loaded.

    Only the configuration is read. What it finds is proven by experiments when the model is loaded.

    Args:
        pretrained: the model's folder or hub id.
        dtype: type of the weights for the memory figures; by default that of the configuration.
        trust_remote_code: run code from the model's repository, as in transformers.

    Example:
        hones-eval anatomy --pretrained Qwen/Qwen2.5-VL-72B-Instruct
    """
    from hones_eval.api.model_anatomy import anatomy as find

    found = find(pretrained, dtype=dtype, trust_remote_code=trust_remote_code)
    return Answer(found.lines(), found.to_json())
