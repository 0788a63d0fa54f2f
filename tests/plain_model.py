"""Eagle and Finch from their equations, one token and one sequence at a time: what the models are tested against.

Nothing here comes from rwkv_ext: no module, no op, no helper. `p` maps .pth names to tensors (fp64 in the tests); a
state is a list of [att_shift [D], S [H, N(key), N(value)], ffn_shift [D]] per layer. Gradients come from autograd.
"""

import torch

LN_EPS = 1e-5
HEAD_EPS = 64e-5


def layer_norm(x, p, name):
    mean = x.mean()
    variance = ((x - mean) ** 2).mean()
    return (x - mean) / (variance + LN_EPS) ** 0.5 * p[name + ".weight"] + p[name + ".bias"]


def time_mix(p, name, h, previous, state):
    heads, size = p[name + "time_faaaa"].shape
    if name + "time_mix_k" in p:
        mixed = {}
        for c in "kvrg":
            weight = p[f"{name}time_mix_{c}"].reshape(-1)
            mixed[c] = weight * h + (1 - weight) * previous
        omega = p[name + "time_decay"].reshape(-1)
    else:
        d = previous - h
        z = torch.tanh((h + d * p[name + "time_maa_x"].reshape(-1)) @ p[name + "time_maa_w1"])
        rank = z.numel() // 5
        mixed = {}
        for index, c in enumerate("wkvrg"):
            m = z[index * rank : (index + 1) * rank] @ p[name + "time_maa_w2"][index]
            mixed[c] = h + d * (p[f"{name}time_maa_{c}"].reshape(-1) + m)
        low = torch.tanh(mixed["w"] @ p[name + "time_decay_w1"]) @ p[name + "time_decay_w2"]
        omega = p[name + "time_decay"].reshape(-1) + low
    r, k, v, g = (
        p[f"{name}{matrix}.weight"] @ mixed[c]
        for c, matrix in (("r", "receptance"), ("k", "key"), ("v", "value"), ("g", "gate"))
    )
    decay = torch.exp(-torch.exp(omega))
    y, new_state = [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        kv = torch.outer(k[part], v[part])
        out = r[part] @ (p[name + "time_faaaa"][head][:, None] * kv + state[head])
        new_state.append(decay[part][:, None] * state[head] + kv)
        mean = out.mean()
        y.append((out - mean) / (((out - mean) ** 2).mean() + HEAD_EPS) ** 0.5)
    y = torch.cat(y) * p[name + "ln_x.weight"] + p[name + "ln_x.bias"]
    return p[name + "output.weight"] @ (y * g / (1 + torch.exp(-g))), torch.stack(new_state)


def channel_mix(p, name, h, previous):
    mixed = []
    for c in "kr":
        if name + "time_mix_k" in p:
            weight = p[f"{name}time_mix_{c}"].reshape(-1)
            mixed.append(weight * h + (1 - weight) * previous)
        else:
            mixed.append(h + (previous - h) * p[f"{name}time_maa_{c}"].reshape(-1))
    k = torch.clamp(p[name + "key.weight"] @ mixed[0], min=0) ** 2
    r = p[name + "receptance.weight"] @ mixed[1]
    return (p[name + "value.weight"] @ k) / (1 + torch.exp(-r))


def forward(p, tokens, state=None):
    """Return (logits [T, V], state) for one list of token ids."""
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    heads, size = p["blocks.0.att.time_faaaa"].shape
    zero = torch.zeros_like(p["ln_out.weight"])
    if state is None:
        state = [[zero, zero.new_zeros(heads, size, size), zero] for _ in range(layers)]
    state = [list(layer) for layer in state]
    logits = []
    for token in tokens:
        x = layer_norm(p["emb.weight"][token], p, "blocks.0.ln0")
        for layer in range(layers):
            name = f"blocks.{layer}."
            h = layer_norm(x, p, name + "ln1")
            out, state[layer][1] = time_mix(p, name + "att.", h, state[layer][0], state[layer][1])
            state[layer][0] = h
            x = x + out
            h = layer_norm(x, p, name + "ln2")
            x = x + channel_mix(p, name + "ffn.", h, state[layer][2])
            state[layer][2] = h
        logits.append(p["head.weight"] @ layer_norm(x, p, "ln_out"))
    return torch.stack(logits), state
