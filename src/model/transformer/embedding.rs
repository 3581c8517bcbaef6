//! From tokens to the first hidden states.

use candle_core::{DType, Device, Result, Tensor};

use super::super::LoadError;
use super::super::apart::Destination;
use super::super::ops::Ops;
use super::super::pack::Pack;
use super::super::weights::{Linear, Loader, NormWeights, Table};
use crate::checkpoint::{Architecture, Layout, Positions, ProjectionPlace};

#[derive(Debug)]
pub struct Embedding {
    tokens: Table,
    positions: Option<Tensor>,
    token_types: Option<Tensor>,
    projection: Option<Linear>,
    norm: Option<NormWeights>,
    ops: Ops,
}

/// Rows of the embedding's tables, on the device.
#[derive(Debug)]
pub struct Rows {
    ids: Tensor,
    types: Option<Tensor>,
    positions: Option<Tensor>,
}

impl Embedding {
    pub fn load(architecture: &Architecture, layout: &Layout, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        let optional = |loader: &mut Loader, name: Option<&String>| name.map(|name| loader.tensor(name)).transpose();
        Ok(Self {
            tokens: loader.table(&layout.embedding, architecture.embedding_scale)?,
            positions: optional(loader, layout.positions.as_ref())?,
            token_types: optional(loader, layout.token_types.as_ref())?,
            projection: layout.embedding_projection.as_ref().map(|keys| loader.fused(&[keys])).transpose()?,
            norm: loader.optional_norm(layout.embedding_norm.as_ref())?,
            ops: loader.backend().ops,
        })
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        Ok(Self {
            tokens: self.tokens.on(to)?,
            positions: to.optional(self.positions.as_ref())?,
            token_types: to.optional(self.token_types.as_ref())?,
            projection: self.projection.as_ref().map(|projection| projection.on(to)).transpose()?,
            norm: self.norm.as_ref().map(|norm| norm.on(to)).transpose()?,
            ops: self.ops,
        })
    }

    /// Which rows of its tables a pack reads.
    pub fn rows(&self, architecture: &Architecture, pack: &Pack, device: &Device) -> Result<Rows> {
        let types = self.token_types.as_ref().map(|_| Tensor::new(pack.type_ids(), device)).transpose()?;
        let positions = self.positions.as_ref().and(architecture.positions.as_ref());
        let positions = positions.map(|positions| Tensor::new(position_rows(positions, pack), device)).transpose()?;
        Ok(Rows { ids: Tensor::new(pack.ids(), device)?, types, positions })
    }

    /// Of the tokens of the pack that has these rows.
    pub fn embed(&self, architecture: &Architecture, rows: &Rows) -> Result<Tensor> {
        let project = |x: Tensor, place: ProjectionPlace| match &self.projection {
            Some(projection) if architecture.embedding_projection.is_some_and(|known| known.place == place) => {
                projection.forward_narrow(&x)
            }
            _ => Ok(x),
        };
        // The residual stream is in float32, whatever the tables are in.
        let mut x = project(self.tokens.select(&rows.ids)?, ProjectionPlace::BeforePositions)?.to_dtype(DType::F32)?;
        for (table, rows) in [(&self.token_types, &rows.types), (&self.positions, &rows.positions)] {
            if let (Some(table), Some(rows)) = (table, rows) {
                x = self.ops.add(x, &table.index_select(rows, 0)?)?;
            }
        }
        x = project(x, ProjectionPlace::BeforeNorm)?;
        if let Some(norm) = &self.norm {
            x = norm.apply(architecture.norm, &x)?;
        }
        project(x, ProjectionPlace::AfterNorm)?.to_dtype(DType::F32)
    }
}

/// The row of the position table for every row of the pack.
fn position_rows(positions: &Positions, pack: &Pack) -> Vec<u32> {
    let first = positions.first as u32;
    let mut rows: Vec<u32> = pack.positions().iter().map(|position| position + first).collect();
    let Some(skipped) = positions.skips else { return rows };
    for sample in 0..pack.len() {
        let mut next = first;
        for row in pack.path(pack.leaf(sample)).into_iter().flatten() {
            let counts = pack.ids()[row] != skipped;
            rows[row] = if counts { next } else { skipped };
            next += u32::from(counts);
        }
    }
    rows
}

/// DeBERTa's embeddings of distances, normed: `[embeddings, width]`.
pub fn relative(architecture: &Architecture, layout: &Layout, loader: &mut Loader) -> std::result::Result<Option<Tensor>, LoadError> {
    let Some(keys) = &layout.relative else { return Ok(None) };
    let embeddings = loader.tensor(&keys.embeddings)?;
    let norm = loader.optional_norm(keys.norm.as_ref())?;
    loader.settle()?;
    Ok(Some(match norm {
        Some(norm) => norm.apply(architecture.norm, &embeddings)?,
        None => embeddings,
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::text::Encoding;

    #[test]
    fn positions_begin_where_the_table_says_and_skip_what_it_skips() {
        let encodings = [vec![5, 1, 6], vec![7, 8]].map(|ids| Arc::new(Encoding::for_test(ids)));
        let pack = Pack::new(&encodings);
        let positions = |first, skips| position_rows(&Positions { rows: 16, first, skips }, &pack);
        assert_eq!(positions(0, None), [0, 1, 2, 0, 1]);
        assert_eq!(positions(2, None), [2, 3, 4, 2, 3]);
        assert_eq!(positions(2, Some(1)), [2, 1, 3, 2, 3]);
    }
}
