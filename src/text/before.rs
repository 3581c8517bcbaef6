//! What texts of one prompt begin with is tokenised once, where that surely gives the ids of each text as a whole.
//!
//! A text may be cut behind an added token: the library takes these out of a text first, and what lies between two of them is
//! normalised, split and tokenised by itself. That holds where no added token takes spaces or words beside it along or is looked
//! for in normalised text, and where no step looks at what stands before the piece that it is given. Which of these tokens a
//! text has is decided from left to right, by the longest that begins at a place, so what comes later decides of no place that
//! lies further before it than the longest token is long.

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::Tokenizer as RawTokenizer;

/// Normalisers and splits that give a piece the same parts whatever stands before it.
const LOCAL: [&str; 16] = [
    "Sequence",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "Replace",
    "BertNormalizer",
    "ByteLevel",
    "Split",
    "Digits",
    "Punctuation",
    "BertPreTokenizer",
    "Whitespace",
    "WhitespaceSplit",
];

/// Where texts may be cut.
#[derive(Debug)]
pub(super) struct Cuts {
    added: AhoCorasick,
    /// Bytes of the longest added token.
    longest: usize,
}

/// A place where texts may be cut that have the same first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    at: usize,
    /// The first bytes that decide it.
    certain: usize,
}

/// A text that was tokenised before, and the ids of what it begins with.
#[derive(Debug, Default)]
pub struct Before {
    text: String,
    beginning: Option<(Cut, Vec<u32>)>,
}

#[cfg(test)]
impl Before {
    /// Whether the ids of a beginning are there.
    pub(super) fn begins(&self) -> bool {
        self.beginning.is_some()
    }
}

impl Cuts {
    /// `None` where a text has to be tokenised as a whole.
    pub(super) fn of(raw: &RawTokenizer) -> Option<Self> {
        let added = raw.get_added_tokens_decoder();
        let plain = added.values().all(|token| !(token.normalized || token.lstrip || token.rstrip || token.single_word));
        let longest = added.values().map(|token| token.content.len()).max()?;
        let steps = [serde_json::to_value(raw.get_normalizer()), serde_json::to_value(raw.get_pre_tokenizer())];
        let local = steps.iter().all(|step| step.as_ref().is_ok_and(is_local));
        let model = serde_json::to_value(raw.get_model()).ok()?;
        let chance = model.get("dropout").is_some_and(|dropout| !dropout.is_null());
        if !plain || !local || chance || raw.get_encode_special_tokens() {
            return None;
        }
        let tokens = added.values().map(|token| &token.content);
        let added = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(tokens).ok()?;
        Some(Self { added, longest })
    }

    /// The last cut of every text that begins with these bytes.
    fn last(&self, beginning: &[u8]) -> Option<Cut> {
        let cuts = self.added.find_iter(beginning).map(|found| Cut { at: found.end(), certain: found.start() + self.longest });
        cuts.take_while(|cut| cut.certain <= beginning.len()).last()
    }

    /// The ids of a text, by those of what it begins with, where that was tokenised before. `ids` tokenises.
    pub(super) fn ids(&self, text: &str, before: &mut Before, ids: impl Fn(&str) -> Result<Vec<u32>, String>) -> Result<Vec<u32>, String> {
        let common = std::iter::zip(before.text.bytes(), text.bytes()).take_while(|(a, b)| a == b).count();
        let beginning = match (self.last(&text.as_bytes()[..common]), before.beginning.take()) {
            (None, _) => None,
            (Some(cut), Some((known, mut found))) if known.at <= cut.at => {
                if known.at < cut.at {
                    found.extend(ids(&text[known.at..cut.at])?);
                }
                Some((cut, found))
            }
            (Some(cut), _) => Some((cut, ids(&text[..cut.at])?)),
        };
        let (at, mut all) = beginning.as_ref().map_or((0, Vec::new()), |(cut, found)| (cut.at, found.clone()));
        all.extend(ids(&text[at..])?);
        *before = Before { text: text.to_owned(), beginning };
        Ok(all)
    }
}

/// Whether all steps of a normaliser or of a split, written as in `tokenizer.json`, look at nothing but the piece at hand.
fn is_local(step: &Value) -> bool {
    match step {
        Value::Object(fields) => {
            let known = fields.get("type").is_none_or(|name| name.as_str().is_some_and(|name| LOCAL.contains(&name)));
            known && fields.get("add_prefix_space") != Some(&Value::Bool(true)) && fields.values().all(is_local)
        }
        Value::Array(steps) => steps.iter().all(is_local),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A tokenizer of words, with these added tokens and whatever else is changed.
    fn raw(added: &[&str], change: impl FnOnce(&mut Value)) -> RawTokenizer {
        let token = |(id, content): (usize, &&str)| json!({"id": 100 + id, "content": content, "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false});
        let words: serde_json::Map<String, Value> =
            ["[UNK]", "a", "b", "ab", "<x>"].iter().zip(0..).map(|(word, id)| ((*word).to_owned(), json!(id))).collect();
        let mut file = json!({
            "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "decoder": null, "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"},
            "added_tokens": added.iter().enumerate().map(token).collect::<Vec<_>>(),
            "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": words},
        });
        change(&mut file);
        RawTokenizer::from_bytes(file.to_string()).expect("a tokenizer")
    }

    fn whole(raw: &RawTokenizer, text: &str) -> Result<Vec<u32>, String> {
        Ok(raw.encode_fast(text, false).map_err(|error| error.to_string())?.get_ids().to_vec())
    }

    #[test]
    fn the_beginning_of_a_group_is_tokenised_once() {
        let raw = raw(&["<s>", "</s>", "</s>!!"], |_| {});
        let (cuts, mut before, asked) = (Cuts::of(&raw).expect("may be cut"), Before::default(), RefCell::new(Vec::new()));
        let mut ids = |text: &str| {
            let found = cuts.ids(text, &mut before, |part| {
                asked.borrow_mut().push(part.to_owned());
                whole(&raw, part)
            });
            assert_eq!(found, whole(&raw, text));
            asked.take()
        };
        assert_eq!(ids("<s>a b</s>a a"), ["<s>a b</s>a a"]);
        assert_eq!(ids("<s>a b</s>a b"), ["<s>a b</s>", "a b"]);
        assert_eq!(ids("<s>a b</s>a ab"), ["a ab"]);
        // Another prompt, which begins like the first, and its other completions.
        assert_eq!(ids("<s>a b b</s>a a"), ["<s>", "a b b</s>a a"]);
        assert_eq!(ids("<s>a b b</s>a b"), ["a b b</s>", "a b"]);
        assert_eq!(ids("<s>a b b</s>a a b"), ["a a b"]);
        // What could still become another token is no place to cut at.
        assert_eq!(ids("<s>a b b</s>"), ["<s>", "a b b</s>"]);
        assert_eq!(ids("a b"), ["a b"]);
        assert_eq!(ids("a b a"), ["a b a"]);
    }

    #[test]
    fn tokenizers_that_look_beside_a_piece_cut_nothing() {
        assert!(Cuts::of(&raw(&["<s>"], |_| {})).is_some());
        let change = |field: &'static str, value: Value| move |file: &mut Value| file[field] = value;
        assert!(Cuts::of(&raw(&[], |_| {})).is_none(), "nothing is added");
        for (field, value) in [
            ("normalizer", json!({"type": "Prepend", "prepend": "_"})),
            (
                "normalizer",
                json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": true, "strip_right": true}]}),
            ),
            ("pre_tokenizer", json!({"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": true})),
            ("pre_tokenizer", json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})),
        ] {
            assert!(Cuts::of(&raw(&["<s>"], change(field, value.clone()))).is_none(), "{value}");
        }
        for flag in ["normalized", "lstrip", "rstrip", "single_word"] {
            assert!(Cuts::of(&raw(&["<s>"], |file| file["added_tokens"][0][flag] = json!(true))).is_none(), "{flag}");
        }
        let mut asis = raw(&["<s>"], |_| {});
        asis.set_encode_special_tokens(true);
        assert!(Cuts::of(&asis).is_none());
    }

    proptest! {
        #[test]
        fn ids_are_those_of_the_whole_text_whatever_came_before(texts in prop::collection::vec("(<|<x|<x>|<x>y|y|>|a| |b|<s>){0,12}", 1..9)) {
            // Tokens that begin alike, overlap, and are words as well.
            let raw = raw(&["<x>", "<x>y", "<x", "y<", "<s>"], |_| {});
            let (cuts, mut before) = (Cuts::of(&raw).expect("may be cut"), Before::default());
            for text in &texts {
                prop_assert_eq!(cuts.ids(text, &mut before, |part| whole(&raw, part)), whole(&raw, text), "{}", text);
            }
        }
    }
}
