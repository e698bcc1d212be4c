import cmath
import math

import pytest
import torch

from mom_train.config.model import ModelConfig
from mom_train.model import attention, language_model
from mom_train.model.attention import TransformerBlock, attention_mask, block_mask
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout

M, D, HEADS = 3, 32, 2
MOT = ("attention", "feed_forward", "norm")


def config(decoupled=MOT, layers=1, qk_norm=False):
    kind = {"architecture": "transformer", "heads": HEADS, "qk_norm": qk_norm}
    return ModelConfig(**kind, dim=D, layers=layers, decoupled=decoupled)


def model(decoupled=MOT, layers=1, qk_norm=False):
    m = LanguageModel(config(decoupled, layers, qk_norm), 96, M)
    initialize(m, 0)
    with torch.no_grad():  # scales that differ, or a norm with the wrong modality's scale would go unseen
        for name, p in m.named_parameters():
            if "norm" in name:
                p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    return m


def rows(B=2, L=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    modality = torch.randint(0, M, (B, L), generator=g)
    modality[modality == 2] = 0
    document = (torch.rand(B, L, generator=g) < 0.15).cumsum(1).to(torch.int32)
    picture = torch.full((B, L), -1, dtype=torch.int32)
    picture[0, 3:7], picture[0, 9:12], picture[1, 2:6] = 0, 1, 2
    document[0, 3:7], document[0, 9:12], document[1, 2:6] = document[0, 3], document[0, 9], document[1, 2]
    document = document.cummax(1).values
    return modality.to(torch.uint8), document, picture


def reference(block: TransformerBlock, x, modality, document, picture):
    """Attention for one query at a time, in float64, with RoPE by complex numbers."""
    w = {n: p.detach().double().requires_grad_() for n, p in block.named_parameters()}
    hidden, head = block.feed_forward.down_proj.weight.shape[1], D // HEADS

    def matrix(name, m, outputs):
        weight = w[f"{name}.weight"]
        return weight.view(-1, outputs, weight.shape[1])[m if weight.shape[0] > outputs else 0]

    def normed(name, v, m):
        if f"{name}.weight" not in w:  # without QK-norm
            return v
        weight = w[f"{name}.weight"].view(-1, len(v))
        return v / torch.sqrt((v * v).mean() + 1e-5) * weight[m if weight.shape[0] > 1 else 0]

    def turned(v, t):
        pairs = [cmath.exp(1j * t * 10000.0 ** (-i / (head // 2))) for i in range(head // 2)]
        z = torch.complex(v[: head // 2], v[head // 2 :]) * torch.tensor(pairs, dtype=torch.complex128)
        return torch.cat([z.real, z.imag])

    out = []
    for b in range(x.shape[0]):
        L = x.shape[1]
        m = [int(modality[b, t]) for t in range(L)]
        qkv = [matrix("attention.qkv_proj", m[t], 3 * D) @ normed("attention_norm", x[b, t], m[t]) for t in range(L)]
        for t in range(L):
            heads = []
            for h in range(HEADS):
                at = slice(h * head, (h + 1) * head)
                q = turned(normed("attention.q_norm", qkv[t][:D][at], m[t]), t)
                seen = [
                    s
                    for s in range(L)
                    if document[b, s] == document[b, t]
                    and (s <= t or (picture[b, t] >= 0 and picture[b, s] == picture[b, t]))
                ]
                keys = [turned(normed("attention.k_norm", qkv[s][D : 2 * D][at], m[s]), s) for s in seen]
                scores = torch.stack([q @ k / math.sqrt(head) for k in keys])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                heads.append(sum(a * qkv[s][2 * D :][at] for a, s in zip(weights, seen, strict=True)))
            y = x[b, t] + matrix("attention.out_proj", m[t], D) @ torch.cat(heads)
            gate_up = matrix("feed_forward.gate_up_proj", m[t], 2 * hidden) @ normed("feed_forward_norm", y, m[t])
            inner = gate_up[:hidden] * torch.sigmoid(gate_up[:hidden]) * gate_up[hidden:]
            out.append(y + matrix("feed_forward.down_proj", m[t], D) @ inner)
    return torch.stack(out).view_as(x), w


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("decoupled", [(), MOT, ("attention",), ("feed_forward", "norm")])
def test_the_block_equals_the_float64_definition_outputs_and_gradients(decoupled, qk_norm):
    block = model(decoupled, qk_norm=qk_norm).blocks[0].block
    modality, document, picture = rows()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 14, D, generator=g, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(2, 14, D, generator=g, dtype=torch.float64)
    expected, weights = reference(block, x, modality, document, picture)
    expected_grads = torch.autograd.grad(expected, [x, *weights.values()], gy)
    layout = RowLayout.sort(modality, document, M, picture_BL=picture)
    ours = x.detach().float().view(28, D)[layout.rows].requires_grad_()
    y = block(ours, layout, None, attention_mask(layout))
    order = layout.order.long()
    assert (y.detach()[order].view(2, 14, D) - expected).abs().max() < 1e-5
    grads = torch.autograd.grad(y, [ours, *block.parameters()], gy.view(28, D)[layout.rows].float())
    assert (grads[0][order].view(2, 14, D) - expected_grads[0]).abs().max() < 2e-5
    for name, a, b in zip(weights, grads[1:], expected_grads[1:], strict=True):
        assert (a - b).abs().max() / b.abs().max().clamp_min(1) < 1e-5, name


def test_with_qk_norm_it_is_the_qwen3_of_transformers():
    """Qwen3 norms queries and keys in each head, with weights that the heads share, before the same rotation."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours = model((), layers=2, qk_norm=True).eval()
    shape = {"hidden_size": D, "intermediate_size": ours.config.feed_forward, "head_dim": D // HEADS}
    depth = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = Qwen3Config(vocab_size=96, **shape, **depth, rms_norm_eps=1e-5, tie_word_embeddings=False)
    theirs = Qwen3ForCausalLM(config).eval()
    w = {name: p.detach() for name, p in ours.named_parameters()}
    taken = {"model.embed_tokens": w["embedding.weight"], "model.norm": w["norm.weight"], "lm_head": w["head.weight"]}
    for i in range(2):
        block, layer = f"blocks.{i}.block.", f"model.layers.{i}."
        q, k, v = w[block + "attention.qkv_proj.weight"].split(D)
        gate, up = w[block + "feed_forward.gate_up_proj.weight"].chunk(2)
        taken |= {
            layer + "self_attn.q_proj": q, layer + "self_attn.k_proj": k, layer + "self_attn.v_proj": v,
            layer + "self_attn.o_proj": w[block + "attention.out_proj.weight"],
            layer + "self_attn.q_norm": w[block + "attention.q_norm.weight"],
            layer + "self_attn.k_norm": w[block + "attention.k_norm.weight"],
            layer + "mlp.gate_proj": gate, layer + "mlp.up_proj": up,
            layer + "mlp.down_proj": w[block + "feed_forward.down_proj.weight"],
            layer + "input_layernorm": w[block + "attention_norm.weight"],
            layer + "post_attention_layernorm": w[block + "feed_forward_norm.weight"],
        }  # fmt: skip
    theirs.load_state_dict({f"{name}.weight": value for name, value in taken.items()})
    tokens = torch.arange(28) * 5 % 96
    zeros = torch.zeros(1, 28)
    layout = RowLayout.sort(zeros.to(torch.uint8), zeros.to(torch.int32), M)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, layout)[0], theirs(tokens[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equal_weights_for_every_modality_are_the_dense_transformer(qk_norm):
    modality, document, _ = rows()
    layout = RowLayout.sort(modality, document, M)
    mixture, dense = model(qk_norm=qk_norm), model((), qk_norm=qk_norm)
    with torch.no_grad():
        plain = dict(dense.named_parameters())
        for name, p in mixture.named_parameters():
            p.copy_(plain[name].repeat(p.shape[0] // plain[name].shape[0], *[1] * (p.dim() - 1)))
    tokens = torch.arange(28) % 96
    torch.testing.assert_close(mixture(tokens, layout)[0], dense(tokens, layout)[0], atol=2e-6, rtol=0)


def test_nothing_leaks_from_another_document():
    modality, document, picture = rows()
    layout = RowLayout.sort(modality, document, M, picture_BL=picture)
    m = model(layers=2)
    tokens = torch.arange(28) % 96
    before = m(tokens[layout.rows], layout)[0][layout.order.long()].view(2, 14, -1)
    first = document[1] == document[1, 0]
    assert 0 < int(first.sum()) < 14
    changed = tokens.view(2, 14).clone()
    changed[1, first] += 5
    after = m(changed.view(-1)[layout.rows], layout)[0][layout.order.long()].view(2, 14, -1)
    torch.testing.assert_close(after[1, ~first], before[1, ~first], rtol=0, atol=1e-6)
    assert (after[1, first] - before[1, first]).abs().max() > 1e-3


def test_the_block_mask_is_compiled_once_and_allows_what_the_dense_mask_allows(monkeypatch):
    import torch._dynamo.testing
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(attention, "_create_block_mask", lambda: torch.compile(create_block_mask, backend=counter))
    compiled = []
    for seed in range(3):
        modality, document, picture = rows(L=300, seed=seed)  # three blocks, the last one ragged
        document = (document + torch.arange(300) // 140).to(
            torch.int32
        )  # so that a document ends, and blocks are empty
        layout = RowLayout.sort(modality, document, M, picture_BL=picture)
        dense = attention_mask(layout)
        ours = block_mask(document, picture)
        assert torch.equal(create_mask(ours.mask_mod, 2, 1, 300, 300, device="cpu"), dense)
        padded = torch.zeros(2, 1, 384, 384, dtype=torch.bool)
        padded[:, :, :300, :300] = dense
        assert torch.equal(ours.to_dense().bool(), padded.view(2, 1, 3, 128, 3, 128).any(5).any(3))
        assert not ours.to_dense().bool().all(), "some block is empty, or the test shows nothing"
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled == compiled[:1] * 3, "compiled again for other documents"


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_the_mask_is_made_once_a_batch_whatever_the_layers_and_recomputation(recompute, monkeypatch):
    m = LanguageModel(config(layers=3), 96, M, recompute=recompute)
    initialize(m, 0)
    made = []
    monkeypatch.setattr(language_model, "attention_mask", lambda *a: made.append(a) or attention_mask(*a))
    modality, document, _ = rows()
    layout = RowLayout.sort(modality, document, M)
    m(torch.arange(28) % 96, layout, torch.arange(28) % 96).tokens.backward()
    assert len(made) == 1
