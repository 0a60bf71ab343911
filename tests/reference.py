"""The formulas of the paper in float64, written here anew: what the package is compared with."""

import math

import torch


def slopes(heads, max_bias=8):
    """Slopes of ALiBi: a geometric sequence, or that of the lower power of two and the odd-numbered of the next one."""
    if math.log2(heads).is_integer():
        return [2 ** (-max_bias * h / heads) for h in range(1, heads + 1)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower, max_bias) + slopes(2 * lower, max_bias)[0::2][: heads - lower]


def t5_bucket(distance):
    """Bucket of a distance: 16 exact ones, 16 logarithmic ones up to 128, the last one for all beyond."""
    return distance if distance < 16 else min(31, 16 + math.floor(math.log(distance / 16) / math.log(8) * 16))


def turned(x, xpos=0):
    """Rotary: pairs of dimensions (2n, 2n + 1) turned by position / 10000^(2n / D): (..., positions, D) -> the same.

    `xpos` is 1 for the queries of xPos and -1 for its keys, which have the inverse of their factor.
    """
    x, dim = x.double().clone(), x.size(-1)
    position = torch.arange(x.size(-2), dtype=torch.float64)
    for n in range(0, dim, 2):
        angle = position / 10000 ** (n / dim)
        factor = ((n / dim + 0.4) / 1.4) ** (xpos * position / 512)
        a, b = x[..., n].clone(), x[..., n + 1].clone()
        x[..., n] = factor * (a * angle.cos() - b * angle.sin())
        x[..., n + 1] = factor * (a * angle.sin() + b * angle.cos())
    return x


def bias_by_distance(method, heads, distance, p=None):
    """The bias of every head at distances (...) of at least 0: (H, ...); zeros for a method without one.

    `p` has the parameters of a learned bias by name.
    """
    d = distance.double()

    def of_heads(f):
        return torch.stack([f(h).expand(d.shape) for h in range(heads)])

    if method == "alibi":
        m = p["log_slopes"].double().exp() if p and "log_slopes" in p else torch.tensor(slopes(heads)).double()
        return of_heads(lambda h: -m[h] * d)
    if method == "t5":
        bucket = torch.tensor([t5_bucket(x) for x in range(int(d.max()) + 1)])[distance]
        return of_heads(lambda h: p["bucket_bias"].double()[bucket, h])
    if method == "sandwich":
        cosines = sum((d / 10000 ** (2 * n / 128)).cos() for n in range(64))
        return of_heads(lambda h: cosines / (8 * (h + 1) / heads))
    if method == "fire":
        c, m = p["c"].double().abs(), p["m"].double().abs()
        i = torch.arange(d.size(-1) - d.size(-2), d.size(-1)).double()[:, None].clamp(min=m * p["training_length"])
        x = (c * d + 1).log() / ((c * i + 1).log() + 1e-6)
        units = (x[..., None] * p["hidden_weight"].double()[:, 0] + p["hidden_bias"].double()).clamp(min=0)
        return of_heads(lambda h: units @ p["out_weight"].double()[h])
    if method in ("kerple", "kerple_power"):
        first, second = p["parameters_of_heads"].double().clamp(min=0.01)
        if method == "kerple":
            return of_heads(lambda h: -first[h] * (1 + second[h] * d).log())
        return of_heads(lambda h: -second[h] * d ** first[h].clamp(max=2))
    return d.new_zeros(heads, *d.shape)


def attention(q, k, v, method="alibi", seen=None, window=math.inf, parameters=None, decay=None):
    """softmax over the seen keys j <= i of q_i . k_j / sqrt(D) + bias, and its product with v.

    q (B, H, T, D); k, v (B, H, S, D); seen (B, S), False at padding; of the keys the last `window` ones alone. Rows
    that see nothing are 0. `parameters` are those of the method, see `bias_by_distance`. The sum of `decay`, (B, H, S)
    of fox and cable, over j < l <= i is added.
    """
    q, k, v = q.double(), k.double(), v.double()
    heads, queries, keys = q.size(1), q.size(2), k.size(2)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.size(-1))
    scores = scores + bias_by_distance(method, heads, distance.clamp(min=0), parameters)
    if decay is not None:
        c = decay.double().cumsum(-1)
        scores = scores + c[:, :, -queries:, None] - c[:, :, None, :]
    hidden = ((distance < 0) | (distance >= window)).expand(scores.shape)
    if seen is not None:
        hidden = hidden | ~seen[:, None, None, :]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def embedded(p, tokens, method):
    """What the layers of a side with the parameters `p` read: tokens (L,) -> (L, C)."""
    width, length = p["embed_tokens.weight"].size(1), len(tokens)
    x = p["embed_tokens.weight"][tokens] * math.sqrt(width)
    if method == "sinusoidal":  # fairseq: sines, then cosines; the first token is at position 2 (padding index + 1)
        frequency = torch.exp(torch.arange(width // 2) * -(math.log(10000) / (width // 2 - 1))).double()
        angle = (torch.arange(length, dtype=torch.float64)[:, None] + 2) * frequency
        x = x + torch.cat([angle.sin(), angle.cos()], dim=1)
    if method == "learned":
        x = x + p["embed_positions.weight"][2 : length + 2]
    return x


def logits(model, tokens, window=math.inf):
    """Logits of a pre-norm transformer language model for one sequence: tokens (L,) -> (L, V).

    A token attends to the last `window` tokens, itself included. The options --score-scale and --position-layers are
    those of the model.
    """
    p = {name.replace("decoder.", ""): value.double() for name, value in model.state_dict().items()}
    method = model.decoder.position_method.name
    parameters = {name.split(".")[1]: value for name, value in p.items() if name.startswith("position_method.")}
    heads, layers = model.decoder.layers[0].self_attn.num_heads, len(model.decoder.layers)
    width, length = p["embed_tokens.weight"].size(1), len(tokens)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = embedded(p, tokens, method)
    parameters["training_length"] = getattr(model.decoder.position_method, "training_length", None)
    stack, settings = model.decoder.position_method.name, model.decoder.setup.settings
    visible = torch.arange(1, length + 1).double().clamp(max=window)
    for n in range(layers):
        at = f"layers.{n}"
        method = stack if settings.position_layers[n % len(settings.position_layers)] == "1" else "none"
        h = norm(x, f"{at}.self_attn_layer_norm")
        q, k, v = (
            linear(h, f"{at}.self_attn.{name}_proj").view(1, length, heads, -1).transpose(1, 2) for name in "qkv"
        )
        if method in ("rotary", "xpos"):
            q, k = turned(q, method == "xpos"), turned(k, -(method == "xpos"))
        if settings.score_scale == "ssmax":
            q = q * (p[f"{at}.self_attn.score_scale"][:, None] * visible.log())[..., None]
        if settings.score_scale == "log_n" and (method == "none" or "0" not in settings.position_layers):
            q = q * (visible.log() / math.log(settings.training_length)).clamp(min=1)[:, None]
        decay = None
        if method in ("fox", "cable"):
            z = linear(h, f"{at}.self_attn.gate").T[None]
            decay = torch.log(1 / (1 + torch.exp(-z))) if method == "fox" else -torch.log(1 + torch.exp(z))
        out = attention(q, k, v, method, None, window, parameters, decay)[0].transpose(0, 1).reshape(length, width)
        x = x + linear(out, f"{at}.self_attn.out_proj")
        h = norm(x, f"{at}.final_layer_norm")
        x = x + linear(linear(h, f"{at}.fc1").relu(), f"{at}.fc2")
    return norm(x, "layer_norm") @ p["embed_tokens.weight"].T


def encoder_bias(heads, length, form, left=None, right=None):
    """(H, L, L) bias of an encoder, form by form; -inf where a head sees nothing. `left`, `right`: other slopes."""
    if form == "symmetric":
        left = right = slopes(heads)
    elif form == "one_sided":
        half = slopes(heads // 2)
        left, right = half + [math.inf] * len(half), [math.inf] * len(half) + half
    elif left is None:
        pairs = sorted(slopes(2 * heads), reverse=True)
        left, right = pairs[0::2], pairs[1::2]
    after = torch.arange(length) - torch.arange(length)[:, None]  # how far a key lies behind the query
    bias = torch.zeros(heads, length, length, dtype=torch.float64)
    for h in range(heads):
        bias[h][after < 0] = left[h] * after[after < 0].double()
        bias[h][after > 0] = -right[h] * after[after > 0].double()
    return bias


def masked_lm_logits(model, tokens, bias):
    """Logits of a masked language model for one sequence: tokens (L,), bias (H, L, L) -> (L, V). gelu as in RoBERTa.

    Norms are in front of the parts of a layer where the stack ends with one, else behind them. Rotary as in `logits`.
    """
    p = {name.replace("encoder.sentence_encoder.", ""): value.double() for name, value in model.state_dict().items()}
    stack = model.encoder.sentence_encoder
    rotary = type(stack.position_method).__name__ == "Rotary"
    heads, length, pre = stack.layers[0].self_attn.num_heads, len(tokens), "layer_norm.weight" in p

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    x = norm(p["embed_tokens.weight"][tokens], "layernorm_embedding")
    for n in range(len(stack.layers)):
        at = f"layers.{n}"
        h = norm(x, f"{at}.self_attn_layer_norm") if pre else x
        q, k, v = (linear(h, f"{at}.self_attn.{name}_proj").view(length, heads, -1).transpose(0, 1) for name in "qkv")
        if rotary:
            q, k = turned(q), turned(k)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.size(-1)) + bias).softmax(-1)
        out = (weights @ v).transpose(0, 1).reshape(length, -1)
        x = x + linear(out, f"{at}.self_attn.out_proj")
        x = x if pre else norm(x, f"{at}.self_attn_layer_norm")
        h = norm(x, f"{at}.final_layer_norm") if pre else x
        x = x + linear(gelu(linear(h, f"{at}.fc1")), f"{at}.fc2")
        x = x if pre else norm(x, f"{at}.final_layer_norm")
    x = norm(x, "layer_norm") if pre else x
    x = norm(gelu(linear(x, "encoder.lm_head.dense")), "encoder.lm_head.layer_norm")
    return x @ p["embed_tokens.weight"].T + p["encoder.lm_head.bias"]


def translation_logits(model, source, target, way):
    """Logits of an `alibi_transformer` for one pair: source (S,), target as the decoder reads it (T,) -> (T, V).

    Self-attention knows positions on either side, attention to the source does not. `way` is a position method or, for
    ALiBi, the form of the encoder's bias.
    """
    alibi = way in ("symmetric", "one_sided", "two_slopes")
    sides = {
        side: {name[len(side) + 1 :]: x.double() for name, x in model.state_dict().items() if name.startswith(side)}
        for side in ("encoder", "decoder")
    }

    def norm(x, p, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, p, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attend(x, memory, p, name, heads, bias):
        q, k, v = (
            linear(y, p, f"{name}.{projection}_proj").unflatten(-1, (heads, -1)).transpose(0, 1)
            for y, projection in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        if way == "rotary" and "self" in name:
            q, k = turned(q), turned(k)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.size(-1)) + bias).softmax(-1)
        return linear((weights @ v).transpose(0, 1).flatten(1), p, f"{name}.out_proj")

    def run(side, tokens, bias, memory=None):
        p, stack = sides[side], getattr(model, side)
        x = embedded(p, tokens, way)

        def part(x, name, f):  # its norm stands in front of it or behind the residual connection
            before = stack.layers[0].normalize_before
            return x + f(norm(x, p, name)) if before else norm(x + f(x), p, name)

        def layer(x, at, heads):
            x = part(x, f"{at}.self_attn_layer_norm", lambda h: attend(h, h, p, f"{at}.self_attn", heads, bias))
            if memory is not None:
                name = f"{at}.encoder_attn"
                x = part(x, f"{name}_layer_norm", lambda h: attend(h, memory, p, name, heads, 0.0))
            return part(x, f"{at}.final_layer_norm", lambda h: linear(linear(h, p, f"{at}.fc1").relu(), p, f"{at}.fc2"))

        for n in range(len(stack.layers)):
            x = layer(x, f"layers.{n}", stack.layers[n].self_attn.num_heads)
        return norm(x, p, "layer_norm") if "layer_norm.weight" in p else x

    heads = model.encoder.layers[0].self_attn.num_heads
    memory = run("encoder", source, encoder_bias(heads, len(source), way) if alibi else 0.0)
    distance = torch.arange(len(target))[:, None] - torch.arange(len(target))
    m = torch.tensor(slopes(heads) if alibi else [0.0], dtype=torch.float64)[:, None, None]
    features = run("decoder", target, (-m * distance).masked_fill(distance < 0, -math.inf), memory)
    return features @ sides["decoder"]["output_projection.weight"].T
