//! The model's tokenizer: text to ids, and the special tokens that its post-processor puts around them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokenizers::{AddedToken, Encoding as RawEncoding, PostProcessor, PostProcessorWrapper, Token, Tokenizer as RawTokenizer};

use super::before::{Before, Cuts};
use super::options::TextError;
use crate::checkpoint::TextFacts;
use crate::lock::lock;

/// Stand-ins for the two segments of a text while the post-processor is asked what it puts around them.
const FIRST: u32 = u32::MAX - 1;
const SECOND: u32 = u32::MAX;

/// One piece of a finished sequence, with its segment number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Special { id: u32, type_id: u32 },
    First { type_id: u32 },
    Second { type_id: u32 },
}

impl Piece {
    pub(super) fn is_special(self) -> bool {
        matches!(self, Self::Special { .. })
    }

    pub(super) fn type_id(self) -> u32 {
        match self {
            Self::Special { type_id, .. } | Self::First { type_id } | Self::Second { type_id } => type_id,
        }
    }
}

/// A loaded tokenizer, without the truncation and the padding that its file may ask for: they would cut silently.
#[derive(Debug)]
pub(super) struct Tokenizer {
    raw: RawTokenizer,
    /// Where texts may be cut; `None` where none may.
    cuts: Option<Cuts>,
    single: Vec<Piece>,
    pair: Vec<Piece>,
}

impl Tokenizer {
    /// Builds the tokenizer and asks its post-processor once what it adds.
    ///
    /// Fails where the file is no tokenizer, or where it can emit an id that the embedding (`vocab_rows` rows) lacks.
    pub(super) fn new(facts: &TextFacts, vocab_rows: usize) -> Result<Self, TextError> {
        // The library indexes maps by names from the file while it loads and processes; a file whose parts do not fit
        // together must cost a load, never the process.
        let loaded = catch_unwind(AssertUnwindSafe(|| load(facts, vocab_rows)));
        loaded.unwrap_or_else(|_| Err(TextError("tokenizer.json: its parts do not fit together".to_owned())))
    }

    /// The ids of a text alone; special tokens in the text itself count, none are added.
    pub(super) fn ids(&self, text: &str) -> Result<Vec<u32>, String> {
        let encoding = self.raw.encode_fast(text, false).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same, by the ids of what the text begins with, where those were found before.
    pub(super) fn ids_beside(&self, text: &str, before: &mut Before) -> Result<Vec<u32>, String> {
        match &self.cuts {
            Some(cuts) => cuts.ids(text, before, |part| self.ids(part)),
            None => self.ids(text),
        }
    }

    /// What stands around one segment.
    pub(super) fn single(&self) -> &[Piece] {
        &self.single
    }

    /// What stands around and between two segments.
    pub(super) fn pair(&self) -> &[Piece] {
        &self.pair
    }

    pub(super) fn id_of(&self, token: &str) -> Option<u32> {
        self.raw.token_to_id(token)
    }

    pub(super) fn token_of(&self, id: u32) -> Option<String> {
        self.raw.id_to_token(id)
    }

    /// Whether this id is an added token that is marked special.
    pub(super) fn is_special(&self, id: u32) -> bool {
        let added = self.raw.get_added_vocabulary();
        added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }
}

/// The tokenizer that was built last, and what it was built from.
///
/// The library remembers, thread by thread, the words that it has split, under a number that each tokenizer gets when it is
/// built, and never forgets them: a server that builds a tokenizer at every reload would grow for as long as it runs. A
/// reload hardly ever changes the tokenizer, so it takes up the one that is there, and costs no second building of it.
pub(super) struct Kept(Mutex<Option<(blake3::Hash, Arc<Tokenizer>)>>);

/// That of this process.
pub(super) static KEPT: Kept = Kept::none();

impl Kept {
    const fn none() -> Self {
        Self(Mutex::new(None))
    }

    /// The tokenizer of these facts, as [`Tokenizer::new`] builds it.
    pub(super) fn tokenizer(&self, facts: &TextFacts, vocab_rows: usize) -> Result<Arc<Tokenizer>, TextError> {
        let source = source(facts, vocab_rows);
        if let Some((of, tokenizer)) = &*lock(&self.0)
            && *of == source
        {
            return Ok(tokenizer.clone());
        }
        let tokenizer = Arc::new(Tokenizer::new(facts, vocab_rows)?);
        let before = lock(&self.0).replace((source, tokenizer.clone()));
        // Freed without the lock.
        drop(before);
        Ok(tokenizer)
    }
}

/// Everything that [`load`] reads.
fn source(facts: &TextFacts, vocab_rows: usize) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let texts = [facts.tokenizer_config().to_string(), facts.post_processor().to_string(), format!("{:?}", facts.special_tokens())];
    for part in texts.iter().map(String::as_bytes).chain([facts.tokenizer_bytes()]) {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.update(&(vocab_rows as u64).to_le_bytes()).finalize()
}

fn load(facts: &TextFacts, vocab_rows: usize) -> Result<Tokenizer, TextError> {
    let refused = |problem: &dyn std::fmt::Display| TextError(format!("tokenizer.json: {problem}"));
    let mut raw = RawTokenizer::from_bytes(facts.tokenizer_bytes()).map_err(|error| refused(&error))?;
    raw.with_truncation(None).map_err(|error| refused(&error))?;
    raw.with_padding(None);
    // The frames replace the post-processor, so that truncation never has to look for what it added.
    raw.with_post_processor(None::<PostProcessorWrapper>);
    if facts.tokenizer_config().get("split_special_tokens") == Some(&Value::Bool(true)) {
        raw.set_encode_special_tokens(true);
    }
    check_ids(&raw, vocab_rows)?;
    add_configured_tokens(&mut raw, facts, vocab_rows).map_err(|error| refused(&error))?;
    let processor: Option<PostProcessorWrapper> = match facts.post_processor() {
        Value::Null => None,
        json => Some(serde_json::from_value(json.clone()).map_err(|error| refused(&format!("post_processor: {error}")))?),
    };
    let single = frame(processor.as_ref(), false).map_err(|error| refused(&error))?;
    let pair = frame(processor.as_ref(), true).map_err(|error| refused(&error))?;
    for piece in single.iter().chain(&pair) {
        if let Piece::Special { id, .. } = *piece
            && id as usize >= vocab_rows
        {
            let name = raw.id_to_token(id).unwrap_or_default();
            return Err(refused(&format!(
                "post_processor: adds token {name:?} with id {id}, but the model's embedding has {vocab_rows} rows"
            )));
        }
    }
    let cuts = Cuts::of(&raw);
    Ok(Tokenizer { raw, cuts, single, pair })
}

/// Every id that the tokenizer can emit must have a row in the embedding: a lookup past it is garbage or a crash.
fn check_ids(raw: &RawTokenizer, vocab_rows: usize) -> Result<(), TextError> {
    let mut beyond: Vec<_> = raw.get_vocab(true).into_iter().filter(|(_, id)| *id as usize >= vocab_rows).collect();
    if beyond.is_empty() {
        return Ok(());
    }
    beyond.sort_by_key(|(_, id)| *id);
    let shown: Vec<_> = beyond.iter().take(5).map(|(token, id)| format!("{token:?} = {id}")).collect();
    let more = if beyond.len() > shown.len() { format!(" and {} more", beyond.len() - shown.len()) } else { String::new() };
    let shown = shown.join(", ");
    Err(TextError(format!(
        "tokenizer.json: expected every token id below {vocab_rows}, the number of rows of the model's embedding; found {shown}{more}. \
         Tokens were added without resizing the embedding"
    )))
}

/// As in transformers, `added_tokens_decoder` of the configuration changes or adds tokens, and named special tokens that
/// are no added tokens become such. One that would get an id beyond the embedding is left out: transformers adds it and
/// then fails on the first text that has it; here its text stays text.
fn add_configured_tokens(raw: &mut RawTokenizer, facts: &TextFacts, vocab_rows: usize) -> Result<(), tokenizers::Error> {
    let flag = |token: &Value, name: &str| token.get(name).and_then(Value::as_bool);
    let configured = |token: &Value| -> Option<AddedToken> {
        let special = flag(token, "special").unwrap_or(false);
        let added = AddedToken::from(token.get("content")?.as_str()?, special)
            .single_word(flag(token, "single_word").unwrap_or(false))
            .lstrip(flag(token, "lstrip").unwrap_or(false))
            .rstrip(flag(token, "rstrip").unwrap_or(false))
            .normalized(flag(token, "normalized").unwrap_or(!special));
        Some(added)
    };
    let listed = facts.tokenizer_config().get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
    let mut listed: Vec<(u32, AddedToken)> = listed.filter_map(|(id, token)| Some((id.parse().ok()?, configured(token)?))).collect();
    listed.sort_by_key(|(id, _)| *id);
    let named = facts.special_tokens().values().map(|content| AddedToken::from(content.as_str(), true));
    let mut known = raw.get_added_tokens_decoder();
    for (replaces, token) in listed.into_iter().map(|(_, token)| (true, token)).chain(named.map(|token| (false, token))) {
        let present = known.values().find(|old| old.content == token.content);
        let unchanged = present.is_some_and(|old| {
            !replaces
                || (old.special, old.normalized, old.lstrip, old.rstrip, old.single_word)
                    == (token.special, token.normalized, token.lstrip, token.rstrip, token.single_word)
        });
        if unchanged || token.content.is_empty() {
            continue;
        }
        let next = known.keys().copied().max().map_or(0, |id| id as usize + 1).max(raw.get_vocab_size(false));
        if raw.token_to_id(&token.content).map_or(next, |id| id as usize) < vocab_rows {
            raw.add_tokens([token])?;
            known = raw.get_added_tokens_decoder();
        }
    }
    Ok(())
}

/// Asks a post-processor what it makes of one token per segment.
fn frame(processor: Option<&PostProcessorWrapper>, is_pair: bool) -> Result<Vec<Piece>, tokenizers::Error> {
    let Some(processor) = processor else {
        let first = Piece::First { type_id: 0 };
        return Ok(if is_pair { vec![first, Piece::Second { type_id: 1 }] } else { vec![first] });
    };
    let segment = |id: u32, type_id: u32| RawEncoding::from_tokens(vec![Token::new(id, String::new(), (0, 0))], type_id);
    let encoding = processor.process(segment(FIRST, 0), is_pair.then(|| segment(SECOND, 1)), true)?;
    let pieces: Vec<_> = std::iter::zip(encoding.get_ids(), encoding.get_type_ids())
        .map(|(&id, &type_id)| match id {
            FIRST => Piece::First { type_id },
            SECOND => Piece::Second { type_id },
            id => Piece::Special { id, type_id },
        })
        .collect();
    let count = |wanted: fn(&Piece) -> bool| pieces.iter().filter(|piece| wanted(piece)).count();
    let (first, second) = (count(|piece| matches!(piece, Piece::First { .. })), count(|piece| matches!(piece, Piece::Second { .. })));
    if first != 1 || second != usize::from(is_pair) {
        return Err(format!("post_processor: expected each segment once, found the first {first} and the second {second} times").into());
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_tokenizer_is_built_again_only_where_anything_that_it_is_built_from_has_changed() {
        let family = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/family"));
        let open = |dir: &Path| TextFacts::open(dir).expect("text facts");
        let kept = Kept::none();
        let first = kept.tokenizer(&open(&family.join("rm-0")), 4096).expect("a tokenizer");
        let same = kept.tokenizer(&open(&family.join("rm-1")), 4096).expect("a tokenizer");
        assert!(Arc::ptr_eq(&first, &same), "members of one family have one tokenizer");
        let rows = kept.tokenizer(&open(&family.join("rm-0")), 5000).expect("a tokenizer");
        assert!(!Arc::ptr_eq(&first, &rows));

        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(family.join("rm-0").join(name), dir.path().join(name)).expect("copied");
        }
        let before = kept.tokenizer(&open(dir.path()), 4096).expect("a tokenizer");
        let path = dir.path().join("tokenizer_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        config["split_special_tokens"] = Value::Bool(true);
        std::fs::write(&path, config.to_string()).expect("written");
        let split = kept.tokenizer(&open(dir.path()), 4096).expect("a tokenizer");
        assert!(!Arc::ptr_eq(&before, &split));
        // Another one that cannot be built leaves what is there.
        assert!(kept.tokenizer(&open(dir.path()), 1).is_err());
        assert!(Arc::ptr_eq(&split, &kept.tokenizer(&open(dir.path()), 4096).expect("a tokenizer")));
    }
}
