"""Matrix products in FP8: formats, scales, products that take them, and the linear layers made of these.

Formats and per-tensor scaling with a history of largest values: Micikevicius et al. 2022 ("FP8 formats for deep
learning"). Blocks of 128: DeepSeek-AI 2024 ("DeepSeek-V3 technical report", section 3.3). Run on CPUs; never on a GPU.
"""
