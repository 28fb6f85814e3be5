"""Low-rank adapters (LoRA) by peft: one on a model that is trained alone, or one for each role over frozen weights.

``peft_layers`` knows how peft keeps an adapted layer; ``adapters`` what of a model is its adapter's and what the frozen
base's; ``roles`` has several models over one base; ``files`` is folders; ``four_bits`` a base in 4 bits.
"""
