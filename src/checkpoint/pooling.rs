//! Which hidden state the head reads.

use serde::Serialize;

/// One mode per convention in use. Conventions differ where a sequence has pad tokens of its own, which happens as soon
/// as the pad token is the end-of-sequence token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The rightmost token that is not the pad token, as transformers' `GenericForSequenceClassification` does it since
    /// 2025; the last token where there is no pad token.
    LastNonPad,
    /// The last token, whatever it is: OpenRLHF, GRM, UltraRM, InternLM2, and every next-token read-out.
    LastToken,
    /// The token before the first pad token, the last one where there is none: transformers before 2025, and the model
    /// code that was copied from it.
    FirstPadMinusOne,
    /// The first token.
    Cls,
    /// The mean of all tokens.
    Mean,
    /// The last occurrence of one token.
    Token,
}

impl Pooling {
    pub const ALL: [Self; 6] = [Self::LastNonPad, Self::LastToken, Self::FirstPadMinusOne, Self::Cls, Self::Mean, Self::Token];

    /// The name in settings, recipes and `GetModel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::LastNonPad => "last_non_pad",
            Self::LastToken => "last_token",
            Self::FirstPadMinusOne => "first_pad_minus_one",
            Self::Cls => "cls",
            Self::Mean => "mean",
            Self::Token => "token",
        }
    }

    /// The index of the one token that is read, of a non-empty sequence; `None` where there is no such one: for the mean,
    /// and for a `token` that does not occur.
    pub fn position(self, ids: &[u32], pad: Option<u32>, token: Option<u32>) -> Option<usize> {
        let last = ids.len().checked_sub(1)?;
        let pad_at = |find: fn(&[u32], u32) -> Option<usize>| pad.and_then(|pad| find(ids, pad));
        match self {
            Self::Cls => Some(0),
            Self::LastToken => Some(last),
            // A sequence of nothing but pad tokens is read at its first one, as transformers' argmax does.
            Self::LastNonPad => Some(pad.map_or(last, |pad| ids.iter().rposition(|&id| id != pad).unwrap_or(0))),
            // Before the first token stands, counted modulo the length, the last one.
            Self::FirstPadMinusOne => Some(match pad_at(|ids, pad| ids.iter().position(|&id| id == pad)) {
                None | Some(0) => last,
                Some(first) => first - 1,
            }),
            Self::Mean => None,
            Self::Token => token.and_then(|token| ids.iter().rposition(|&id| id == token)),
        }
    }

    /// Whether cutting the right end of a sequence may cut what is read.
    pub fn reads_the_end(self) -> bool {
        !matches!(self, Self::Cls | Self::Mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_mode_reads_its_own_token() {
        use Pooling::{Cls, FirstPadMinusOne, LastNonPad, LastToken, Mean, Token};
        let at = |mode: Pooling, ids: &[u32]| mode.position(ids, Some(0), Some(7));
        let ended = [5, 0, 7, 6, 0, 0];
        let found = [LastNonPad, LastToken, FirstPadMinusOne, Cls, Mean, Token].map(|mode| at(mode, &ended));
        assert_eq!(found, [Some(3), Some(5), Some(0), Some(0), None, Some(2)]);
        // Nothing but pads; a pad at the very beginning; no pad; the token twice.
        assert_eq!([at(LastNonPad, &[0, 0]), at(FirstPadMinusOne, &[0, 0])], [Some(0), Some(1)]);
        assert_eq!(at(FirstPadMinusOne, &[0, 5, 6]), Some(2));
        assert_eq!([at(LastNonPad, &[5, 6]), at(FirstPadMinusOne, &[5, 6]), at(Token, &[5, 6])], [Some(1), Some(1), None]);
        assert_eq!(at(Token, &[7, 5, 7, 5]), Some(2));
        assert_eq!(LastNonPad.position(&[5, 0, 0], None, None), Some(2));
    }

    proptest! {
        #[test]
        fn the_conventions_agree_where_a_sequence_has_no_pad(ids in prop::collection::vec(1u32..9, 1..20)) {
            let at = |mode: Pooling| mode.position(&ids, Some(0), None);
            prop_assert_eq!(at(Pooling::LastNonPad), Some(ids.len() - 1));
            prop_assert_eq!(at(Pooling::LastNonPad), at(Pooling::FirstPadMinusOne));
            prop_assert_eq!(at(Pooling::LastNonPad), at(Pooling::LastToken));
        }

        #[test]
        fn what_is_read_lies_within_the_sequence(ids in prop::collection::vec(0u32..4, 1..20), pad in prop::option::of(0u32..4), token in 0u32..4) {
            for mode in Pooling::ALL {
                prop_assert!(mode.position(&ids, pad, Some(token)).is_none_or(|at| at < ids.len()));
            }
        }
    }
}
