//! A sequence on its way from text to ids.

use super::tokenizer::Piece;

/// A sequence before its length is settled: what is fixed, and one or two bodies that may be cut.
pub(super) struct Draft {
    pub pieces: Vec<Piece>,
    pub first: Vec<u32>,
    pub second: Vec<u32>,
    pub rendered: Option<String>,
    pub doubled_bos: bool,
    pub notes: Vec<String>,
}

impl Draft {
    pub fn specials(&self) -> usize {
        self.pieces.iter().filter(|piece| piece.is_special()).count()
    }

    pub fn tokens(&self) -> usize {
        self.specials() + self.first.len() + self.second.len()
    }

    pub fn special_at(&self, piece: Option<&Piece>, wanted: u32) -> bool {
        matches!(piece, Some(Piece::Special { id, .. }) if *id == wanted)
    }

    /// The body that ends the sequence; none where a special token does.
    pub fn last_body(&mut self) -> Option<&mut Vec<u32>> {
        match self.pieces.last() {
            Some(Piece::First { .. }) => Some(&mut self.first),
            Some(Piece::Second { .. }) => Some(&mut self.second),
            _ => None,
        }
    }
}
