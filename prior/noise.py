"""Noise that is a function of (image's seed, level, position, code): the same random words on every
device, and the same numbers up to the last bit of a logarithm.

A code is drawn as the argmax of logits + Gumbel noise (Gumbel 1954; Maddison et al. 2014), with one
number for each code of each position. When a little changes in the logits, as when a guess of an
earlier code is corrected, the drawn code changes only if the change concerns it.

Letters: B batch, W positions, K codebook size.
"""

import torch
from torch import Tensor

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS, WORD = 10, 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> list[Tensor]:
    """Four random words of 32 bits: Philox-4x32-10 (Salmon et al. 2011), in 64-bit integers.

    Args:
        counter: four words, int64 tensors of shapes that broadcast.
        key: two words, likewise.
    """
    key_0, key_1 = key
    a, b, c, d, _, _ = torch.broadcast_tensors(*counter, key_0, key_1)
    for number in range(ROUNDS):
        product_0, product_1 = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = ((product_1 >> 32) ^ b).bitwise_xor_((key_0 + number * WEYL[0]) & WORD)
        c = ((product_0 >> 32) ^ d).bitwise_xor_((key_1 + number * WEYL[1]) & WORD)
        a, c = a.bitwise_and_(WORD), c.bitwise_and_(WORD)
        b, d = product_1, product_0  # of which the low words count: the high ones are masked above
    return [a, b & WORD, c, d & WORD]


def gumbel(seeds: Tensor, level: int, places: Tensor, codebook_size: int) -> Tensor:
    """Gumbel noise `(B, W, K)`, fp32, of images with seeds `(B,)` int64 at positions `(B, W)`.

    -log(-log(1 - u)) of u = (word + 1/2) / 2^32. A large value, on which the chance of a rare code
    hangs, belongs to a small u, of which fp32 has enough: it goes on to 22.9, where a code is as
    rare as 1e-10. (The lower tail, where fp32 is coarse, ends at -2.8.)
    """
    # A quarter of the codes. (The mask changes nothing, but keeps a compiler from multiplying the
    # range out in 32 bits, which Triton refuses.)
    quarter = torch.arange(-(-codebook_size // 4), device=places.device) & WORD
    zero = torch.zeros_like(quarter)
    counter = quarter, places[..., None], zero + level, zero
    key = (seeds & WORD)[:, None, None], ((seeds >> 32) & WORD)[:, None, None]
    words = torch.stack(philox(counter, key), dim=-1).flatten(2)[..., :codebook_size]
    uniform = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


class Noise:
    """The Gumbel noise of a batch of images while they are drawn.

    On a CPU it is made for some positions ahead, for what costs there is the number of operations;
    and for those images alone that have come to the end of theirs.
    """

    AHEAD = 16

    def __init__(self, seeds: Tensor, level: int, num_positions: int, codebook_size: int) -> None:
        self.seeds, self.level, self.codebook_size = seeds, level, codebook_size
        self.last, self.lanes = num_positions - 1, torch.arange(len(seeds))[:, None]
        self.first = seeds.new_full((len(seeds), 1), num_positions)  # of what was made, per image
        self.made = torch.empty(len(seeds), 0, codebook_size)

    def at(self, places: Tensor) -> Tensor:
        """`(B, W, K)` of positions `(B, W)`, which ascend in every row."""
        if places.device.type != "cpu":
            return gumbel(self.seeds, self.level, places, self.codebook_size)
        width, offsets = places.shape[1], places - self.first
        if self.made.shape[1] < width:
            self.made = torch.empty(len(places), width + self.AHEAD, self.codebook_size)
        ended = (offsets[:, 0] < 0) | (offsets[:, -1] >= self.made.shape[1])
        if bool(ended.any()):
            self.first[ended] = places[ended, :1]
            made = self.first[ended] + torch.arange(self.made.shape[1])
            made = made.clamp(max=self.last)
            self.made[ended] = gumbel(self.seeds[ended], self.level, made, self.codebook_size)
            offsets = places - self.first
        return self.made[self.lanes, offsets]
