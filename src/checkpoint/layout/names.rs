//! How families name their tensors, and how they store them: tables, read by the one builder of backbones.

use crate::checkpoint::{Architecture, Naming, Residual};

/// Where a norm stands around one of the two parts of a layer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the input of the part, beside the residual stream.
    Before,
    /// On the output of the part, before it is added.
    Behind,
    /// On the residual stream, after the part was added.
    After,
}

/// How queries, keys and values are stored.
#[derive(Clone, Copy)]
pub enum Qkv {
    Apart([&'static str; 3]),
    /// All queries, then all keys, then all values.
    Stacked(&'static str),
    /// For every key head its queries, its key and its value.
    Grouped(&'static str),
}

/// How the layers of an MLP in front of its last one are stored.
#[derive(Clone, Copy)]
pub enum Inner {
    Apart {
        gate: &'static str,
        up: &'static str,
    },
    /// The gate, then what it gates.
    Stacked(&'static str),
    Single(&'static str),
}

/// The names of one mixture of experts, and of the MLP inside each.
#[derive(Clone, Copy)]
pub struct ExpertNames {
    pub router: &'static str,
    pub experts: &'static str,
    pub inner: Inner,
    pub down: &'static str,
}

/// The names of one naming, behind the prefix that the family has for its backbone. Those of a layer stand behind `LAYERS.N.`.
#[derive(Clone, Copy)]
pub struct Names {
    pub positions: &'static str,
    pub token_types: &'static str,
    pub embedding_norm: &'static str,
    pub embedding_projection: &'static str,
    pub embedding_projection_bias: bool,
    pub layers: &'static str,
    /// Norms of the attention and of the MLP.
    pub norms: [&'static [(Place, &'static str)]; 2],
    pub qkv: Qkv,
    pub qk_norms: [&'static str; 2],
    pub output: &'static str,
    pub inner: Inner,
    pub down: &'static str,
    pub experts: ExpertNames,
    pub final_norm: &'static str,
    pub output_projection: &'static str,
    /// Linear layers are stored with inputs in rows.
    pub transposed: bool,
}

use Place::{After, Before, Behind};

const LLAMA: Names = Names {
    positions: "",
    token_types: "",
    embedding_norm: "",
    embedding_projection: "",
    embedding_projection_bias: false,
    layers: "layers",
    norms: [&[(Before, "input_layernorm")], &[(Before, "post_attention_layernorm")]],
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    output: "self_attn.o_proj",
    inner: Inner::Apart { gate: "mlp.gate_proj", up: "mlp.up_proj" },
    down: "mlp.down_proj",
    experts: ExpertNames {
        router: "mlp.gate",
        experts: "mlp.experts",
        inner: Inner::Apart { gate: "gate_proj", up: "up_proj" },
        down: "down_proj",
    },
    final_norm: "norm",
    output_projection: "",
    transposed: false,
};

const BERT: Names = Names {
    positions: "embeddings.position_embeddings",
    token_types: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    embedding_projection: "embeddings_project",
    embedding_projection_bias: true,
    layers: "encoder.layer",
    norms: [&[(After, "attention.output.LayerNorm")], &[(After, "output.LayerNorm")]],
    qkv: Qkv::Apart(["attention.self.query", "attention.self.key", "attention.self.value"]),
    output: "attention.output.dense",
    inner: Inner::Single("intermediate.dense"),
    down: "output.dense",
    ..LLAMA
};

/// The table of an architecture.
pub fn names(architecture: &Architecture) -> Names {
    match architecture.naming {
        Naming::Llama => Names { norms: llama_norms(architecture.residual), ..LLAMA },
        Naming::Mixtral => Names {
            experts: ExpertNames {
                router: "block_sparse_moe.gate",
                experts: "block_sparse_moe.experts",
                inner: Inner::Apart { gate: "w1", up: "w3" },
                down: "w2",
            },
            ..LLAMA
        },
        Naming::Phi3 => Names { qkv: Qkv::Stacked("self_attn.qkv_proj"), inner: Inner::Stacked("mlp.gate_up_proj"), ..LLAMA },
        Naming::InternLm2 => Names {
            norms: [&[(Before, "attention_norm")], &[(Before, "ffn_norm")]],
            qkv: Qkv::Grouped("attention.wqkv"),
            output: "attention.wo",
            inner: Inner::Apart { gate: "feed_forward.w1", up: "feed_forward.w3" },
            down: "feed_forward.w2",
            ..LLAMA
        },
        Naming::GptNeox => Names {
            qkv: Qkv::Grouped("attention.query_key_value"),
            output: "attention.dense",
            inner: Inner::Single("mlp.dense_h_to_4h"),
            down: "mlp.dense_4h_to_h",
            final_norm: "final_layer_norm",
            ..LLAMA
        },
        Naming::Gpt2 => Names {
            positions: "wpe",
            layers: "h",
            norms: [&[(Before, "ln_1")], &[(Before, "ln_2")]],
            qkv: Qkv::Stacked("attn.c_attn"),
            output: "attn.c_proj",
            inner: Inner::Single("mlp.c_fc"),
            down: "mlp.c_proj",
            final_norm: "ln_f",
            transposed: true,
            ..LLAMA
        },
        Naming::Opt => Names {
            positions: "embed_positions",
            embedding_projection: "project_in",
            norms: if architecture.residual == Residual::PostNorm {
                [&[(After, "self_attn_layer_norm")], &[(After, "final_layer_norm")]]
            } else {
                [&[(Before, "self_attn_layer_norm")], &[(Before, "final_layer_norm")]]
            },
            output: "self_attn.out_proj",
            inner: Inner::Single("fc1"),
            down: "fc2",
            final_norm: "final_layer_norm",
            output_projection: "project_out",
            ..LLAMA
        },
        Naming::Bert => BERT,
        Naming::DistilBert => Names {
            layers: "transformer.layer",
            norms: [&[(After, "sa_layer_norm")], &[(After, "output_layer_norm")]],
            qkv: Qkv::Apart(["attention.q_lin", "attention.k_lin", "attention.v_lin"]),
            output: "attention.out_lin",
            inner: Inner::Single("ffn.lin1"),
            down: "ffn.lin2",
            ..BERT
        },
        Naming::Deberta => Names {
            embedding_projection: "embeddings.embed_proj",
            embedding_projection_bias: false,
            qkv: Qkv::Apart(["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"]),
            ..BERT
        },
        Naming::ModernBert => Names {
            embedding_norm: "embeddings.norm",
            norms: [&[(Before, "attn_norm")], &[(Before, "mlp_norm")]],
            qkv: Qkv::Stacked("attn.Wqkv"),
            output: "attn.Wo",
            inner: Inner::Stacked("mlp.Wi"),
            down: "mlp.Wo",
            final_norm: "final_norm",
            ..LLAMA
        },
    }
}

/// What Llama's norms are called, which depends on where they stand.
fn llama_norms(residual: Residual) -> [&'static [(Place, &'static str)]; 2] {
    match residual {
        Residual::PreNorm | Residual::PostNorm | Residual::Parallel => LLAMA.norms,
        Residual::OutputNorm => [&[(Behind, "post_attention_layernorm")], &[(Behind, "post_feedforward_layernorm")]],
        Residual::Sandwich => [
            &[(Before, "input_layernorm"), (Behind, "post_attention_layernorm")],
            &[(Before, "pre_feedforward_layernorm"), (Behind, "post_feedforward_layernorm")],
        ],
    }
}
