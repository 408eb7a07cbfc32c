"""The decoder, written as one device would compute it; how it is split lives in the layers it is made of.

Legend of shapes, in names and comments: b samples of the microbatch, s their length, t = b*s its tokens, sample after
sample (under sequence parallelism and outside the matrices, this rank's run of them), h hidden, n query heads and m
key/value heads of this rank, d head_dim, f ffn of this rank, v vocabulary rows of this rank.
"""
