"""Is a result right? One head of it against the op in fp64, which itself is checked against the plain loop."""

import torch

from rwkv_ext import ops, reference
from rwkv_ext.testing import WkvInputs, error_ratio

OPS = {"5.2": ops.wkv5, "6.0": ops.wkv6}
REFERENCES = {"5.2": reference.wkv5, "6.0": reference.wkv6}
OUTPUTS = ("y", "dr", "dk", "dv", "dw", "du")
LOOP_TOKENS = 96
# Twice the rms error of rounding normal numbers to the activations' dtype; fp32 arithmetic over thousands of tokens.
ALLOWED = {torch.bfloat16: 2 * 0.212 * 2**-7, torch.float16: 2 * 0.212 * 2**-10, torch.float32: 1e-5}


class Expected:
    """The fp64 truth for one head of inputs and of a gradient dy."""

    def __init__(self, version: str, inputs: WkvInputs, dy: torch.Tensor):
        self.version, self.head = version, inputs.r.shape[2] - 1
        one = slice(self.head, self.head + 1)
        r, k, v = (x[:, :, one].double() for x in inputs[:3])
        w = (inputs.w[one] if version == "5.2" else inputs.w[:, :, one]).double()
        head = WkvInputs(r, k, v, w, inputs.u[one].double(), None, inputs.cu_seqlens)
        self._check_fp64(head, dy[:, :, one].double())
        self.values = gradients_of(OPS[version], head, dy[:, :, one].double())

    def _check_fp64(self, head, dy):
        """The op in fp64 equals the plain loop on the first tokens, whose y does not see the others."""
        short = head._replace(**{x: getattr(head, x)[:1, :LOOP_TOKENS] for x in "rkv"}, cu_seqlens=None)
        if self.version == "6.0":
            short = short._replace(w=head.w[:1, :LOOP_TOKENS])
        both = [gradients_of(table[self.version], short, dy[:1, :LOOP_TOKENS]) for table in (OPS, REFERENCES)]
        worst = max(error_ratio(both[0][name], both[1][name]) for name in OUTPUTS)
        if not worst < 1e-11:
            raise SystemExit(f"bench_gpu: the fp64 op itself is wrong: error {worst:.1e} against the loop; no times")

    def errors(self, results: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return name -> relative rms error of this head of the results, which may lack some names."""
        found = {}
        for name, x in results.items():
            axis = 0 if x.dim() == 2 else 2
            found[name] = error_ratio(x.narrow(axis, self.head, 1).double(), self.values[name])
        return found


def gradients_of(op, inputs: WkvInputs, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs[:5]]
    y, _ = op(*leaves, None, inputs.cu_seqlens)
    return dict(zip(OUTPUTS, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def step_errors(version: str, inputs: WkvInputs, state: torch.Tensor) -> dict[str, float]:
    """Errors of one decoding step for every row and head."""
    token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
    after = state.clone()
    y = {"5.2": ops.wkv5_step, "6.0": ops.wkv6_step}[version](*token, inputs.u, after)
    rows = slice(-8, None)  # the loop in fp64 needs eight times the memory
    w = inputs.w if version == "5.2" else inputs.w[rows]
    few = [x[rows].double() for x in inputs[:3]]
    y64, state64 = REFERENCES[version](*few, w.double(), inputs.u.double(), state[rows].double())
    return {"y": error_ratio(y[rows], y64[:, 0]), "state": error_ratio(after[rows], state64)}
