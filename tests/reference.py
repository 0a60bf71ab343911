"""The formulas of the paper in float64, written here anew: what the package is compared with."""

import math

import torch


def slopes(heads, max_bias=8):
    """Slopes of ALiBi: a geometric sequence, or that of the lower power of two and the odd-numbered of the next one."""
    if math.log2(heads).is_integer():
        return [2 ** (-max_bias * h / heads) for h in range(1, heads + 1)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower, max_bias) + slopes(2 * lower, max_bias)[0::2][: heads - lower]


def attention(q, k, v, method="alibi", seen=None, window=math.inf):
    """softmax over the seen keys j <= i of q_i . k_j / sqrt(D) - m_h (i - j), and its product with v.

    q (B, H, T, D); k, v (B, H, S, D); seen (B, S), False at padding; of the keys the last `window` ones alone. Rows
    that see nothing are 0.
    """
    q, k, v = q.double(), k.double(), v.double()
    heads, queries, keys = q.size(1), q.size(2), k.size(2)
    i = torch.arange(keys - queries, keys)[:, None]
    distance = i - torch.arange(keys)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.size(-1))
    if method == "alibi":
        scores = scores - torch.tensor(slopes(heads), dtype=torch.float64)[:, None, None] * distance
    hidden = ((distance < 0) | (distance >= window)).expand(scores.shape)
    if seen is not None:
        hidden = hidden | ~seen[:, None, None, :]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def logits(model, tokens, window=math.inf):
    """Logits of a pre-norm transformer language model for one sequence: tokens (L,) -> (L, V).

    A token attends to the last `window` tokens, itself included.
    """
    p = {name.replace("decoder.", ""): value.double() for name, value in model.state_dict().items()}
    method = {"ALiBi": "alibi", "Sinusoidal": "sinusoidal"}.get(type(model.decoder.position_method).__name__, "none")
    heads, layers = model.decoder.layers[0].self_attn.num_heads, len(model.decoder.layers)
    width, length = p["embed_tokens.weight"].size(1), len(tokens)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = p["embed_tokens.weight"][tokens] * math.sqrt(width)
    if method == "sinusoidal":  # fairseq: sines, then cosines; the first token is at position 2 (padding index + 1)
        frequency = torch.exp(torch.arange(width // 2) * -(math.log(10000) / (width // 2 - 1))).double()
        angle = (torch.arange(length, dtype=torch.float64)[:, None] + 2) * frequency
        x = x + torch.cat([angle.sin(), angle.cos()], dim=1)
    for n in range(layers):
        at = f"layers.{n}"
        h = norm(x, f"{at}.self_attn_layer_norm")
        q, k, v = (
            linear(h, f"{at}.self_attn.{name}_proj").view(1, length, heads, -1).transpose(1, 2) for name in "qkv"
        )
        out = attention(q, k, v, method, window=window)[0].transpose(0, 1).reshape(length, width)
        x = x + linear(out, f"{at}.self_attn.out_proj")
        h = norm(x, f"{at}.final_layer_norm")
        x = x + linear(linear(h, f"{at}.fc1").relu(), f"{at}.fc2")
    return norm(x, "layer_norm") @ p["embed_tokens.weight"].T
