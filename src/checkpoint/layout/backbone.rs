//! The one builder of backbones: from the tables of names, and what the architecture says is there.

use super::names::{Inner, Names, Place, Qkv, names};
use super::{BlockKeys, ConvolutionKeys, DenseKeys, HeadKeys, Layout, LinearKeys, MlpKeys, NormKeys, PartNorms, RelativeKeys, Rows, Taker};
use crate::checkpoint::names::BackboneNames;
use crate::checkpoint::{Architecture, Disentangled, Norm, ProjectionPlace, QkNorm, Residual};

/// Everything but the head.
pub(super) fn backbone(architecture: &Architecture, taker: &mut Taker) -> Layout {
    let names = names(architecture);
    // Whatever a checkpoint was saved from, its names have become those of the family's classifier when it was opened.
    let family = BackboneNames::of(&architecture.model_type);
    Builder { architecture, names, family, taker }.build()
}

struct Builder<'a, 't, 'm> {
    architecture: &'a Architecture,
    names: Names,
    family: BackboneNames,
    taker: &'t mut Taker<'m>,
}

impl Builder<'_, '_, '_> {
    fn build(mut self) -> Layout {
        let (architecture, names) = (self.architecture, self.names);
        let (hidden, narrow) = (architecture.hidden_size, architecture.embedding_size());
        // What stands in front of the projection is as narrow as the token table.
        let (tables, norm) = match architecture.embedding_projection.map(|projection| projection.place) {
            None | Some(ProjectionPlace::BeforePositions) => (hidden, hidden),
            Some(ProjectionPlace::BeforeNorm) => (narrow, hidden),
            Some(ProjectionPlace::AfterNorm) => (narrow, narrow),
        };
        let embedding = self.table(self.family.tokens(), architecture.vocab_size, narrow);
        let positions = architecture.positions.as_ref().map(|table| self.table(names.positions, table.rows, tables));
        let segments = architecture.token_types;
        let token_types = (segments > 0).then(|| self.table(names.token_types, segments, tables));
        let projected = architecture.embedding_projection.is_some();
        let embedding_projection =
            projected.then(|| self.whole(names.embedding_projection, narrow, hidden, names.embedding_projection_bias));
        let embedding_norm = architecture.embedding_norm.then(|| self.norm(names.embedding_norm, norm));
        let relative = architecture.disentangled.as_ref().map(|disentangled| self.relative(disentangled));
        let convolution = architecture.convolution.map(|convolution| self.convolution(convolution.kernel));
        let blocks = (0..architecture.layers.len()).map(|layer| self.block(layer)).collect();
        let final_norm = architecture.final_norm.then(|| self.norm(names.final_norm, hidden));
        let outputs = architecture.output_size();
        let output_projection = (outputs != hidden).then(|| self.whole(names.output_projection, hidden, outputs, false));
        Layout {
            embedding,
            positions,
            token_types,
            embedding_projection,
            embedding_norm,
            relative,
            convolution,
            blocks,
            final_norm,
            output_projection,
            head: HeadKeys::default(),
            used: Vec::new(),
            unused: Vec::new(),
        }
    }

    fn block(&mut self, layer: usize) -> BlockKeys {
        let (architecture, names) = (self.architecture, self.names);
        let at = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let [query, key, value] = self.qkv(&at);
        let qk_norm = |builder: &mut Self, name: &str, width: usize| {
            let width = |over| if over == QkNorm::Head { architecture.head_dim } else { width };
            architecture.qk_norm.map(|over| builder.norm(&at(name), width(over)))
        };
        let (query_width, [query_name, key_name]) = (query.outputs, names.qk_norms);
        // A norm on the embedding is the first layer's as well.
        let bare = layer == 0 && architecture.embedding_norm && architecture.residual == Residual::PreNorm;
        BlockKeys {
            attention_norms: if bare { PartNorms::default() } else { self.norms(names.norms[0], &at) },
            query_norm: qk_norm(self, query_name, query_width),
            key_norm: qk_norm(self, key_name, key.outputs),
            query,
            key,
            value,
            position_projections: self.position_projections(&at),
            output: self.whole(&at(names.output), query_width, architecture.hidden_size, architecture.output_bias),
            mlp_norms: self.norms(names.norms[1], &at),
            mlp: self.mlp(layer, &at),
        }
    }

    fn norms(&mut self, norms: &[(Place, &str)], at: &impl Fn(&str) -> String) -> PartNorms {
        let hidden = self.architecture.hidden_size;
        let mut norm = |place: Place| {
            let name = norms.iter().find(|(found, _)| *found == place);
            name.map(|(_, name)| self.norm(&at(name), hidden))
        };
        PartNorms { before: norm(Place::Before), behind: norm(Place::Behind), after: norm(Place::After) }
    }

    fn qkv(&mut self, at: &impl Fn(&str) -> String) -> [LinearKeys; 3] {
        let architecture = self.architecture;
        let (dim, heads, kv_heads) = (architecture.head_dim, architecture.heads, architecture.kv_heads);
        let (hidden, bias, widths) = (architecture.hidden_size, architecture.qkv_bias, [heads * dim, kv_heads * dim, kv_heads * dim]);
        match self.names.qkv {
            Qkv::Apart(names) => {
                let [query, key, value] = names;
                [(query, widths[0]), (key, widths[1]), (value, widths[2])].map(|(name, width)| self.whole(&at(name), hidden, width, bias))
            }
            Qkv::Stacked(name) => {
                let firsts = [0, widths[0], widths[0] + widths[1]];
                [0, 1, 2].map(|part| {
                    let rows = Rows { first: firsts[part], run: widths[part], stride: 0 };
                    self.part(&at(name), hidden, widths.iter().sum(), rows, widths[part], bias)
                })
            }
            Qkv::Grouped(name) => {
                let queries = heads / kv_heads * dim;
                let stride = queries + 2 * dim;
                let runs = [(0, queries), (queries, dim), (queries + dim, dim)];
                [0, 1, 2].map(|part| {
                    let rows = Rows { first: runs[part].0, run: runs[part].1, stride };
                    self.part(&at(name), hidden, kv_heads * stride, rows, widths[part], bias)
                })
            }
        }
    }

    fn mlp(&mut self, layer: usize, at: &impl Fn(&str) -> String) -> MlpKeys {
        let (architecture, names) = (self.architecture, self.names);
        let experts = architecture.experts.as_ref().filter(|_| architecture.layers[layer].experts);
        let Some(experts) = experts else {
            return MlpKeys::Dense(self.dense(names.inner, names.down, architecture.intermediate_size, at));
        };
        let router = self.whole(&at(names.experts.router), architecture.hidden_size, experts.count, false);
        let expert = |builder: &mut Self, expert: usize| {
            let at = |part: &str| at(&format!("{}.{expert}.{part}", names.experts.experts));
            builder.dense(names.experts.inner, names.experts.down, experts.intermediate_size, &at)
        };
        MlpKeys::Experts { router, experts: (0..experts.count).map(|index| expert(self, index)).collect() }
    }

    fn dense(&mut self, inner: Inner, down: &str, width: usize, at: &impl Fn(&str) -> String) -> DenseKeys {
        let (hidden, bias) = (self.architecture.hidden_size, self.architecture.mlp_bias);
        let (gate, up) = match inner {
            Inner::Single(up) => (None, self.whole(&at(up), hidden, width, bias)),
            Inner::Apart { gate, up } => (Some(self.whole(&at(gate), hidden, width, bias)), self.whole(&at(up), hidden, width, bias)),
            Inner::Stacked(name) => {
                let [gate, up] = [0, width].map(|first| {
                    let rows = Rows { first, run: width, stride: 0 };
                    self.part(&at(name), hidden, 2 * width, rows, width, bias)
                });
                (Some(gate), up)
            }
        };
        DenseKeys { gate, up, down: self.whole(&at(down), width, hidden, bias) }
    }

    /// DeBERTa's embeddings of distances.
    fn relative(&mut self, disentangled: &Disentangled) -> RelativeKeys {
        let hidden = self.architecture.hidden_size;
        RelativeKeys {
            embeddings: self.table("encoder.rel_embeddings", 2 * disentangled.span, hidden),
            norm: disentangled.norm.then(|| self.norm("encoder.LayerNorm", hidden)),
        }
    }

    fn convolution(&mut self, kernel: usize) -> ConvolutionKeys {
        let hidden = self.architecture.hidden_size;
        let mut tensor =
            |part: &str, shape: &[usize]| self.taker.tensor(format!("{}encoder.conv.conv.{part}", self.family.prefix()), shape);
        let (weight, bias) = (tensor("weight", &[hidden, hidden, kernel]), tensor("bias", &[hidden]));
        let linear = LinearKeys::plain(weight, Some(bias), hidden * kernel, hidden);
        ConvolutionKeys { linear, norm: self.norm("encoder.conv.LayerNorm", hidden) }
    }

    /// The layer's own projections of the embeddings of distances: to keys, which queries meet, and to queries.
    fn position_projections(&mut self, at: &impl Fn(&str) -> String) -> [Option<LinearKeys>; 2] {
        let architecture = self.architecture;
        let (hidden, width) = (architecture.hidden_size, architecture.heads * architecture.head_dim);
        let Some(disentangled) = architecture.disentangled.as_ref().filter(|disentangled| !disentangled.shared_projections) else {
            return [None, None];
        };
        let kinds = [
            (disentangled.content_to_position, "attention.self.pos_key_proj"),
            (disentangled.position_to_content, "attention.self.pos_query_proj"),
        ];
        kinds.map(|(there, name)| there.then(|| self.whole(&at(name), hidden, width, true)))
    }

    fn table(&mut self, name: &str, rows: usize, columns: usize) -> String {
        self.taker.tensor(format!("{}{name}.weight", self.family.prefix()), &[rows, columns])
    }

    fn norm(&mut self, name: &str, width: usize) -> NormKeys {
        let architecture = self.architecture;
        let bias = architecture.norm_bias && matches!(architecture.norm, Norm::Layer { .. });
        let mut tensor = |part: &str| self.taker.tensor(format!("{}{name}.{part}", self.family.prefix()), &[width]);
        NormKeys { weight: tensor("weight"), bias: bias.then(|| tensor("bias")), from_one: architecture.norm_from_one }
    }

    /// A linear layer that is a whole stored matrix.
    fn whole(&mut self, name: &str, inputs: usize, outputs: usize, bias: bool) -> LinearKeys {
        self.part(name, inputs, outputs, Rows::all(outputs), outputs, bias)
    }

    /// A linear layer that is some of the `stored` rows of a matrix.
    fn part(&mut self, name: &str, inputs: usize, stored: usize, rows: Rows, outputs: usize, bias: bool) -> LinearKeys {
        let transposed = self.names.transposed;
        let shape = if transposed { [inputs, stored] } else { [stored, inputs] };
        let mut tensor = |part: &str, shape: &[usize]| self.taker.tensor(format!("{}{name}.{part}", self.family.prefix()), shape);
        LinearKeys {
            weight: tensor("weight", &shape),
            bias: bias.then(|| tensor("bias", &[stored])),
            inputs,
            outputs,
            rows,
            transposed: transposed.then_some(stored),
        }
    }
}
