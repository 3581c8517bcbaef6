//! Attention over the forest of a pack in operations of candle, and what it needs on the device, made once for all layers.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use candle_nn::rotary_emb::rope_thd;

use super::plan::{Batch, Sight, Width, batches, fixed_batches, rows_at, tasks};
use crate::checkpoint::Architecture;
use crate::model::apart::Destination;
use crate::model::device::{Backend, FlashKernel};
use crate::model::kernels::attention::Shape;
use crate::model::kernels::rope::Rotation;
use crate::model::pack::Pack;
use crate::model::weights::narrowed;

/// Further away than any two tokens.
const FAR: usize = 1 << 23;

/// Everything about one pack that its layers have in common, on the device.
pub struct PackPlan {
    /// Cosines and sines for every row, by rotary embedding.
    angles: Vec<(Tensor, Tensor)>,
    sights: Vec<(Sight, Way)>,
}

/// How attention of one kind of layer is computed.
enum Way {
    Batches {
        batches: Vec<OnDevice>,
        /// For every row of the pack, its row among the outputs of all batches.
        places: Tensor,
    },
    Flash(Varlen),
}

/// Sequences end to end, as the flash kernels want them.
struct Varlen {
    kernel: FlashKernel,
    /// Rows of the pack that belong to nodes; they come first.
    rows: usize,
    /// The keys of every node's path, node by node; `None` where they are the pack's own rows in their own order.
    keys: Option<Tensor>,
    /// Where the queries and the keys of each node begin, and the end.
    starts: [Tensor; 2],
    /// The most queries and keys of a node.
    longest: [usize; 2],
}

struct OnDevice {
    size: Batch,
    query_rows: Tensor,
    key_rows: Tensor,
    /// `[tasks, 1, 1, queries, keys]`: zero where a query sees a key, else minus infinity.
    mask: Tensor,
    /// `[tasks, 1, queries, keys]`: the embedding of the distance from query to key, and the same turned round.
    distances: Option<[Tensor; 2]>,
}

/// What one layer does with queries and keys before they meet.
#[derive(Default)]
pub struct Heads<'a> {
    /// Weights of the norms on queries and keys, and their eps.
    pub norms: Option<(&'a Tensor, &'a Tensor, f64)>,
    /// Index of the rotary embedding.
    pub rope: Option<usize>,
    pub distances: Option<&'a Embedded>,
}

/// DeBERTa's embeddings of distances as one layer's queries and keys meet them: `[heads, head_dim, embeddings]` each.
#[derive(Debug)]
pub struct Embedded {
    as_keys: Option<Tensor>,
    as_queries: Option<Tensor>,
}

impl Embedded {
    /// Of `[embeddings, heads * head_dim]` each.
    pub fn new(heads: usize, as_keys: Option<&Tensor>, as_queries: Option<&Tensor>) -> Result<Self> {
        let turned = |values: &Tensor| -> Result<Tensor> {
            let (embeddings, width) = values.dims2()?;
            values.to_dtype(DType::F32)?.reshape((embeddings, heads, width / heads))?.permute((1, 2, 0))?.contiguous()
        };
        Ok(Self { as_keys: as_keys.map(turned).transpose()?, as_queries: as_queries.map(turned).transpose()? })
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        Ok(Self { as_keys: to.optional(self.as_keys.as_ref())?, as_queries: to.optional(self.as_queries.as_ref())? })
    }
}

impl PackPlan {
    /// `embeddings` are those of [`crate::model::kernels::distances::embeddings`] for this pack.
    pub fn new(
        architecture: &Architecture,
        pack: &Pack,
        rotations: &[Rotation],
        embeddings: Option<&[u16]>,
        backend: &Backend,
    ) -> Result<Self> {
        let device = &backend.device;
        let angles = rotations.iter().map(|rotation| rotation.angles(pack.positions(), device)).collect::<Result<_>>()?;
        let mut sights: Vec<(Sight, Way)> = Vec::new();
        for layer in &architecture.layers {
            let sight = Sight { causal: architecture.causal, window: layer.window };
            if sights.iter().all(|(known, _)| *known != sight) {
                let way = match backend.flash {
                    Some(kernel) => Way::Flash(Varlen::new(pack, kernel, device)?),
                    None => {
                        let width = Width { heads: architecture.heads, keys: architecture.kv_heads * architecture.head_dim };
                        let batches = match backend.fixed_rows {
                            Some(_) => fixed_batches(pack, width, sight),
                            None => batches(tasks(pack, width.heads, sight), width),
                        };
                        Way::in_batches(pack, batches, sight, embeddings, device)?
                    }
                };
                sights.push((sight, way));
            }
        }
        Ok(Self { angles, sights })
    }

    /// Attention of rows that begin with `[queries | keys | values]`: `[rows, heads * head_dim]`. Rows that belong to no node
    /// are there, and nothing is in them that anybody may read.
    pub fn attend(&self, x: &Tensor, shape: &Shape, heads: &Heads) -> Result<Tensor> {
        let sight = Sight { causal: shape.causal, window: shape.window };
        let Some((_, way)) = self.sights.iter().find(|(known, _)| *known == sight) else {
            candle_core::bail!("the pack was not prepared for {sight:?}");
        };
        let dtype = if matches!(way, Way::Flash(_)) { x.dtype() } else { DType::F32 };
        let rotation = heads.rope.and_then(|rope| self.angles.get(rope));
        // Heads side by side: views of the rows, as long as nothing is to be done with them.
        let all = shape.heads + 2 * shape.kv_heads;
        let x = narrowed(x, all * shape.head_dim)?.reshape((x.dim(0)?, all, shape.head_dim))?;
        let part = |first: usize, count: usize| x.narrow(1, first, count);
        let turned = |first: usize, count: usize, norm: Option<(&Tensor, f64)>| -> Result<Tensor> {
            let x = part(first, count)?;
            if norm.is_none() && rotation.is_none() {
                return x.to_dtype(dtype);
            }
            let mut x = x.to_dtype(DType::F32)?.contiguous()?;
            if let Some((weight, eps)) = norm {
                x = normed(&x, weight, eps)?;
            }
            if let Some((cos, sin)) = rotation {
                x = rotate(&x, cos, sin)?;
            }
            x.to_dtype(dtype)
        };
        let (queries, keys) = match heads.norms {
            Some((query, key, eps)) => {
                (turned(0, shape.heads, Some((query, eps)))?, turned(shape.heads, shape.kv_heads, Some((key, eps)))?)
            }
            // Both are rotated alike, so in one.
            None => {
                let both = turned(0, shape.heads + shape.kv_heads, None)?;
                (both.narrow(1, 0, shape.heads)?, both.narrow(1, shape.heads, shape.kv_heads)?)
            }
        };
        let values = part(shape.heads + shape.kv_heads, shape.kv_heads)?.to_dtype(dtype)?;
        match way {
            Way::Flash(varlen) => varlen.attend(shape, [&queries, &keys, &values]),
            Way::Batches { batches, places } => {
                let [queries, keys, values] = [&queries.contiguous()?, &keys.contiguous()?, &values.contiguous()?];
                let attended = batches.iter().map(|batch| batch.attend(shape, [queries, keys, values], heads.distances));
                let attended = attended.collect::<Result<Vec<_>>>()?;
                Tensor::cat(&attended, 0)?.index_select(places, 0)
            }
        }
    }
}

impl Way {
    fn in_batches(pack: &Pack, batches: Vec<Batch>, sight: Sight, embeddings: Option<&[u16]>, device: &Device) -> Result<Self> {
        let mut places = vec![0u32; pack.ids().len()];
        let mut first = 0;
        let mut placed = Vec::new();
        for batch in batches {
            for (index, task) in batch.tasks.iter().enumerate() {
                for (query, row) in task.queries.clone().enumerate() {
                    places[row] = (first + index * batch.queries + task.slot + query) as u32;
                }
            }
            first += batch.count * batch.queries;
            placed.push(OnDevice::new(pack, batch, sight, embeddings, device)?);
        }
        Ok(Self::Batches { batches: placed, places: Tensor::new(places, device)? })
    }
}

impl OnDevice {
    fn new(pack: &Pack, size: Batch, sight: Sight, embeddings: Option<&[u16]>, device: &Device) -> Result<Self> {
        let (count, queries, keys) = (size.count, size.queries, size.keys);
        let (mut query_rows, mut key_rows) = (Vec::with_capacity(count * queries), Vec::with_capacity(count * keys));
        let (mut query_positions, mut key_positions) = (Vec::with_capacity(count * queries), Vec::with_capacity(count * keys));
        let again = size.tasks.iter().take(1).cycle();
        for task in size.tasks.iter().chain(again).take(count) {
            let rows = rows_at(pack, task.node, task.keys.clone());
            // Places before and behind the task's own queries hold its first.
            let query = |place: usize| place.checked_sub(task.slot).filter(|query| *query < task.queries.len()).unwrap_or(0);
            query_rows.extend((0..queries).map(|place| (task.queries.start + query(place)) as u32));
            query_positions.extend((0..queries).map(|place| task.position + query(place)));
            key_rows.extend((0..keys).map(|key| rows[if key < rows.len() { key } else { 0 }]));
            // What only fills the batch is out of everybody's sight.
            key_positions.extend((0..keys).map(|key| if key < rows.len() { task.keys.start + key } else { 2 * FAR }));
        }
        let distances = embeddings.map(|embeddings| -> Result<[Tensor; 2]> {
            let mut to_keys = Vec::with_capacity(count * queries * keys);
            for (task, at) in query_positions.chunks_exact(queries).zip(key_positions.chunks_exact(keys)) {
                for query in task {
                    let embedding = |key: &usize| u32::from(embeddings[if *key < FAR { key + pack.longest() - 1 - query } else { 0 }]);
                    to_keys.extend(at.iter().map(embedding));
                }
            }
            let to_keys = Tensor::from_vec(to_keys, (count, 1, queries, keys), device)?;
            let to_queries = to_keys.transpose(2, 3)?.contiguous()?;
            Ok([to_keys, to_queries])
        });
        // Below 2^24 every position is a float32 of its own.
        let on_device = |positions: Vec<usize>| positions.into_iter().map(|position| position as f32).collect::<Vec<_>>();
        let query_positions = Tensor::from_vec(on_device(query_positions), (count, 1, 1, queries, 1), device)?;
        let key_positions = Tensor::from_vec(on_device(key_positions), (count, 1, 1, 1, keys), device)?;
        let ahead = query_positions.broadcast_sub(&key_positions)?;
        let window = sight.window.unwrap_or(FAR).min(FAR) as f64;
        let behind = if sight.causal { ahead.ge(0f64)? } else { ahead.gt(-window)? };
        let seen = (behind * ahead.lt(window)?)?;
        let (shown, hidden) = (ahead.zeros_like()?, Tensor::full(f32::NEG_INFINITY, ahead.shape(), device)?);
        Ok(Self {
            query_rows: Tensor::new(query_rows, device)?,
            key_rows: Tensor::new(key_rows, device)?,
            mask: seen.where_cond(&shown, &hidden)?,
            distances: distances.transpose()?,
            size,
        })
    }

    /// `[tasks * queries, heads * head_dim]`.
    fn attend(&self, shape: &Shape, [queries, keys, values]: [&Tensor; 3], embedded: Option<&Embedded>) -> Result<Tensor> {
        let Batch { count, queries: q, keys: k, .. } = &self.size;
        let (count, q, k, dim) = (*count, *q, *k, shape.head_dim);
        let (kv_heads, group) = (shape.kv_heads, shape.heads / shape.kv_heads);
        // The query heads that read one key head stand below each other, so that they meet it in one product.
        let grouped = queries.index_select(&self.query_rows, 0)?.reshape((count, q, kv_heads, group, dim))?;
        let grouped = grouped.permute((0, 2, 3, 1, 4))?.contiguous()?.reshape((count, kv_heads, group * q, dim))?;
        let gather = |x: &Tensor| x.index_select(&self.key_rows, 0)?.reshape((count, k, kv_heads, dim))?.transpose(1, 2)?.contiguous();
        let (keys, values) = (gather(keys)?, gather(values)?);
        let mut scores = grouped.matmul(&keys.t()?)?;
        if let (Some(embedded), Some([to_keys, to_queries])) = (embedded, &self.distances) {
            // Every query head has a key head of its own here.
            let of_distances = |x: &Tensor, embeddings: &Tensor, index: &Tensor| -> Result<Tensor> {
                let products = x.broadcast_matmul(&embeddings.unsqueeze(0)?)?;
                let (_, _, from, to) = index.dims4()?;
                products.gather(&index.broadcast_as((count, kv_heads, from, to))?.contiguous()?, 3)
            };
            if let Some(as_keys) = &embedded.as_keys {
                scores = (scores + of_distances(&grouped, as_keys, to_keys)?)?;
            }
            if let Some(as_queries) = &embedded.as_queries {
                scores = (scores + of_distances(&keys, as_queries, to_queries)?.transpose(2, 3)?)?;
            }
        }
        scores = (scores * f64::from(shape.scale))?;
        if let Some(cap) = shape.softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let scores = scores.reshape((count, kv_heads, group, q, k))?.broadcast_add(&self.mask)?;
        let weights = softmax_last_dim(&scores)?.reshape((count, kv_heads, group * q, k))?;
        let attended = weights.matmul(&values)?.reshape((count, kv_heads, group, q, dim))?;
        attended.permute((0, 3, 1, 2, 4))?.contiguous()?.reshape((count * q, shape.heads * dim))
    }
}

impl Varlen {
    fn new(pack: &Pack, kernel: FlashKernel, device: &Device) -> Result<Self> {
        let (mut keys, mut query_starts, mut key_starts, mut longest) = (Vec::new(), vec![0u32], vec![0u32], [0, 0]);
        for (index, node) in pack.nodes().iter().enumerate() {
            keys.extend(rows_at(pack, index, 0..node.start + node.rows.len()));
            query_starts.push(node.rows.end as u32);
            key_starts.push(keys.len() as u32);
            longest = [longest[0].max(node.rows.len()), longest[1].max(node.start + node.rows.len())];
        }
        let rows = pack.computed_tokens();
        let own = keys.len() == rows && keys.iter().enumerate().all(|(index, key)| index == *key as usize);
        let keys = if own { None } else { Some(Tensor::new(keys, device)?) };
        Ok(Self { kernel, rows, keys, starts: [Tensor::new(query_starts, device)?, Tensor::new(key_starts, device)?], longest })
    }

    fn attend(&self, shape: &Shape, [queries, keys, values]: [&Tensor; 3]) -> Result<Tensor> {
        let all = queries.dim(0)?;
        // The kernel reads heads wherever they stand; only what is gathered must be in one piece.
        let gather = |x: &Tensor| match &self.keys {
            Some(keys) => x.contiguous()?.index_select(keys, 0),
            None => x.narrow(0, 0, self.rows),
        };
        let parts = [&queries.narrow(0, 0, self.rows)?, &gather(keys)?, &gather(values)?];
        // The kernels take a window that is wider than the longest sequence as none, for which they have others. Which of them
        // computes a sample must not follow from the samples beside it.
        let longest = [self.longest[0], self.longest[1].max(shape.window.filter(|window| *window < FAR).unwrap_or(0))];
        let attended = (self.kernel)(shape, parts, &self.starts, longest)?;
        attended.reshape((self.rows, shape.heads * shape.head_dim))?.pad_with_zeros(0, 0, all - self.rows)
    }
}

/// The largest differences between the outputs of a kernel and of batches over a small forest of random rows: of the same
/// rows, and of the rows before they were rounded to `dtype`.
pub fn flash_differences(shape: &Shape, kernel: FlashKernel, device: &Device, dtype: DType) -> Result<[f32; 2]> {
    // A prompt of two completions, a sample by itself, and one that fills more than a block of any kernel.
    let shared =
        if shape.causal { &[(None, 21), (Some(0), 7), (Some(0), 30), (None, 1), (None, 150)][..] } else { &[(None, 33), (None, 150)] };
    let pack = Pack::bare(shared);
    let columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    // Of magnitude one: of larger numbers a right kernel is further from what was not rounded than its bound.
    let exact = Tensor::rand(-1f32, 1f32, (pack.ids().len(), columns), device)?;
    let rounded = exact.to_dtype(dtype)?;
    let sight = Sight { causal: shape.causal, window: shape.window };
    let attend = |x: &Tensor, way: Way| PackPlan { angles: Vec::new(), sights: vec![(sight, way)] }.attend(x, shape, &Heads::default());
    let flash = attend(&rounded, Way::Flash(Varlen::new(&pack, kernel, device)?))?.to_dtype(DType::F32)?;
    let width = Width { heads: shape.heads, keys: shape.kv_heads * shape.head_dim };
    let plain = |x: &Tensor| {
        let in_one = batches(tasks(&pack, shape.heads, sight), width);
        attend(x, Way::in_batches(&pack, in_one, sight, None, device)?)
    };
    let apart = |plain: Tensor| -> Result<f32> {
        let apart = (&flash - plain)?.abs()?.flatten_all()?;
        // A maximum passes over a NaN, a sum does not.
        let sum = apart.sum(0)?.to_scalar::<f32>()?;
        if sum.is_finite() { apart.max(0)?.to_scalar::<f32>() } else { Ok(f32::NAN) }
    };
    Ok([apart(plain(&rounded)?)?, apart(plain(&exact)?)?])
}

/// A root-mean-square norm over every stretch of a row that is as long as the weight.
fn normed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let width = weight.dim(0)?;
    rms_norm(&x.reshape((x.elem_count() / width, width))?, weight, eps as f32)?.reshape(x.shape())
}

/// Rotates the leading dimensions of every head, as many as there are angles for; `[rows, heads, head_dim]`.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (dim, dims) = (x.dim(2)?, 2 * cos.dim(1)?);
    if dims == dim {
        return rope_thd(&x.unsqueeze(0)?, cos, sin)?.squeeze(0);
    }
    let turned = rope_thd(&x.narrow(2, 0, dims)?.contiguous()?.unsqueeze(0)?, cos, sin)?.squeeze(0)?;
    Tensor::cat(&[turned, x.narrow(2, dims, dim - dims)?], 2)
}
