//! From a sample to the ids that the model reads.

use std::{borrow::Cow, sync::Arc};

use super::{
    before::Before,
    draft::Draft,
    encoding::Encoding,
    options::{BosPolicy, EosPolicy, ReasoningPolicy, TextError, TextOptions, TextPolicy},
    reasoning::{self, Unfinished},
    template::Templates,
    tokenizer::{KEPT, Piece, Tokenizer},
};
use crate::{
    checkpoint::{Names, Readout, TextFacts, TokenName},
    domain::{Failure, FailureKind, Sample, Truncation},
};

/// Everything that turns a sample into tokens for one model. Immutable, so any number of threads may use it; it starts
/// none itself.
#[derive(Debug)]
pub struct TextPipeline {
    tokenizer: Arc<Tokenizer>,
    templates: Templates,
    options: TextOptions,
    policy: TextPolicy,
    uses_type_ids: bool,
    bos: Option<u32>,
    unk: Option<u32>,
    /// The token that ends every sequence but those that come as ids.
    end: Option<u32>,
    /// Whether the template itself opens a thinking block before an answer.
    opens_reasoning: bool,
    /// Where the head reads; a sample that lacks such a token fails.
    readout: Option<Readout>,
    hash: [u8; 32],
}

/// What one sample becomes, step by step: what `warm explain` prints.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    pub encoding: Encoding,
    /// The vocabulary's own name of each token.
    pub tokens: Vec<String>,
    /// Which of them are special tokens.
    pub special: Vec<bool>,
    /// One sentence for each decision about BOS, EOS and truncation.
    pub notes: Vec<String>,
}

impl TextPipeline {
    /// Fails where the tokenizer or the template cannot be used, or an option asks for a token that there is none of. A
    /// model without a template loads: only conversations need one.
    pub fn new(facts: &TextFacts, options: TextOptions) -> Result<Self, TextError> {
        if options.max_tokens == 0 {
            return Err(TextError("max_tokens: expected at least 1, found 0".to_owned()));
        }
        let tokenizer = KEPT.tokenizer(facts, options.vocab_rows)?;
        let templates = Templates::new(facts, &options.template, options.template_time)?;
        let special = |name: &str| facts.special_tokens().get(name).and_then(|token| Some((token.clone(), tokenizer.id_of(token)?)));
        let (bos, eos) = (special("bos_token"), special("eos_token"));
        if bos.is_none() && options.bos == BosPolicy::Always {
            return Err(TextError("bos: always needs a `bos_token`, and the tokenizer has none".to_owned()));
        }
        if eos.is_none() && options.eos == EosPolicy::Ensure {
            return Err(TextError("eos: ensure needs an `eos_token`, and the tokenizer has none".to_owned()));
        }
        let policy = TextPolicy {
            bos: options.bos,
            eos: options.eos,
            pad_id: special("pad_token").map(|(_, id)| id),
            template: templates.name().map(str::to_owned),
            template_hash: templates.hash().map(|hash| blake3::Hash::from(hash).to_hex().to_string()),
            template_time: templates.tells_the_time().then_some(options.template_time),
            reasoning: options.reasoning,
            closing: options.closing,
            max_tokens: options.max_tokens,
            bos_token: bos.as_ref().map(|(token, _)| token.clone()),
            eos_token: eos.as_ref().map(|(token, _)| token.clone()),
        };
        let hash = policy_hash(facts, &options, &templates);
        let bos = bos.map(|(_, id)| id);
        let unk = special("unk_token").map(|(_, id)| id);
        let end = options.closing.or(eos.map(|(_, id)| id).filter(|_| options.eos == EosPolicy::Ensure));
        let opens_reasoning =
            options.reasoning == ReasoningPolicy::Strip && templates.opening().is_some_and(|text| reasoning::is_open(&text));
        let uses_type_ids = facts.uses_type_ids();
        Ok(Self { tokenizer, templates, options, policy, uses_type_ids, bos, unk, end, opens_reasoning, readout: None, hash })
    }

    /// The same pipeline for a head that reads as this: a sample that it finds nothing to read in fails.
    pub fn reading(self, readout: Readout) -> Self {
        Self { readout: Some(readout), ..self }
    }

    /// The tokens of a sample.
    ///
    /// Conversations are rendered by the chat template and tokenised without adding special tokens; texts and pairs get
    /// those of the post-processor; ids are taken as they are. A pair whose second segment is empty is a text, as in
    /// transformers.
    ///
    /// # Truncation
    /// Only bodies are cut, never the special tokens that the tokenizer or the policy puts around them; of a pair the
    /// longer segment first, until both are equal (transformers' `longest_first`). Cutting the right end must not cut
    /// what the head reads, silently. Where the head reads the last token and `eos` is not `ensure`, it is therefore
    /// refused for conversations (the template's closing tokens would go) and for texts and ids that end with a special
    /// token which would go.
    pub fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<Encoding, Failure> {
        self.finish(sample, truncation, None).map(|(encoding, _)| encoding)
    }

    /// [`Self::encode`] for one of several samples, which may begin alike: what they begin with is tokenised once, where that
    /// gives the same tokens. A template renders each conversation as a whole.
    pub fn encode_beside(&self, sample: &Sample, truncation: Truncation, before: &mut Before) -> Result<Encoding, Failure> {
        self.finish(sample, truncation, Some(before)).map(|(encoding, _)| encoding)
    }

    /// The same, with what there is to see on the way.
    pub fn explain(&self, sample: &Sample, truncation: Truncation) -> Result<Explanation, Failure> {
        let (encoding, notes) = self.finish(sample, truncation, None)?;
        let tokens = encoding.ids().iter().map(|&id| self.tokenizer.token_of(id).unwrap_or_default()).collect();
        let special = encoding.ids().iter().map(|&id| self.tokenizer.is_special(id)).collect();
        Ok(Explanation { encoding, tokens, special, notes })
    }

    /// BLAKE3 over all that decides which tokens a sample becomes: facts, policies, limit, template and (where the
    /// template asks for it) the time. Part of the fingerprint.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    pub fn policy(&self) -> &TextPolicy {
        &self.policy
    }

    fn finish(&self, sample: &Sample, truncation: Truncation, before: Option<&mut Before>) -> Result<(Encoding, Vec<String>), Failure> {
        let stripped = self.without_reasoning(sample)?;
        let sample = stripped.as_ref();
        let mut draft = self.draft(sample, before)?;
        if !matches!(sample, Sample::Tokens(_)) {
            self.apply_bos(&mut draft, matches!(sample, Sample::Text(_) | Sample::Pair { .. }));
        }
        self.apply_eos(&mut draft, matches!(sample, Sample::Tokens(_)));
        if draft.tokens() == 0 {
            return Err(Failure::new(FailureKind::Empty, "no token is left to score"));
        }
        let truncated = draft.tokens() > self.options.max_tokens;
        if truncated {
            self.truncate(&mut draft, matches!(sample, Sample::Conversation(_)), truncation)?;
        }
        let mut ids = Vec::with_capacity(draft.tokens());
        let mut type_ids = Vec::new();
        for &piece in &draft.pieces {
            match piece {
                Piece::Special { id, .. } => ids.push(id),
                Piece::First { .. } => ids.extend_from_slice(&draft.first),
                Piece::Second { .. } => ids.extend_from_slice(&draft.second),
            }
            if self.uses_type_ids {
                type_ids.resize(ids.len(), piece.type_id());
            }
        }
        if let Some(Err(problem)) = self.readout.as_ref().map(|readout| readout.places(&ids)) {
            let cut = if truncated { "; the sample was cut" } else { "" };
            return Err(Failure::new(FailureKind::NothingToRead, format!("{problem}{cut}")));
        }
        let encoding = Encoding::new(ids, self.uses_type_ids.then_some(type_ids), truncated, draft.rendered);
        Ok((encoding.with_doubled_bos(draft.doubled_bos), draft.notes))
    }

    /// The sample without thinking blocks, where the policy strips them. Token ids are taken as they are.
    fn without_reasoning<'a>(&self, sample: &'a Sample) -> Result<Cow<'a, Sample>, Failure> {
        if self.options.reasoning == ReasoningPolicy::Keep {
            return Ok(Cow::Borrowed(sample));
        }
        let unfinished = |unfinished: Unfinished| Failure::new(FailureKind::UnfinishedReasoning, unfinished.to_string());
        Ok(match sample {
            Sample::Conversation(conversation) => {
                let stripped = reasoning::strip_conversation(conversation, self.opens_reasoning).map_err(unfinished)?;
                Cow::Owned(Sample::Conversation(stripped))
            }
            Sample::Text(text) => Cow::Owned(Sample::Text(reasoning::strip(text, false).map_err(unfinished)?)),
            Sample::Pair { first, second } => {
                let second = reasoning::strip(second, reasoning::is_open(first)).map_err(unfinished)?;
                Cow::Owned(Sample::Pair { first: reasoning::without_opening(first).to_owned(), second })
            }
            Sample::Tokens(_) => Cow::Borrowed(sample),
        })
    }

    fn draft(&self, sample: &Sample, mut before: Option<&mut Before>) -> Result<Draft, Failure> {
        let known = |ids: Result<Vec<u32>, String>| -> Result<Vec<u32>, Failure> {
            let unknown = |error| Failure::new(FailureKind::UnknownToken, format!("the tokenizer cannot encode this text: {error}"));
            let ids = ids.map_err(unknown)?;
            self.check_rows(&ids)?;
            Ok(ids)
        };
        let mut ids = |text: &str| {
            known(match &mut before {
                Some(before) => self.tokenizer.ids_beside(text, before),
                None => self.tokenizer.ids(text),
            })
        };
        let bare = || vec![Piece::First { type_id: 0 }];
        let draft =
            |pieces: Vec<Piece>, first, second| Draft { pieces, first, second, rendered: None, doubled_bos: false, notes: Vec::new() };
        Ok(match sample {
            Sample::Conversation(conversation) => {
                let rendered = self.templates.render(conversation)?;
                let ids = ids(&rendered)?;
                Draft { rendered: Some(rendered), ..draft(bare(), ids, Vec::new()) }
            }
            Sample::Text(text) => draft(self.tokenizer.single().to_vec(), ids(text)?, Vec::new()),
            Sample::Pair { first, second } if second.is_empty() => draft(self.tokenizer.single().to_vec(), ids(first)?, Vec::new()),
            Sample::Pair { first, second } => draft(self.tokenizer.pair().to_vec(), ids(first)?, known(self.tokenizer.ids(second))?),
            Sample::Tokens(tokens) => {
                self.check_rows(tokens)?;
                draft(bare(), tokens.clone(), Vec::new())
            }
        })
    }

    fn check_rows(&self, ids: &[u32]) -> Result<(), Failure> {
        let rows = self.options.vocab_rows;
        match ids.iter().position(|&id| id as usize >= rows) {
            None => Ok(()),
            Some(at) => {
                let id = ids[at];
                Err(Failure::new(
                    FailureKind::UnknownToken,
                    format!("token id {id} at position {at}: the model's embedding has {rows} rows"),
                ))
            }
        }
    }

    fn apply_bos(&self, draft: &mut Draft, is_text: bool) {
        let Some(bos) = self.bos else { return };
        let framed = draft.special_at(draft.pieces.first(), bos);
        let leading = draft.first.iter().take_while(|&&id| id == bos).count();
        match self.options.bos {
            BosPolicy::AsIs => {}
            BosPolicy::Auto if is_text && framed && leading > 0 => {
                draft.doubled_bos = true;
                draft.first.remove(0);
                draft.notes.push("the text begins with BOS and the tokenizer puts one before it: one was dropped (bos: auto)".to_owned());
            }
            BosPolicy::Auto => {}
            BosPolicy::Always => {
                draft.first.drain(..leading);
                if !framed {
                    let type_id = draft.pieces.first().map_or(0, |piece| piece.type_id());
                    draft.pieces.insert(0, Piece::Special { id: bos, type_id });
                }
                match (framed, leading) {
                    (false, 0) => draft.notes.push("BOS was put at the beginning (bos: always)".to_owned()),
                    (true, 1..) => {
                        draft.doubled_bos = true;
                        draft.notes.push("a doubled BOS was dropped (bos: always)".to_owned());
                    }
                    _ => {}
                }
            }
            BosPolicy::Never => {
                draft.first.drain(..leading);
                if framed {
                    draft.pieces.remove(0);
                }
                if framed || leading > 0 {
                    draft.notes.push("BOS was taken from the beginning (bos: never)".to_owned());
                }
            }
        }
    }

    fn apply_eos(&self, draft: &mut Draft, is_ids: bool) {
        let Some(end) = self.end else { return };
        if draft.special_at(draft.pieces.last(), end) {
            return;
        }
        let type_id = draft.pieces.last().map_or(0, |piece| piece.type_id());
        // An EOS of the body's own becomes a fixed one, so that truncation keeps it.
        let own = draft.last_body().filter(|body| body.last() == Some(&end)).map(Vec::pop).is_some();
        if !own && is_ids {
            return;
        }
        draft.pieces.push(Piece::Special { id: end, type_id });
        if !own {
            let note = if self.options.closing.is_some() {
                "the token that the head reads was put at the end"
            } else {
                "EOS was put at the end (eos: ensure)"
            };
            draft.notes.push(note.to_owned());
        }
    }

    fn truncate(&self, draft: &mut Draft, is_conversation: bool, truncation: Truncation) -> Result<(), Failure> {
        let (found, limit) = (draft.tokens(), self.options.max_tokens);
        let too_long =
            |why: &str| Err(Failure::new(FailureKind::TooLong, format!("{found} tokens, and the model takes at most {limit}{why}")));
        if truncation == Truncation::Refuse {
            return too_long("");
        }
        let Some(room) = limit.checked_sub(draft.specials()).filter(|&room| room > 0) else {
            return too_long("; the special tokens alone fill that");
        };
        if truncation == Truncation::Right && self.options.reads_last_token && self.end.is_none() {
            if is_conversation {
                return too_long(
                    "; cutting the right would cut the template's closing tokens, which the head reads: truncate left, or set `eos: ensure`",
                );
            }
            let ends_special = draft.last_body().and_then(|body| body.last().copied()).is_some_and(|id| self.tokenizer.is_special(id));
            if ends_special {
                return too_long(
                    "; cutting the right would cut the special token at the end, which the head reads: truncate left, or set `eos: ensure`",
                );
            }
        }
        let (first, second) = longest_first(draft.first.len(), draft.second.len(), room);
        for (body, keep) in [(&mut draft.first, first), (&mut draft.second, second)] {
            match truncation {
                Truncation::Left => _ = body.drain(..body.len() - keep),
                Truncation::Right | Truncation::Refuse => body.truncate(keep),
            }
        }
        let side = if truncation == Truncation::Left { "left" } else { "right" };
        draft.notes.push(format!("{found} tokens were cut to {limit} on the {side}"));
        Ok(())
    }
}

impl Names for TextPipeline {
    /// A text that becomes one token, or else the name that the vocabulary has for one.
    fn token(&self, name: &TokenName) -> Result<u32, String> {
        match name {
            TokenName::Id(id) => Ok(*id),
            TokenName::Text(text) => match self.tokenizer.ids(text)?.as_slice() {
                // What the tokenizer does not know is one token too, and not the one that was meant.
                [one] if Some(*one) != self.unk || self.tokenizer.id_of(text) == Some(*one) => Ok(*one),
                [_] => Err("is unknown to the tokenizer".to_owned()),
                several => self.tokenizer.id_of(text).ok_or_else(|| {
                    let pieces: Vec<_> = several.iter().take(8).map(|&id| self.tokenizer.token_of(id).unwrap_or_default()).collect();
                    format!("is not one token: it becomes {} ({})", several.len(), pieces.join(", "))
                }),
            },
        }
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        self.tokenizer.ids(text)
    }
}

/// The lengths of two bodies that share `room`: the longer one gives first; where both must give, they become equal, and
/// an odd token goes to the longer one.
fn longest_first(first: usize, second: usize, room: usize) -> (usize, usize) {
    if first + second <= room {
        return (first, second);
    }
    let short = first.min(second).min(room / 2);
    if first <= second { (short, room - short) } else { (room - short, short) }
}

fn policy_hash(facts: &TextFacts, options: &TextOptions, templates: &Templates) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"warm text policy 1");
    hasher.update(&facts.hash());
    for number in [options.max_tokens, options.vocab_rows] {
        hasher.update(&(number as u64).to_le_bytes());
    }
    hasher.update(&[options.bos as u8, options.eos as u8, u8::from(options.reads_last_token), options.reasoning as u8]);
    hasher.update(&options.closing.map_or([0xff; 8], |id| u64::from(id).to_le_bytes()));
    hasher.update(&templates.fingerprint());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
